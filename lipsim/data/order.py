"""The order of training data: a function of seed and epoch alone, whichever process serves what, and from wherever.

A sample's random numbers are found likewise, from seed, epoch and position of the sample: :meth:`TrainingOrder.keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import key_of, subkeys

# Numbers of a sample's keys, one for each thing that is drawn for it.
VIEW, REFLECTION, JITTER, ATTACK, IMAGES = range(5)
_ORDER, _SAMPLES, _BATCHES = range(3)  # numbers of an epoch's keys


class Place(int):
    """A position in a data set that knows the key of the sample's random numbers in this epoch.

    To a data set that draws nothing it is a whole number; loading processes that outlive an epoch need no word of it.
    """

    key: int

    def __new__(cls, position: int, key: int) -> Self:
        place = super().__new__(cls, position)
        place.key = key
        return place

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.key


class TrainingOrder(DistributedSampler[Any]):
    """Serves a data set in a random order of its own in each epoch, dealt out to any number of processes.

    The processes take turns, a sample each: their batches of one number are together the next ``batch_size`` times
    ``world_size`` samples of the order, so that a global batch is the same samples however it is spread. What does not
    fill the last one is left out; these are other samples in each epoch. A set smaller than one global batch is served
    whole, by processes that may differ by one sample. Nothing is served twice in an epoch.

    An epoch may begin at any of its samples (:meth:`continue_at`), where training has been broken off, also with
    another number of processes or another batch size.

    Args:
        dataset: of what :func:`len` gives samples.
        batch_size: samples in a batch of one process.
        seed: of the order.
        rank: of the process.
        world_size: number of processes.

    Raises:
        ValueError: fewer samples than processes.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.size = len(dataset)  # type: ignore[arg-type]
        if self.size < world_size:
            raise LipsimError(
                f"expected at least one training sample a process, got {self.size} for {world_size} processes; train "
                "on fewer of them"
            )
        self.start = 0
        self._permutation: tuple[int, int, Tensor] | None = None  # of a seed and an epoch

    @property
    def global_batch(self) -> int:
        """Samples that all processes together take at a time."""
        return self.batch_size * self.num_replicas

    @property
    def served(self) -> int:
        """Samples that all processes together serve in an epoch."""
        return self.size - self.size % self.global_batch if self.size >= self.global_batch else self.size

    @property
    def num_batches(self) -> int:
        """Batches of each process in an epoch."""
        return -(-self.served // self.global_batch)

    @property
    def first_batch(self) -> int:
        """Number of the batch that this epoch begins with: so many are left out that the last has its usual number."""
        return self.num_batches - -(-self._left // self.global_batch)

    @property
    def _left(self) -> int:
        """Samples that all processes together serve in this epoch yet, from its start on."""
        if self.start == 0:
            return self.served
        left = self.size - self.start
        return left - left % self.global_batch

    def __len__(self) -> int:
        """Samples of this process in an epoch that begins at its beginning."""
        return len(range(self.rank, self.served, self.num_replicas))

    def __iter__(self) -> Iterator[Place]:
        positions = self._own()
        for position, key in zip(positions.tolist(), self.keys(positions).tolist(), strict=True):
            yield Place(position, key)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; at its beginning, unless it is the one that :meth:`continue_at` named."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def continue_at(self, epoch: int, samples: int) -> None:
        """Begin an epoch after so many samples that all processes together have taken of it."""
        self.epoch, self.start = epoch, min(samples, self.size)

    def samples_before(self, batch: int) -> int:
        """Samples of the epoch that are taken when batch ``batch`` of this epoch begins."""
        return min(self.start + (batch - self.first_batch) * self.global_batch, self.size)

    def positions(self, batch: int) -> Tensor:
        """Positions in the data set of a batch of this process, ``(N,)`` int64."""
        first = (batch - self.first_batch) * self.batch_size
        return self._own()[first : first + self.batch_size]

    def keys(self, positions: Tensor) -> Tensor:
        """The keys of samples in this epoch, int64 like the positions; see :func:`lipsim.utils.sampling.subkeys`."""
        return subkeys(self._key(_SAMPLES), positions)

    def batch_key(self, batch: int) -> Tensor:
        """The key of a global batch, scalar int64: the same on each of its processes, and however many these are."""
        return subkeys(self._key(_BATCHES), self.samples_before(batch))

    def _own(self) -> Tensor:
        return self._order()[self.start : self.start + self._left][self.rank :: self.num_replicas]

    def _order(self) -> Tensor:
        if self._permutation is None or self._permutation[:2] != (self.seed, self.epoch):
            generator = torch.Generator().manual_seed(int(self._key(_ORDER)))
            self._permutation = self.seed, self.epoch, torch.randperm(self.size, generator=generator)
        return self._permutation[2]

    def _key(self, number: int) -> Tensor:
        return subkeys(subkeys(key_of(self.seed), self.epoch), number)


class TrainingLoader(DataLoader[Any]):
    """A loader whose sampler is a :class:`TrainingOrder`; :func:`training_loader` makes it.

    Attributes:
        batch: number of the batch that was served last; None before the first of an epoch.
    """

    batch: int | None = None

    @property
    def order(self) -> TrainingOrder | None:
        """The sampler; None where another has taken its place, as under ``Trainer(overfit_batches=…)``."""
        return self.sampler if isinstance(self.sampler, TrainingOrder) else None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches. Nothing is read before the first is asked for: by then the epoch and its start are known.

        (Lightning 2.6 makes the iterator of a resumed epoch before it has restored which epoch that is.)
        """
        order, self.batch = self.order, None
        first = 0 if order is None else order.first_batch
        for number, batch in enumerate(super().__iter__(), first):
            self.batch = number
            yield batch

    def positions(self) -> Tensor | None:
        """Positions in the data set of the batch that was served last, ``(N,)`` int64; None where nobody knows."""
        return None if self.order is None or self.batch is None else self.order.positions(self.batch)

    def state_dict(self) -> dict[str, int]:
        """Where the epoch is, after the batch that was served last; for training loops that save it themselves."""
        order = self.order
        if order is None:
            return {}
        samples = order.start if self.batch is None else order.samples_before(self.batch + 1)
        return {"seed": order.seed, "epoch": order.epoch, "samples": samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there: the next epoch that is begun, if it is that one, begins after these samples."""
        if self.order is not None and state:
            self.order.seed = state["seed"]
            self.order.continue_at(state["epoch"], state["samples"])


def training_loader(
    dataset: Dataset[Any],
    batch_size: int | None,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
) -> TrainingLoader:
    """A loader for training, in an order that depends on seed and epoch alone.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        batch_size: samples in a batch of one process; None: each item of the data set is a batch.
        seed: of the order.
        rank: of the process.
        world_size: number of processes.
        num_workers: loading processes; they stay from one epoch to the next.
        collate: the ``collate_fn``.
    """
    order = TrainingOrder(dataset, batch_size or 1, seed=seed, rank=rank, world_size=world_size)
    return TrainingLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
