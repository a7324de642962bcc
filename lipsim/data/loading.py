"""Which positions of its data set a loader serves: plans, fingerprints, and loaders that pass over what is finished.

The identity of a triplet is its set and its position in that set's data set. ``Triplet.index`` is what the data set
says, which in a ``Subset`` or a ``ConcatDataset`` is no position and may occur twice.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
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
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lipsim.data.triplet import Triplet
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import Digest, sha256

FINGERPRINT_SAMPLES = 32
_fingerprints: WeakKeyDictionary[DataLoader[Any], str] = WeakKeyDictionary()


class Finished:
    """Stands for a batch whose triplets are all finished, or that a process does not have while others do."""


@dataclass(frozen=True)
class Plan:
    """What an evaluation serves of a loader, each position once, whatever the number of processes.

    Attributes:
        batches: positions as one process serves them, batch by batch.
        batch_size: of one process; None: the batches are those of a batch sampler and stay together.
        num_samples: size of the data set.
    """

    batches: list[list[int]]
    batch_size: int | None
    num_samples: int

    @property
    def positions(self) -> list[int]:
        """All that is served, in its order."""
        return [position for batch in self.batches for position in batch]

    def limit(self, batches: int | float) -> Plan:
        """The first batches, a number or a share of them, as ``Trainer(limit_test_batches=…)`` counts on one process.

        Raises:
            ValueError: that leaves none.
        """
        count = batches if isinstance(batches, int) else int(batches * len(self.batches))
        if self.batches and count < 1:
            raise LipsimError(f"limit_test_batches = {batches} leaves none of {len(self.batches)} batches; raise it")
        return Plan(self.batches[:count], self.batch_size, self.num_samples)

    def sample(self, most: int, seed: int) -> Plan:
        """At most so many positions, drawn with a seed and in their order; a larger draw contains a smaller one."""
        positions = self.positions
        drawn = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:most].sort().values
        chosen = [positions[i] for i in drawn.tolist()]
        if self.batch_size is not None:
            return Plan(_chunks(chosen, self.batch_size), self.batch_size, self.num_samples)
        kept = set(chosen)
        batches = [[position for position in batch if position in kept] for batch in self.batches]
        return Plan([batch for batch in batches if batch], None, self.num_samples)

    def share(self, rank: int, world_size: int) -> list[list[int]]:
        """Batches of one process, as many on each: the last may be empty. No position is on two of them."""
        if self.batch_size is None:
            own = self.batches[rank::world_size]
            count = -(-len(self.batches) // world_size)
        else:
            positions = self.positions
            own = _chunks(positions[rank::world_size], self.batch_size)
            count = -(-len(positions[::world_size]) // self.batch_size)
        return [*own, *([] for _ in range(count - len(own)))]

    def fingerprint(self, data: str) -> str:
        """That of the data, and of what is chosen of them where that is not the whole set."""
        chosen = sorted(self.positions)
        if chosen == list(range(self.num_samples)):
            return data
        return sha256(f"{data} {chosen}")


def plan(loader: DataLoader[Any], name: str = "the loader") -> Plan:
    """What a loader would serve on one process; a random order of a definite choice becomes the order of the set.

    Args:
        loader: over a data set with positions; own samplers and batch samplers are followed, ``drop_last`` too.
        name: of the set, for errors.

    Raises:
        ValueError: a loader without positions, or whose samplers serve one of them twice, other ones each time, or the
            share of one process only.
    """
    if not isinstance(loader, DataLoader):
        raise LipsimError(
            f"expected a DataLoader for {name}, got {type(loader).__name__}; give one loader for each set"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise LipsimError(
            f"{name} is an IterableDataset ({type(loader.dataset).__name__}), whose triplets have no positions to "
            "continue at or to share among processes; collect them in a Dataset with __len__ and __getitem__"
        )
    sampler = loader.batch_sampler
    if sampler is None:
        raise LipsimError(
            f"the loader of {name} has batch_size=None, so that its triplets have no positions; give it a batch_size, "
            "and the data set __getitems__ where it makes whole batches"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    for inner in (sampler, getattr(sampler, "sampler", None)):
        if isinstance(inner, DistributedSampler) and inner.num_replicas > 1:
            raise LipsimError(
                f"the {type(inner).__name__} of {name} serves a share of its triplets; leave it out: they are shared "
                "among processes without it"
            )
    if type(sampler) is BatchSampler:
        order = _order(sampler.sampler, size, name)
        batches = _chunks(order, sampler.batch_size)
        if sampler.drop_last and batches and len(batches[-1]) < sampler.batch_size:
            batches.pop()
        return Plan(batches, sampler.batch_size, size)
    return Plan(_own_batches(sampler, size, name), None, size)


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


def served_batches(loader: Any) -> list[list[int]] | None:
    """Positions that a loader serves on this process, batch by batch; None where only the loader itself knows."""
    if not tells_positions(loader):
        return None
    return loader.dataset.batches if isinstance(loader.dataset, PlannedBatches) else list(loader.batch_sampler)


def tells_positions(loader: Any) -> bool:
    """Whether somebody other than the loader itself can know what it serves."""
    if not isinstance(loader, DataLoader):
        return False
    batches = loader.batch_sampler
    definite = type(batches) is BatchSampler and type(batches.sampler) in (SequentialSampler, DistributedSampler)
    return isinstance(loader.dataset, PlannedBatches) or (definite and getattr(loader, "in_order", True))


def num_samples(loader: Any) -> int:
    """Size of the data set behind a loader.

    Raises:
        ValueError: it has none.
    """
    dataset = getattr(loader, "dataset", None)
    dataset = dataset.source if isinstance(dataset, PlannedBatches) else dataset
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        raise LipsimError(
            f"expected a DataLoader over a Dataset with __len__ and __getitem__, got {type(loader).__name__} over "
            f"{type(dataset).__name__}; collect its triplets in one"
        )
    return len(dataset)  # type: ignore[arg-type]


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


def fetch(dataset: Dataset[Any], indices: list[int]) -> Any:
    """What a loader hands to its ``collate_fn`` for a batch of positions."""
    together = getattr(dataset, "__getitems__", None)
    return together(indices) if together is not None else [dataset[i] for i in indices]


def read_batch(loader: DataLoader[Any], positions: list[int]) -> Any:
    """The batch at some positions of a loader's data set, whatever its sampler does and whatever is finished.

    Raises:
        ValueError: the loader has no positions.
    """
    if isinstance(loader.dataset, PlannedBatches):
        return _read(loader.dataset.source, loader.dataset.collate, positions)
    if loader.batch_sampler is None:
        raise LipsimError("a loader with batch_size=None has no positions to read at; give it a batch_size")
    return _read(loader.dataset, loader.collate_fn, positions)


def data_fingerprint(loader: DataLoader[Any]) -> str:
    """SHA-256 over a set of triplets: its length, its manifest, images and votes of up to 32 triplets, evenly spaced.

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
        _fingerprints[loader] = digest.hexdigest()
    return _fingerprints[loader]


def _manifest(dataset: Dataset[Any]) -> Sequence[str]:
    """Lines that say what a set consists of, through torch's subsets and concatenations."""
    if hasattr(dataset, "manifest"):
        lines: Sequence[str] = dataset.manifest()
        return lines
    if isinstance(dataset, Subset):
        return [f"{list(map(int, dataset.indices))} of", *_manifest(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [line for part in dataset.datasets for line in (f"{len(part)} of", *_manifest(part))]  # type: ignore[arg-type]
    return []


def _order(sampler: Iterable[Any], size: int, name: str) -> list[int]:
    """Positions that a sampler serves, each once; where their order is random, the order of the set."""
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == size:
        return list(range(size))
    first, second = (_positions(islice(iter(sampler), size + 1), size, name) for _ in range(2))
    if set(first) != set(second):
        raise LipsimError(
            f"the {type(sampler).__name__} of {name} serves other triplets each time; serve the set without it, or a "
            "torch.utils.data.Subset of it"
        )
    _check_distinct(first, sampler, name)
    return first if first == second else sorted(first)


def _own_batches(sampler: Iterable[Any], size: int, name: str) -> list[list[int]]:
    """Batches of a user's batch sampler."""
    first, second = ([_positions(batch, size, name) for batch in islice(iter(sampler), size + 1)] for _ in range(2))
    if sorted(first) != sorted(second):
        raise LipsimError(
            f"the {type(sampler).__name__} of {name} makes other batches each time; switch its shuffling off, or give "
            "the loader a batch_size"
        )
    _check_distinct([position for batch in first for position in batch], sampler, name)
    return [batch for batch in (first if first == second else sorted(first)) if batch]


def _positions(values: Iterable[Any], size: int, name: str) -> list[int]:
    try:
        positions = [operator.index(value) for value in values]
    except TypeError as error:
        raise LipsimError(f"expected positions (whole numbers) from the sampler of {name}; {error}") from error
    outside = [position for position in positions if not 0 <= position < size]
    if outside:
        raise LipsimError(f"expected positions from 0 to {size - 1} from the sampler of {name}, got {outside[:8]}")
    return positions


def _check_distinct(positions: Sequence[int], sampler: Iterable[Any], name: str) -> None:
    seen: set[int] = set()
    repeated = [p for p in positions if p in seen or seen.add(p)]  # type: ignore[func-returns-value]
    if repeated:
        raise LipsimError(
            f"the {type(sampler).__name__} of {name} serves positions {repeated[:8]} more than once, and a score "
            "counts each triplet once; serve the set without it, or a torch.utils.data.Subset of it"
        )


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


def _chunks(positions: list[int], size: int) -> list[list[int]]:
    return [positions[i : i + size] for i in range(0, len(positions), size)]


def _as_it_is(batch: Any) -> Any:
    return batch
