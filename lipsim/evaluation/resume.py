"""What is left to do of an evaluation that was cut short."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before Lightning, which imports matplotlib

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lipsim.data import Preprocess, TripletDataModule
from lipsim.data.contracts import Parts, facts_of
from lipsim.data.loading import Finished, data_fingerprint, remaining, served_resizes
from lipsim.data.plan import Plan, plan
from lipsim.evaluation.journal import KeepBatches
from lipsim.evaluation.module import EvaluationModule, check_resize, check_size, evaluation_names
from lipsim.metric import PerceptualMetric
from lipsim.results.file import contents, data_hashes
from lipsim.results.schema import Results, TripletCount
from lipsim.utils.errors import LipsimError


class RemainingData(L.LightningDataModule):
    """The test sets of a data module, shared among processes without the batches that an interrupted run has finished.

    Args:
        data: the data module.
        keep: knows what is finished.
        max_triplets: of each set, drawn with ``sample_seed``; None: all.
        sample_seed: of the draw.

    Attributes:
        test_names: names of the test sets, in the order of their loaders.
        triplets: by set, how many are evaluated, and how many there are.
        fingerprints: by set, of its triplets (:func:`lipsim.data.loading.data_fingerprint`).
    """

    def __init__(
        self,
        data: L.LightningDataModule,
        keep: KeepBatches,
        max_triplets: int | None = None,
        sample_seed: int = 0,
    ) -> None:
        super().__init__()
        self.data, self.keep = data, keep
        self.max_triplets, self.sample_seed = max_triplets, sample_seed
        self.test_names: list[str] = []
        self.triplets: dict[str, TripletCount] = {}
        self.fingerprints: dict[str, str] = {}
        self._own: Preprocess | None = None

    @property
    def test_groups(self) -> Mapping[str, Parts]:
        """By set, the parts that are scored apart as well."""
        return facts_of(self.data, "test").groups

    @property
    def preprocess(self) -> Preprocess | None:
        """How the data module resizes image files."""
        return facts_of(self.data, "test").preprocess

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Have the data module resize as the metric expects, where it was not told how.

        Raises:
            ValueError: it was told to resize in another way, or to another size.
        """
        expected = self._metric().preprocess
        if isinstance(self.data, TripletDataModule):
            self._own = self.preprocess
            self.data.follow(expected)
        size = getattr(self.data, "image_size", None)  # of images that are drawn
        if self.preprocess is not None:  # now, before anything is read
            check_resize(self._metric(), "the metric", {self.preprocess.way}, "data")
            size = self.preprocess.image_size
        if isinstance(size, int):
            check_size(self._metric(), size)
        if not facts_of(self.data, "test").tells_resize:
            rank_zero_info(
                f"{type(self.data).__name__} has no attribute preprocess that says how its images are resized; the "
                f"metric is for {expected.way!r}"
            )
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._unless_finished(self.data.on_before_batch_transfer, batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._unless_finished(self.data.transfer_batch_to_device, batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._unless_finished(self.data.on_after_batch_transfer, batch, dataloader_idx)

    @staticmethod
    def _unless_finished(hook: Callable[..., Any], batch: Any, *args: Any) -> Any:
        """What a hook of the data module makes of a batch, where it is one."""
        return batch if isinstance(batch, Finished) else hook(batch, *args)

    def _metric(self) -> PerceptualMetric:
        assert self.trainer is not None and isinstance(self.trainer.lightning_module, EvaluationModule)
        return self.trainer.lightning_module.metric

    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)
        if self._own is not None and isinstance(self.data, TripletDataModule):
            self.data.follow(self._own)  # what it does for others, a training for one

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One process's share of each test set, :class:`lipsim.data.loading.Finished` for what is finished.

        Raises:
            ValueError: loaders that do not say which triplets they serve, sets of one name, or nothing to evaluate.
        """
        trainer, found = self.trainer, self.data.test_dataloader()
        assert trainer is not None
        self.test_names = evaluation_names(facts_of(self.data, "test"), "test", found)
        loaders = dict(zip(self.test_names, tree_flatten(found)[0], strict=True))
        for name, loader in loaders.items():
            check_resize(self._metric(), "the metric", served_resizes(loader), name)
        plans = {name: self._plan(name, loader) for name, loader in loaders.items()}
        if not any(planned.batches for planned in plans.values()):
            raise LipsimError(
                f"{type(self.data).__name__} has no test triplets; choose data with a test set, and leave drop_last "
                "out where a set is smaller than a batch"
            )
        trainer.limit_test_batches = 1.0  # the plans have it
        self.triplets = {
            name: {"evaluated": len(planned.positions), "in_set": planned.num_samples}
            for name, planned in plans.items()
        }
        for name, count in self.triplets.items():
            if count["evaluated"] < count["in_set"]:
                rank_zero_info(f"evaluating {count['evaluated']} of {count['in_set']} triplets of {name}")
        fingerprints = {name: planned.fingerprint(data_fingerprint(loaders[name])) for name, planned in plans.items()}
        own = trainer.strategy.broadcast(fingerprints) == fingerprints
        if not trainer.strategy.reduce_boolean_decision(own, all=True):
            raise LipsimError("the processes see other triplets each; seed what chooses them in the data module")
        self.fingerprints = fingerprints
        finished = self.keep.open(trainer, fingerprints)
        return [
            remaining(loader, finished.get(name, set()), plans[name], trainer.global_rank, trainer.world_size)
            for name, loader in loaders.items()
        ]

    def _plan(self, name: str, loader: DataLoader[Any]) -> Plan:
        planned = plan(loader, name)
        if self.max_triplets is not None:
            planned = planned.sample(self.max_triplets, self.sample_seed)
        assert self.trainer is not None
        return planned.limit(self.trainer.limit_test_batches)


def is_of(results: Results, metric_sha256: str, weights_sha256: str, data: Mapping[str, str]) -> bool:
    """Whether every section of a results file is of this metric and these data, no more and no less, as it says.

    Args:
        results: contents of the file.
        metric_sha256: :func:`lipsim.evaluation.identity.metric_fingerprint`.
        weights_sha256: fingerprint of the encoder's weights alone.
        data: name of each set and part → its fingerprint.
    """
    own = {"metric_sha256": metric_sha256, "weights_sha256": weights_sha256}
    sections = contents(results).values()
    if any(section.get(key, sha256) != sha256 for section in sections for key, sha256 in own.items()):
        return False
    return all(dict(found) == dict(data) for found in data_hashes(results))
