"""Triplets alone, in batches and over shared images."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from lipsim.data import SharedTriplet, Triplet, collate_triplets


def _columns(batch: Triplet) -> tuple[Tensor, ...]:
    return batch.reference, batch.left, batch.right, batch.right_vote, batch.index


def _plain(batch: Triplet) -> Triplet:
    return Triplet(*_columns(batch))


@pytest.fixture
def shared(triplets: Triplet) -> SharedTriplet:
    return SharedTriplet(triplets.reference, torch.randint(12, (5, 3)), torch.rand(5), torch.arange(5))


def test_shared_images_are_those_of_plain_triplets(shared: SharedTriplet) -> None:
    plain = _plain(shared)
    assert len(shared) == len(plain) == 5 and len(shared.images()) == 1 and len(plain.images()) == 3
    for rows in (torch.tensor([3, 0, 0]), torch.arange(5) % 2 == 0):
        for a, b in zip(_columns(shared.select(rows)), _columns(plain.select(rows)), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(shared.embed(lambda x: x.flatten(1)), plain.embed(lambda x: x.flatten(1)), strict=True):
        assert torch.equal(a, b)


def test_copies_and_conversions_keep_the_kind(shared: SharedTriplet) -> None:
    for batch in (shared, _plain(shared)):
        double = batch.to(torch.float64)
        assert type(double) is type(batch) and double.left.dtype == torch.float64 and double.index.dtype == torch.int64
        for copied in (batch.clone(), pickle.loads(pickle.dumps(batch))):
            assert all(torch.equal(a, b) for a, b in zip(_columns(copied), _columns(batch), strict=True))
        copied = batch.clone()
        copied.images()[0].zero_()
        assert batch.images()[0].any()
        with pytest.raises(AttributeError):
            batch.reference = batch.left  # type: ignore[misc]


def test_single_triplets_are_stacked(triplets: Triplet) -> None:
    singles = [Triplet(*(column[i] for column in _columns(triplets))) for i in range(12)]
    for a, b in zip(_columns(collate_triplets(singles)), _columns(triplets), strict=True):
        assert torch.equal(a, b)
