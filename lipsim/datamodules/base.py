"""What the data modules share: loaders of one training set and of named evaluation sets."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lipsim.data import Preprocess, Triplet, TripletSet, collate_triplets
from lipsim.data.check import images_of
from lipsim.data.contracts import Implying, Parts, groups_of
from lipsim.data.device import BatchTransforms, batch_as_float
from lipsim.data.order import TrainingLoader, training_loader
from lipsim.data.registry import open_sets
from lipsim.data.skipping import NothingRead, PartlyRead, ReadableBatch, ReadableSamples
from lipsim.datamodules.skipped import SkippedSamples
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

OnError = Literal["fail", "skip"]


class TripletData(L.LightningDataModule):
    """Loaders of one training set and of named evaluation sets: a :class:`lipsim.data.TripletDataModule`.

    Args:
        batch_size: triplets in a batch of one process.
        num_workers: loading processes of each loader; sets that are in memory need none.
        image_size: side to which image files are resized; None: nothing is resized.
        resize: "float" or "pil", as in :class:`lipsim.data.Preprocess`; None: as the metric expects that is evaluated,
            and "float" where one is trained.
        framing: "stretch", "center-crop" or "pad", as in :class:`lipsim.data.Preprocess`; None: as the metric expects
            that is evaluated, and "stretch" where one is trained.
        eight_bit: have loaders serve images in eight bits where nothing is lost (packs, and files that are not resized
            in float), a quarter of the bytes from the workers to the device. There they become float32 in [0, 1], the
            same values to the last digit, before anything sees them.
        device_transforms: modules that change training batches there at random, such as torchvision's v2, see
            :class:`lipsim.data.device.BatchTransforms`. Draws depend on the seed that ``seed_everything`` was given,
            the epoch, the number of the batch and the process.
        on_error: what training does about a sample whose image is missing or cannot be read: "fail", with the name of
            the file, or "skip" it: its batch is shorter, and ``skipped.csv`` and the log of the run say so. Validation
            and tests always fail, since a score over fewer triplets is of another set.

    Attributes:
        preprocess: how image files are resized; None: no image is.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        image_size: int | None = None,
        resize: str | None = None,
        framing: str | None = None,
        eight_bit: bool = False,
        device_transforms: Sequence[nn.Module] | None = None,
        on_error: OnError = "fail",
    ) -> None:
        super().__init__()
        if on_error not in get_args(OnError):
            raise LipsimError(f"expected on_error to be one of {', '.join(get_args(OnError))}, got {on_error!r}")
        self.on_error, self.skipped = on_error, SkippedSamples()
        if batch_size < 1:
            raise LipsimError(f"expected a batch_size of at least 1, got {batch_size}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train_set: TripletSet | None = None
        self.val_sets: dict[str, TripletSet] = {}
        self.test_sets: dict[str, TripletSet] = {}
        self.collate: Callable[[Any], Any] = collate_triplets
        self.preprocess: Preprocess | None = None
        if image_size is not None:
            self.preprocess = Preprocess(
                image_size, "float" if resize is None else resize, "stretch" if framing is None else framing
            )
        self._told = resize, framing
        self._implied = False
        self.eight_bit = eight_bit
        self.device_transforms = BatchTransforms(device_transforms) if device_transforms else None

    def follow(self, preprocess: Preprocess) -> None:
        """Resize and frame as a metric expects, unless told otherwise when made; to be called before :meth:`setup`.

        Sets that were opened with another way of resizing are opened again then.
        """
        if self.preprocess is None:
            return
        resize, framing = self._told
        framing = preprocess.framing if framing is None else framing
        followed = Preprocess(
            self.preprocess.image_size,
            preprocess.resize if resize is None else resize,
            "stretch" if framing == "tiles" else framing,  # the metric cuts them itself
        )
        if followed.way != self.preprocess.way:
            self.preprocess = followed
            self.train_set, self.val_sets, self.test_sets, self._implied = None, {}, {}, False

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders."""
        return list(self.val_sets)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, in the order of their loaders."""
        return list(self.test_sets)

    @property
    def val_groups(self) -> Mapping[str, Parts]:
        """Parts of each validation set that are scored apart as well, see :attr:`test_groups`."""
        return {name: groups_of(dataset) for name, dataset in self.val_sets.items()}

    @property
    def test_groups(self) -> Mapping[str, Parts]:
        """Set name → part name → ``(N,)`` bool mask over the set: parts that are scored apart as well.

        The triplets of a set are evaluated once.
        """
        return {name: groups_of(dataset) for name, dataset in self.test_sets.items()}

    def _open(self, data: str, parts: Sequence[str], root: Path, **options: Any) -> dict[str, TripletSet]:
        """Parts of a set of :mod:`lipsim.data.registry` in a folder, resized as this module has it."""
        assert self.preprocess is not None
        images = self.preprocess
        return open_sets(
            data,
            parts,
            image_size=images.image_size,
            resize=images.resize,
            framing=images.framing,
            root=root,
            **options,
        )

    def _imply_votes(self, count: int, seed: int) -> None:
        """Have the training set's votes imply those of some more triplets of its images, once."""
        if not count or self._implied:
            return
        assert isinstance(self.train_set, Implying)
        trainer = self.trainer
        with Progress("implied votes", sys.stdout, trainer is None or trainer.is_global_zero) as progress:
            self.train_set = self.train_set.with_implied(count, seed=seed, progress=progress)
        self._implied = True

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch as floats in [0, 1]; in training, transformed."""
        batch = batch_as_float(batch)
        trainer = self.trainer
        if trainer is not None and trainer.training and self.device_transforms is not None:
            number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything was given, on every process
            batch = self.device_transforms(batch, (seed, trainer.current_epoch, number, trainer.global_rank))
        # As the trainer has it of batches of tensors that come as floats.
        return batch if trainer is None else trainer.precision_plugin.convert_input(batch)

    def train_dataloader(self) -> TrainingLoader:
        assert self.train_set is not None
        return self._training_loader(self.train_set, self.batch_size, self.collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(dataset) for dataset in self.val_sets.values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(dataset) for dataset in self.test_sets.values()]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch as it is; in training with ``on_error="skip"``, what could be read of it."""
        if self.trainer is not None and self.trainer.training and self.on_error == "skip":
            read, unread = batch if isinstance(batch, PartlyRead) else (batch, [])
            size = len(read) if isinstance(read, Triplet | NothingRead) else len(images_of(read))
            self.skipped.add(self.trainer, size + len(unread), unread)
            return read
        return batch

    def _training_loader(
        self, samples: TripletSet | Dataset[Any], batch_size: int | None, collate: Callable[[Any], Any]
    ) -> TrainingLoader:
        """Samples in an order of the run's seed, dealt out to its processes; see :mod:`lipsim.data.order`.

        The seed is the one that torch was given last; of several processes, the first one's.
        """
        trainer, seed = self.trainer, torch.initial_seed()
        dataset = cast(Dataset[Any], samples)  # of which a loader needs what the protocol has
        if self.on_error == "skip":
            dataset, collate = ReadableSamples(dataset), ReadableBatch(collate)
        return training_loader(
            dataset,
            batch_size,
            seed=seed if trainer is None else trainer.strategy.broadcast(seed),
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            num_workers=self.num_workers,
            collate=collate,
        )

    def _loader(self, triplets: TripletSet | Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(
            cast(Dataset[Any], triplets),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )


def check_names(own: Collection[str], others: Collection[str], what: str, option: str) -> None:
    """Refuse sets of another data module that are called like those of the one that they are scored beside.

    Args:
        own: names of that one.
        others: of the other.
        what: the former are, for the message.
        option: that the other is given as.

    Raises:
        ValueError: a name is one of both.
    """
    if shared := set(own) & set(others):
        raise LipsimError(
            f"{', '.join(sorted(shared))} is the name of {what} and of a set in {option}; give that another name"
        )


def as_fetched(batch: Any) -> Any:
    """The ``collate_fn`` of a set that returns whole batches already."""
    return batch
