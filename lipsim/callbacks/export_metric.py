"""Write the metric for use when training has ended."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from lipsim.evaluation.module import EvaluationModule, weights_are_finite
from lipsim.layers import freeze
from lipsim.metric import save
from lipsim.metric.files import holds
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


class ExportMetric(Callback):
    """Exports the metric at the end of training.

    The weights are those of the last step; the Lipschitz bound is audited for them. A test adds the float32 error that
    it measures to the file, if that has the weights tested, and writes it if there is none; a file of other weights
    stays as it is, and the log says so.

    Args:
        path: ``….safetensors``; a relative one is taken from the trainer's ``default_root_dir``.
    """

    def __init__(self, path: Path = Path("metric.safetensors")) -> None:
        super().__init__()
        self.path = user_path(path)

    def output(self, trainer: L.Trainer) -> Path:
        """The file."""
        return Path(trainer.default_root_dir) / self.path

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._writes(trainer) and isinstance(pl_module, EvaluationModule):
            self._export(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._writes(trainer) or not isinstance(pl_module, EvaluationModule):
            return
        file = self.output(trainer)
        if not file.exists():
            if trainer.ckpt_path:  # else these are weights that nobody trained
                self._export(trainer, pl_module)
        elif holds(file, pl_module.metric):
            self._export(trainer, pl_module)
        else:
            rank_zero_info(f"{file} holds other weights than those tested, and stays as it is")

    def _writes(self, trainer: L.Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _export(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        if not weights_are_finite(module.metric):
            raise LipsimError(
                f"weights are NaN or infinite at step {trainer.global_step}; there is no metric to export"
            )
        freeze(module.metric)
        if module.metric.has_bound:
            module.metric.audit()
        file = save(module.metric, self.output(trainer))
        rank_zero_info(f"exported the metric to {file}")
