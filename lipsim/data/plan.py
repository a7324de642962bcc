"""What a loader would serve on one process, each position of its data set once, and the share of several processes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
)

from lipsim.utils.errors import LipsimError
from lipsim.utils.files import sha256


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


def _chunks(positions: list[int], size: int) -> list[list[int]]:
    return [positions[i : i + size] for i in range(0, len(positions), size)]
