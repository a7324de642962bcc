"""What loaders serve of their data sets: positions, fingerprints, and loaders that pass over what is finished.

The identity of a triplet is its set and its position in that set's data set. ``Triplet.index`` is what the data set
says, which in a ``Subset`` or a ``ConcatDataset`` is no position and may occur twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Sized
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
)

from lipsim.data.contracts import Listed, TripletSet, resizes_of
from lipsim.data.device import batch_as_float
from lipsim.data.labelled import LabelledBatch
from lipsim.data.plan import Plan, plan
from lipsim.data.triplet import Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import Digest

FINGERPRINT_SAMPLES = 32
_fingerprints: WeakKeyDictionary[DataLoader[Any], str] = WeakKeyDictionary()


class Finished:
    """Stands for a batch whose triplets are all finished, or that a process does not have while others do."""


class PlannedBatches(Dataset[Any]):
    """The batches of one process as a data set of batches, :class:`Finished` for those with nothing left to do.

    Batches with anything left to do are served whole: their composition, on which the last digits of features depend,
    stays that of an uninterrupted run.

    Args:
        loader: whose data set and ``collate_fn`` make the batches.
        batches: positions of each batch.
        expected: positions that all processes together serve.
        finished: positions that are finished.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        batches: list[list[int]],
        expected: Collection[int],
        finished: Collection[int],
    ) -> None:
        self.source, self.collate = loader.dataset, loader.collate_fn
        self.batches, self.expected, self.finished = batches, frozenset(expected), frozenset(finished)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        positions = self.batches[number]
        if self.finished.issuperset(positions):
            return Finished()
        return _read(self.source, self.collate, positions)


def remaining(
    loader: DataLoader[Any],
    finished: Collection[int],
    planned: Plan | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """A loader of one process's batches of a plan, which loads nothing for those that are finished.

    Args:
        loader: of the whole set.
        finished: positions.
        planned: what to serve; default all that the loader serves.
        rank: of the process.
        world_size: number of processes.
    """
    planned = plan(loader) if planned is None else planned
    whole = DataLoader(
        PlannedBatches(loader, planned.share(rank, world_size), planned.positions, finished),
        batch_size=None,
        num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers,
        prefetch_factor=loader.prefetch_factor,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        collate_fn=_as_it_is,
        pin_memory=loader.pin_memory,
    )
    _fingerprints[whole] = planned.fingerprint(data_fingerprint(loader))
    return whole


def planned_batches(loader: object) -> PlannedBatches | None:
    """What :func:`remaining` has a loader serve; None for any other loader."""
    dataset = loader.dataset if isinstance(loader, DataLoader) else None
    return dataset if isinstance(dataset, PlannedBatches) else None


def served_batches(loader: Any) -> list[list[int]] | None:
    """Positions that a loader serves on this process, batch by batch; None where only the loader itself knows."""
    planned = planned_batches(loader)
    if planned is not None:
        return planned.batches
    return list(loader.batch_sampler) if tells_positions(loader) else None


def tells_positions(loader: Any) -> bool:
    """Whether somebody other than the loader itself can know what it serves."""
    if not isinstance(loader, DataLoader):
        return False
    batches = loader.batch_sampler
    definite = type(batches) is BatchSampler and type(batches.sampler) in (SequentialSampler, DistributedSampler)
    return planned_batches(loader) is not None or (definite and loader.in_order)


def num_samples(loader: Any) -> int:
    """Size of the data set behind a loader.

    Raises:
        ValueError: it has none.
    """
    planned = planned_batches(loader)
    dataset = loader.dataset if isinstance(loader, DataLoader) else None
    dataset = dataset if planned is None else planned.source
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        raise LipsimError(
            f"expected a DataLoader over a Dataset with __len__ and __getitem__, got {type(loader).__name__} over "
            f"{type(dataset).__name__}; collect its triplets in one"
        )
    return len(dataset)


def served_resizes(loader: object) -> set[str]:
    """How the images that a loader serves are resized; empty where nothing is, or nobody says."""
    planned = planned_batches(loader)
    dataset = loader.dataset if isinstance(loader, DataLoader) else None
    return resizes_of(dataset if planned is None else planned.source)


def check_count(name: str, seen: Sequence[int], expected: Collection[int] | None) -> None:
    """Refuse results that are not of each triplet that a set should serve, once.

    Args:
        name: of the set.
        seen: position of each row; where nobody knows the positions, the index of each.
        expected: positions that were to be served; None: nobody knows, and each row must have its own index.

    Raises:
        ValueError: triplets are missing, there are others, or two have one index.
    """
    distinct = set(seen)
    if expected is None:
        if len(distinct) < len(seen):
            raise LipsimError(
                f"only {len(distinct)} of {len(seen)} triplets of {name} have an index of their own; serve the set "
                "in order (shuffle=False, no sampler), or give each triplet another index"
            )
    elif distinct != set(expected):
        missing, others = sorted(set(expected) - distinct), sorted(distinct - set(expected))
        raise LipsimError(
            f"expected results for {len(set(expected))} triplets of {name}, got {len(distinct)} (missing positions "
            f"{missing[:8]}, unexpected {others[:8]}); please report this"
        )


def fetch(dataset: TripletSet | Dataset[Any], indices: list[int]) -> Any:
    """What a loader hands to its ``collate_fn`` for a batch of positions."""
    together = getattr(dataset, "__getitems__", None)
    return together(indices) if together is not None else [dataset[i] for i in indices]


def read_batch(loader: DataLoader[Any], positions: list[int]) -> Any:
    """The batch at some positions of a loader's data set, whatever its sampler does and whatever is finished.

    Its images are floats, as they are on the device when the loader serves them in eight bits.

    Raises:
        ValueError: the loader has no positions.
    """
    planned = planned_batches(loader)
    if planned is not None:
        return batch_as_float(_read(planned.source, planned.collate, positions))
    if loader.batch_sampler is None:
        raise LipsimError("a loader with batch_size=None has no positions to read at; give it a batch_size")
    return batch_as_float(_read(loader.dataset, loader.collate_fn, positions))


def data_fingerprint(loader: DataLoader[Any]) -> str:
    """SHA-256 over a set of triplets: its length, its manifest, images and votes of up to 32 triplets, evenly spaced.

    Of labelled images likewise, with their labels in place of votes.

    A set that can say what it consists of without reading every image has a method ``manifest()`` that returns lines
    of text: names of files, votes. Two sets with one manifest and other images at all of the places looked at are not
    told apart.
    """
    if loader not in _fingerprints:
        count = num_samples(loader)
        digest = Digest()
        digest.add(str(count))
        for line in _manifest(loader.dataset):
            digest.add(f"{line}\n")
        for i in torch.linspace(0, max(count - 1, 0), min(count, FINGERPRINT_SAMPLES)).long().tolist():
            batch = read_batch(loader, [i])
            if isinstance(batch, Triplet):
                for tensor in (batch.reference, batch.left, batch.right, batch.right_vote, batch.index):
                    digest.add_tensor(tensor)
            elif isinstance(batch, LabelledBatch):
                for tensor in (batch.images, batch.label, batch.index):
                    digest.add_tensor(tensor)
        _fingerprints[loader] = digest.hexdigest()
    return _fingerprints[loader]


def _manifest(dataset: Dataset[Any]) -> Sequence[str]:
    """Lines that say what a set consists of, through torch's subsets and concatenations."""
    if isinstance(dataset, Listed):
        return dataset.manifest()
    if isinstance(dataset, Subset):
        return [f"{list(map(int, dataset.indices))} of", *_manifest(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [line for part in dataset.datasets for line in (f"{len(part)} of", *_manifest(part))]  # type: ignore[arg-type]
    return []


def _read(dataset: Dataset[Any], collate: Any, positions: list[int]) -> Any:
    """A batch that has a triplet for each position.

    Raises:
        ValueError: the ``collate_fn`` drops or adds some.
    """
    batch = collate(fetch(dataset, positions))
    if isinstance(batch, Triplet) and len(batch) != len(positions):
        raise LipsimError(
            f"expected {len(positions)} triplets at positions {positions[:8]}… of the data set, its collate_fn "
            f"returned {len(batch)}; leave unwanted triplets out of the data set (torch.utils.data.Subset)"
        )
    return batch


def _as_it_is(batch: Any) -> Any:
    return batch
