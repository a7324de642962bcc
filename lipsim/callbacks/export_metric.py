"""Write the metric for use when training has ended."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from lipsim import export
from lipsim.layers import freeze
from lipsim.training.base import MetricModule


class ExportMetric(Callback):
    """Exports the metric at the end of training, and again after a test, which measures its float32 error.

    The weights are those of the last step; the Lipschitz bound is audited for them.

    Args:
        path: ``….safetensors``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.trained = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trained = True
        self._export(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A test of weights that nobody trained must not replace a file of some that were.
        if self.trained or trainer.ckpt_path:
            self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (
            not isinstance(module, MetricModule)
            or not trainer.is_global_zero
            or getattr(trainer, "fast_dev_run", False)
        ):
            return
        freeze(module.metric)
        if module.metric.lipschitz != float("inf"):
            module.metric.audit()
        export.save(module.metric, self.path)
        rank_zero_info(f"exported the metric to {self.path}")
