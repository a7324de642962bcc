"""A callback that looks at every triplet of validation and test, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from lipsim import export
from lipsim.callbacks.collect import SampleTable, rows_by_group
from lipsim.checks import check_number
from lipsim.data import Triplet
from lipsim.data.loading import data_fingerprint, read_batch
from lipsim.layers import freeze
from lipsim.metric import PerceptualMetric
from lipsim.precision import full_precision
from lipsim.results import state_fingerprint, update_results
from lipsim.training.base import Features, MetricModule, evaluation_loaders, images_of


class TripletCallback(Callback):
    """Calls :meth:`begin`, :meth:`see` for each batch and :meth:`finish`, in validation (unless told not to) and test.

    Args:
        directory: where a test run writes its files; None: the trainer's ``default_root_dir``.
        validate: whether to work in validation too.

    Attributes:
        tables: by the name of an evaluation set, what :meth:`see` found out about its triplets. A test that continues
            an interrupted one starts with the rows of the batches that are finished.
        latest: set, sample indices and columns of the last batch.
    """

    differentiates = False  # whether `see` takes gradients with respect to images, which Lightning's cannot have

    def __init__(self, directory: Path | None = None, validate: bool = True) -> None:
        super().__init__()
        self.directory = directory
        self.validate = validate
        self.tables: dict[str, SampleTable] = {}
        self.latest: tuple[str, Tensor, dict[str, Tensor]] | None = None

    def begin(self, trainer: L.Trainer, module: MetricModule) -> None:
        """Before the first batch."""

    def see(
        self, trainer: L.Trainer, module: MetricModule, features: Features, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        """One batch of the evaluation set ``name`` with its full-precision features ``(z, z0, z1)``.

        Returns:
            Columns ``(N,)`` for :attr:`tables`: all that :meth:`finish` needs to know of these triplets.
        """
        return {}

    def finish(self, trainer: L.Trainer, module: MetricModule) -> None:
        """After the last batch, on every process."""

    def gather(self, trainer: L.Trainer, module: MetricModule) -> dict[str, dict[str, Tensor]]:
        """The rows of all processes by set, on every process."""
        # In the order of the loaders: after a resume, processes may have met the sets in different orders.
        order = [module.set_name(i) for i in range(len(evaluation_loaders(trainer)))]
        return {name: self.tables[name].gather() for name in dict.fromkeys(order) if name in self.tables}

    def with_parts(
        self, module: MetricModule, gathered: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Gathered rows by set, each followed by the parts that the data module names (``test_groups``)."""
        return {
            part: part_rows
            for name, rows in gathered.items()
            for part, part_rows in {name: rows, **rows_by_group(rows, module.groups(name))}.items()
        }

    def output_directory(self, trainer: L.Trainer) -> Path:
        """Where files go."""
        return Path(self.directory or trainer.default_root_dir)

    @rank_zero_only
    def write_section(self, trainer: L.Trainer, section: str, content: dict[str, Any]) -> None:
        """Write a section of results.json; validation leaves no files, its scores are in the log."""
        if trainer.testing:
            module = cast(MetricModule, trainer.lightning_module)
            data: dict[str, str] = {}
            for i, loader in enumerate(evaluation_loaders(trainer)):
                name = module.set_name(i)
                data |= dict.fromkeys([name, *module.groups(name)], data_fingerprint(loader))
            weights = state_fingerprint(module.metric.encoder.state_dict())
            content = {"weights_sha256": weights, "data_sha256": data, **content}
            update_results(self.output_directory(trainer) / "results.json", section, content)

    def _works(self, trainer: L.Trainer) -> bool:
        return trainer.testing or (self.validate and not trainer.sanity_checking)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._batch(trainer, pl_module, *args)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._batch(trainer, pl_module, *args)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, pl_module)

    def _start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module, MetricModule):
            raise ValueError(f"{type(self).__name__} needs a stage of lipsim.training, got {type(module).__name__}")
        if self._works(trainer):
            with outside_inference_mode():
                # Callbacks start before the module does; what they audit must be what it will evaluate.
                freeze(module.metric)
                self.tables, self.latest = {}, None
                self.begin(trainer, module)

    def _batch(
        self,
        trainer: L.Trainer,
        module: Any,
        evaluation: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Batches without triplets (a folder of images in distillation) have nothing to certify or attack.
        if self._works(trainer) and isinstance(batch, Triplet):
            with outside_inference_mode():
                z, z0, z1 = (features.clone() for features in evaluation["features"])
                name = module.set_name(dataloader_idx)
                # Copying every image costs a tenth of embedding them.
                images = batch.clone() if self.differentiates else batch
                columns = self.see(trainer, module, (z, z0, z1), images, name)
            if columns:
                self.tables.setdefault(name, SampleTable()).append(batch.index, columns)
                self.latest = name, batch.index, columns

    def _end(self, trainer: L.Trainer, module: Any) -> None:
        if self._works(trainer):
            self.finish(trainer, module)


def check_budgets(eps: Sequence[float]) -> list[float]:
    """Budgets that a table can have as its columns.

    Raises:
        ValueError: none, negative or infinite ones, or not in ascending order.
    """
    if not eps:
        raise ValueError("expected at least one budget eps, got none")
    eps = [check_number("budget eps", e) for e in eps]
    if any(a >= b for a, b in pairwise(eps)):
        raise ValueError(f"expected budgets eps in ascending order, each once, got {list(eps)}")
    return eps


def load_others(others: Mapping[str, Path] | None) -> dict[str, PerceptualMetric]:
    """Load the metrics that a callback compares with.

    Raises:
        ValueError: one of them is named "metric", as the module's own is in the results.
    """
    if "metric" in (others or {}):
        raise ValueError("expected another name than 'metric' among others; the trained metric has it")
    return {name: export.load(path) for name, path in (others or {}).items()}


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Ordinary tensors without gradients, in full precision.

    Lightning evaluates in inference mode, whose tensors no attack can differentiate through, and under autocast.
    """
    with torch.inference_mode(False), torch.no_grad(), full_precision():
        yield


def first_images(loader: DataLoader, count: int) -> Tensor:
    """About ``count`` images ``(M, 3, H, W)`` from the start of a loader's data set, whatever its sampler does.

    Of triplets all three images, references and candidates alike.
    """
    length = len(loader.dataset)  # type: ignore[arg-type]
    batch = read_batch(loader, list(range(min(-(-count // 3), length))))
    if not isinstance(batch, Triplet):
        batch = read_batch(loader, list(range(min(count, length))))
    return images_of(batch)
