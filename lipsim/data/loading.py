"""Reading data sets by position: fingerprints, and loaders that pass over what an interrupted run has finished."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipsim.data.triplet import Triplet

FINGERPRINT_SAMPLES = 32
_fingerprints: WeakKeyDictionary[DataLoader[Any], str] = WeakKeyDictionary()


class Finished:
    """Stands for a batch whose triplets are all finished."""


class RemainingTriplets(Dataset[Any]):
    """A data set that answers with :class:`Finished` where every triplet asked for is finished.

    Batches with anything left to do are served whole: their composition, on which the last digits of features depend,
    stays that of an uninterrupted run.

    Args:
        dataset: the whole set.
        finished: positions in it.
    """

    def __init__(self, dataset: Dataset[Any], finished: Collection[int]) -> None:
        self.dataset, self.finished = dataset, frozenset(finished)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch for the given positions, or :class:`Finished`."""
        return Finished() if self.finished.issuperset(indices) else fetch(self.dataset, indices)


def remaining(loader: DataLoader[Any], finished: Collection[int]) -> DataLoader[Any]:
    """A loader of the same batches, in the order of the data set, that loads nothing for those that are finished."""
    whole = DataLoader(
        RemainingTriplets(loader.dataset, finished),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers,
        prefetch_factor=loader.prefetch_factor,
        worker_init_fn=loader.worker_init_fn,
        collate_fn=partial(_collate, loader.collate_fn),
        pin_memory=loader.pin_memory,
    )
    _fingerprints[whole] = data_fingerprint(loader)
    return whole


def fetch(dataset: Dataset[Any], indices: list[int]) -> Any:
    """What a loader hands to its ``collate_fn`` for a batch of positions."""
    together = getattr(dataset, "__getitems__", None)
    return together(indices) if together is not None else [dataset[i] for i in indices]


def read_batch(loader: DataLoader[Any], indices: list[int]) -> Any:
    """The batch at some positions of a loader's data set, whatever its sampler does and whatever is finished."""
    dataset = loader.dataset
    return loader.collate_fn(fetch(dataset.dataset if isinstance(dataset, RemainingTriplets) else dataset, indices))


def data_fingerprint(loader: DataLoader[Any]) -> str:
    """SHA-256 over a set of triplets: its length, its manifest, images and votes of up to 32 triplets, evenly spaced.

    A set that can say what it consists of without reading every image has a method ``manifest()`` that returns lines
    of text: names of files, votes. Two sets with one manifest and other images at all of the places looked at are not
    told apart.
    """
    if loader not in _fingerprints:
        count = len(loader.dataset)  # type: ignore[arg-type]
        digest = hashlib.sha256(str(count).encode())
        for line in getattr(loader.dataset, "manifest", list)():
            digest.update(f"{line}\n".encode())
        for i in torch.linspace(0, max(count - 1, 0), min(count, FINGERPRINT_SAMPLES)).long().tolist():
            batch = read_batch(loader, [i])
            if isinstance(batch, Triplet):
                for tensor in (batch.reference, batch.left, batch.right, batch.right_vote, batch.index):
                    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                    digest.update(_bytes(tensor))
        _fingerprints[loader] = digest.hexdigest()
    return _fingerprints[loader]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _collate(collate: Any, batch: Any) -> Any:
    return batch if isinstance(batch, Finished) else collate(batch)
