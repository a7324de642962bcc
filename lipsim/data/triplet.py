"""The two-alternative forced-choice (2AFC) triplet, alone and in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lipsim.data.eight_bit import stack_images

Split = Literal["train", "val", "test"]


class Triplet:
    """One 2AFC judgement, or a batch of N: which of two candidates looks more like the reference?

    Args:
        reference: images ``(N, 3, H, W)``, float in [0, 1]; ``(3, H, W)`` for a single triplet.
        left: the first candidates, same shape.
        right: the second candidates, same shape.
        right_vote: ``(N,)`` float in [0, 1], the fraction of judges who chose right; 0.5 is a tied vote.
        index: ``(N,)`` int64, the number by which the data set knows each triplet. Tables show it and random numbers of
            attacks depend on it. Results tell triplets apart by their set and their position there, which is the index
            unless the set is a ``Subset`` or a ``ConcatDataset``.

    Example:
        >>> images = (torch.rand(5, 3, 8, 8) for _ in range(3))
        >>> batch = Triplet(*images, right_vote=torch.tensor([0.0, 1.0, 0.5, 0.2, 0.8]), index=torch.arange(5))
        >>> len(batch), len(batch.images())
        (5, 3)
    """

    def __init__(self, reference: Tensor, left: Tensor, right: Tensor, right_vote: Tensor, index: Tensor) -> None:
        self._images = (reference, left, right)
        self.right_vote = right_vote
        self.index = index

    @property
    def reference(self) -> Tensor:
        return self._images[0]

    @property
    def left(self) -> Tensor:
        return self._images[1]

    @property
    def right(self) -> Tensor:
        return self._images[2]

    def __len__(self) -> int:
        return len(self.index)

    def images(self) -> tuple[Tensor, ...]:
        """The image tensors that this batch holds, none of them twice."""
        return self._images

    def embed(self, encoder: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features of reference, left and right, ``(N, D)`` each, from one call of the encoder."""
        return self.arrange(encoder(torch.cat(self._images)))

    def arrange(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of reference, left and right, ``(N, D)`` each, from those of all :meth:`images` in their order."""
        z, z0, z1 = features.chunk(3)
        return z, z0, z1

    def map_images(self, function: Callable[[Tensor], Tensor]) -> Triplet:
        """The same triplets with a function of each of :meth:`images`."""
        reference, left, right = map(function, self._images)
        return Triplet(reference, left, right, self.right_vote, self.index)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every tensor, as ``Tensor.to`` does; a dtype changes floating-point tensors only."""
        return self._map(lambda tensor: _to(tensor, *args, **kwargs))

    def select(self, rows: Tensor) -> Triplet:
        """Some of the triplets, by a mask or by positions."""
        parts = (self.reference, self.left, self.right, self.right_vote, self.index)
        return Triplet(*(part[rows] for part in parts))

    def clone(self) -> Self:
        """A copy of every tensor."""
        return self._map(Tensor.clone)

    def pin_memory(self) -> Self:
        """Copies in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*map(function, (*self._images, self.right_vote, self.index)))


class SharedTriplet(Triplet):
    """A batch of triplets over few distinct images: each image is stored, moved and embedded once.

    Args:
        distinct: ``(M, 3, H, W)`` images.
        ids: ``(N, 3)`` int64, rows of ``distinct``: reference, left, right.
        right_vote: ``(N,)``, as in :class:`Triplet`.
        index: ``(N,)``, as in :class:`Triplet`.
    """

    def __init__(self, distinct: Tensor, ids: Tensor, right_vote: Tensor, index: Tensor) -> None:
        # Not Triplet.__init__, which keeps three images of each triplet: here they are made when asked for.
        self.distinct, self.ids = distinct, ids
        self.right_vote, self.index = right_vote, index

    @property
    def reference(self) -> Tensor:
        return self.distinct[self.ids[:, 0]]

    @property
    def left(self) -> Tensor:
        return self.distinct[self.ids[:, 1]]

    @property
    def right(self) -> Tensor:
        return self.distinct[self.ids[:, 2]]

    def images(self) -> tuple[Tensor, ...]:
        return (self.distinct,)

    def embed(self, encoder: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.arrange(encoder(self.distinct))

    def arrange(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return arranged(features, self.ids)

    def map_images(self, function: Callable[[Tensor], Tensor]) -> SharedTriplet:
        return SharedTriplet(function(self.distinct), self.ids, self.right_vote, self.index)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*map(function, (self.distinct, self.ids, self.right_vote, self.index)))


def arranged(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(M, …)`` of distinct images as those of references, left and right candidates, ``(N, …)`` each.

    Args:
        rows: what there is of each image, such as its features.
        ids: ``(N, 3)`` int64, as in :class:`SharedTriplet`.
    """
    reference, left, right = ids.unbind(1)
    return rows[reference], rows[left], rows[right]


def collate_triplets(samples: list[Triplet]) -> Triplet:
    """Stack single triplets into a batch (a ``collate_fn``)."""
    return Triplet(
        stack_images([sample.reference for sample in samples]),
        stack_images([sample.left for sample in samples]),
        stack_images([sample.right for sample in samples]),
        torch.stack([sample.right_vote for sample in samples]),
        torch.stack([sample.index for sample in samples]),
    )


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(*args, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    return tensor.to(*(arg for arg in args if not isinstance(arg, torch.dtype)), **kwargs)
