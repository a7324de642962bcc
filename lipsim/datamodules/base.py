"""What the data modules share: loaders of one training set and of named evaluation sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipsim.data import collate_triplets
from lipsim.utils.errors import LipsimError


class TripletData(L.LightningDataModule):
    """Loaders of one training set and of named evaluation sets.

    Args:
        batch_size: triplets in a batch of one process.
        num_workers: loading processes of each loader; sets that are in memory need none.
    """

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise LipsimError(f"expected a batch_size of at least 1, got {batch_size}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train_set: Dataset[Any] | None = None
        self.val_sets: dict[str, Dataset[Any]] = {}
        self.test_sets: dict[str, Dataset[Any]] = {}
        self.collate: Callable[[Any], Any] = collate_triplets

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders."""
        return list(self.val_sets)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, in the order of their loaders."""
        return list(self.test_sets)

    @property
    def val_groups(self) -> dict[str, dict[str, Tensor]]:
        """Parts of each validation set that are scored apart as well, see :attr:`test_groups`."""
        return {name: getattr(dataset, "groups", {}) for name, dataset in self.val_sets.items()}

    @property
    def test_groups(self) -> dict[str, dict[str, Tensor]]:
        """Set name → part name → ``(N,)`` bool mask over the set: parts that are scored apart as well.

        A set that has parts says so by an attribute ``groups``. Its triplets are evaluated once.
        """
        return {name: getattr(dataset, "groups", {}) for name, dataset in self.test_sets.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.train_set is not None
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(dataset) for dataset in self.val_sets.values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(dataset) for dataset in self.test_sets.values()]

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        share = len(dataset) // processes  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and share >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )
