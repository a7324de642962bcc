"""A callback that looks at every triplet of validation and test, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from lipsim.callbacks.sample_table import SampleTable, csv_columns, gather_objects, rows_by_group, write_csv
from lipsim.certificates.numbers import check_number
from lipsim.data import Triplet
from lipsim.data.check import images_of
from lipsim.data.labelled import LabelledBatch
from lipsim.data.loading import check_count, data_fingerprint, num_samples, read_batch
from lipsim.evaluation.batches import EvaluatedBatch, outside_inference_mode
from lipsim.evaluation.journal import RowCallback
from lipsim.evaluation.module import EvaluationModule, evaluation_loaders
from lipsim.layers import freeze
from lipsim.metric import PerceptualMetric, load
from lipsim.results import update_results
from lipsim.results.schema import Sections, Source
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import remove_files, state_fingerprint
from lipsim.utils.paths import user_path

DRAWN = "drawn"  # a column that says whether a picture was made of a batch


class TripletCallback(RowCallback):
    """Calls :meth:`begin`, :meth:`see` for each batch and :meth:`finish`, in validation (unless told not to) and test.

    Args:
        directory: where a test run writes its files, taken from the trainer's ``default_root_dir``, which None means.
        validate: whether to work in validation too.

    Attributes:
        tables: by the name of an evaluation set, what :meth:`see` found out about its triplets. A test that continues
            an interrupted one starts with the rows of the batches that are finished.
        latest: set, positions, sample indices and columns of the last batch.
        position: ``(N,)`` int64, where the triplets that :meth:`see` gets are in their set.
        sections: of results.json that tests have written.
    """

    files: tuple[str, ...] = ()  # patterns of what a test writes into its directory besides results.json
    batches: type[Any] = Triplet  # of which `see` is called
    differentiates = False  # whether `see` takes gradients with respect to images, which Lightning's cannot have

    def __init__(self, directory: Path | None = None, validate: bool = True) -> None:
        super().__init__()
        self.directory = directory
        self.validate = validate
        self.tables: dict[str, SampleTable] = {}
        self.latest = None
        self.position = torch.empty(0, dtype=torch.int64)
        self.sections: set[str] = set()
        self.others: dict[str, PerceptualMetric] = {}  # that see the same images, for comparison

    def begin(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        """Before the first batch."""

    def see(
        self, trainer: L.Trainer, module: EvaluationModule, evaluated: EvaluatedBatch, batch: Triplet, name: str
    ) -> dict[str, Tensor]:
        """One batch of the evaluation set ``name``, with its features and certificate as all callbacks get them.

        Args:
            trainer: of the evaluation.
            module: with the metric.
            evaluated: full-precision features, margin and certificate, each computed once; not to be changed in place.
            batch: the triplets; ordinary tensors where this callback :attr:`differentiates`.
            name: of the set.

        Returns:
            Columns ``(N,)`` for :attr:`tables`: all that :meth:`finish` needs to know of these triplets.
        """
        return {}

    def restore(self, name: str, index: Tensor, position: Tensor, columns: dict[str, Tensor]) -> None:
        self.tables.setdefault(name, SampleTable()).append(index, columns, position)

    def finish(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        """After the last batch, on every process."""

    def gather(self, trainer: L.Trainer, module: EvaluationModule) -> dict[str, dict[str, Tensor]]:
        """The rows of all processes by set, in the order of the loaders, on every process.

        Raises:
            ValueError: they are not of each triplet that a set was to serve, once.
        """
        found = {}
        for i, name in enumerate(module.set_names()):
            table = self.tables.get(name, SampleTable())
            rows = table.gather()
            shares = gather_objects(module.expected_positions(i))
            if rows:
                known = [share for share in shares if share is not None]
                expected = frozenset().union(*known) if known else None
                check_count(name, table.positions() if expected is None else rows["position"].tolist(), expected)
                found[name] = rows
        return found

    def with_parts(
        self, module: EvaluationModule, gathered: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Gathered rows by set, each followed by the parts that the data module names (``test_groups``)."""
        return {
            part: part_rows
            for name, rows in gathered.items()
            for part, part_rows in {name: rows, **rows_by_group(rows, module.groups(name))}.items()
        }

    def output_directory(self, trainer: L.Trainer) -> Path:
        """Where files go."""
        return Path(trainer.default_root_dir) / user_path(self.directory or "")

    def writes(self, trainer: L.Trainer) -> bool:
        """Whether this run leaves files: a test does, a trial of it (``fast_dev_run``) and validation do not."""
        return trainer.testing and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def write_rows(self, trainer: L.Trainer, kind: str, gathered: Mapping[str, dict[str, Tensor]]) -> list[Path]:
        """Write ``KIND.csv``, or a ``KIND-SET.csv`` for each of several sets; returns the files, none in validation."""
        if not self.writes(trainer):
            return []
        names = [f"{kind}.csv" if len(gathered) == 1 else f"{kind}-{name}.csv" for name in gathered]
        written = [self.output_directory(trainer) / name for name in names]
        for path, rows in zip(written, gathered.values(), strict=True):
            if trainer.is_global_zero:
                write_csv(path, csv_columns(rows))
        return written

    @rank_zero_only
    def remove_others(self, trainer: L.Trainer, written: Collection[Path]) -> None:
        """Remove what an earlier test left in this callback's files: it would stand there as if it were of this one."""
        if self.writes(trainer):
            remove_files(self.output_directory(trainer), self.files, keep=written)

    @rank_zero_only
    def write_section(self, trainer: L.Trainer, section: Callable[[Source], Sections]) -> None:
        """Write a section of results.json, made from the hashes of the weights and the data that it is of."""
        if self.writes(trainer):
            module = cast(EvaluationModule, trainer.lightning_module)
            data: dict[str, str] = {}
            for i, loader in enumerate(evaluation_loaders(trainer)):
                name = module.set_name(i)
                data |= dict.fromkeys([name, *module.groups(name)], data_fingerprint(loader))
            weights = state_fingerprint(module.metric.encoder.state_dict())
            found = section({"weights_sha256": weights, "data_sha256": data})
            update_results(self.output_directory(trainer) / "results.json", found)
            self.sections.update(found)

    def _works(self, trainer: L.Trainer) -> bool:
        return trainer.testing or (self.validate and not trainer.sanity_checking)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = self._checked(pl_module)
        module.before_validation(partial(self._start, trainer, module))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, self._checked(pl_module))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._batch(trainer, pl_module, *args)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._batch(trainer, pl_module, *args)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, pl_module)

    def _checked(self, module: L.LightningModule) -> EvaluationModule:
        if not isinstance(module, EvaluationModule):
            raise LipsimError(
                f"{type(self).__name__} needs a stage of lipsim.training or an evaluation, got {type(module).__name__}"
            )
        return module

    def _start(self, trainer: L.Trainer, module: EvaluationModule) -> None:
        if self._works(trainer):
            self._check_alone(trainer)
            for name, metric in self.others.items():
                module.check_resizes(metric, name)
            with outside_inference_mode():
                # Callbacks of a test start before the module does; what they audit must be what it will evaluate.
                freeze(module.metric)
                self.tables, self.latest = {}, None
                self.begin(trainer, module)

    def _check_alone(self, trainer: L.Trainer) -> None:
        """Refuse another callback of this kind that would write to the same files.

        Raises:
            ValueError: there is one.
        """
        alike = [c for c in trainer.callbacks if type(c) is type(self)]  # type: ignore[attr-defined]
        directories = [callback.output_directory(trainer).absolute() for callback in alike]
        if trainer.testing and directories.count(self.output_directory(trainer).absolute()) > 1:
            raise LipsimError(
                f"several {type(self).__name__} write to {self.output_directory(trainer)}, and each would replace what "
                "the one before it found; give each its own directory"
            )

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
        if isinstance(batch, LabelledBatch) and self.batches is not LabelledBatch:
            raise LipsimError(
                f"{type(self).__name__} is about triplets, and these data have no triplets but images with labels; "
                "choose lipsim.callbacks.CertifyRetrieval, or other data"
            )
        if self._works(trainer) and isinstance(batch, self.batches):
            with outside_inference_mode():
                name = module.set_name(dataloader_idx)
                self.position = position = module.positions(batch, batch_idx, dataloader_idx)
                # Copying every image costs a tenth of embedding them.
                images = batch.clone() if self.differentiates else batch
                columns = self.see(trainer, module, evaluation["evaluated"], images, name)
            if columns:
                self.tables.setdefault(name, SampleTable()).append(batch.index, columns, position)
                self.latest = name, position, batch.index, columns

    def _end(self, trainer: L.Trainer, module: Any) -> None:
        if self._works(trainer):
            self.finish(trainer, module)


def log_score(module: EvaluationModule, name: str, score: float | None) -> None:
    """Log a score, if there is one."""
    if score is not None:
        module.log(name, score, sync_dist=True)


def cover_feature_error(trainer: L.Trainer, module: EvaluationModule, sample: int) -> None:
    """Certify with the error of the features that is found here, or declared, on whichever process it is larger.

    Args:
        trainer: of the evaluation.
        module: with the metric, to which the error is declared.
        sample: images of each set that the search looks at besides its own; 0: no search.
    """
    metric, found = module.metric, 0.0
    samples = [first_images(loader, sample) for loader in evaluation_loaders(trainer) if sample and num_samples(loader)]
    if samples and metric.has_bound:
        images = torch.cat(samples).to(module.device, metric.dtype)
        found = metric.measure_feature_error(images, thorough=True)
    declared, kind = metric.declared_feature_error, metric.feature_error_kind
    largest = torch.tensor(max(found, declared), dtype=torch.float64, device=module.device)
    metric.feature_error = float(trainer.strategy.reduce(largest, reduce_op="max"))
    metric.feature_error_kind = "searched" if metric.feature_error > declared else kind


def check_budgets(eps: Sequence[float]) -> list[float]:
    """Budgets that a table can have as its columns.

    Raises:
        ValueError: no list, an empty one, negative or infinite budgets, or not in ascending order.
    """
    if isinstance(eps, str | Real):
        raise LipsimError(f"expected budgets eps as a list of numbers, such as [36 / 255, 1.0], got {eps!r}")
    if not eps:
        raise LipsimError("expected at least one budget eps, got none")
    eps = [check_number("budget eps", e) for e in eps]
    if any(a >= b for a, b in pairwise(eps)):
        raise LipsimError(f"expected budgets eps in ascending order, each once, got {list(eps)}")
    return eps


def drawn_positions(module: EvaluationModule, i: int, count: int | None, seed: int) -> Tensor | None:
    """Positions of ``count`` triplets of a set, drawn at random, in order. Every process must call this.

    Args:
        module: of the evaluation.
        i: number of the set's loader.
        count: how many at most; None: all.
        seed: of the draw.

    Returns:
        None for all, or as nobody knows what the set serves.
    """
    shares = gather_objects(module.expected_positions(i))
    if count is None or any(share is None for share in shares):
        return None
    # Of what all processes serve, so that the draw does not depend on their number.
    served = torch.tensor(sorted(set().union(*shares)), dtype=torch.int64)
    order = torch.randperm(len(served), generator=torch.Generator().manual_seed(seed))
    return served[order[:count]].sort().values


def load_others(others: Mapping[str, Path] | None) -> dict[str, PerceptualMetric]:
    """Load the metrics that a callback compares with.

    Raises:
        ValueError: one of them is named "metric", as the module's own is in the results.
    """
    if "metric" in (others or {}):
        raise LipsimError("expected another name than 'metric' among others; the trained metric has it")
    return {name: load(path) for name, path in (others or {}).items()}


def first_images(loader: DataLoader[Any], count: int) -> Tensor:
    """About ``count`` images ``(M, 3, H, W)`` from the start of a loader's data set, whatever its sampler does.

    Of triplets all three images, references and candidates alike.
    """
    length = num_samples(loader)
    batch = read_batch(loader, list(range(min(-(-count // 3), length))))
    if not isinstance(batch, Triplet):
        batch = read_batch(loader, list(range(min(count, length))))
    return images_of(batch)
