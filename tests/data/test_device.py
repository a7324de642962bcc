"""Images in eight bits are the same numbers, and transforms on the device draw for a batch and for nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from lipsim.data import SharedTriplet, Triplet, collate_triplets
from lipsim.data.device import BatchTransforms, batch_as_float
from lipsim.data.eight_bit import as_float, eight_bit, stack_images
from lipsim.data.embeddings.folder import EmbeddedImages

MOVES = BatchTransforms([v2.RandomResizedCrop(16, scale=(0.3, 0.9)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.9)])


def test_every_8_bit_value_is_its_float_and_comes_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    floats = as_float(pixels)
    assert floats.dtype == torch.float32 and torch.equal(floats, pixels.float() / 255)
    assert torch.equal(eight_bit(floats), pixels) and as_float(floats) is floats
    finer = floats.clone()
    finer[0, 0, 1] = torch.nextafter(finer[0, 0, 1], torch.tensor(1.0))
    assert eight_bit(finer) is finer
    assert stack_images([pixels, pixels]).dtype == torch.uint8
    assert torch.equal(stack_images([pixels, finer]), torch.stack([floats, finer]))


def test_the_images_of_every_kind_of_batch_become_floats(triplets: Triplet) -> None:
    pixels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    votes, index = torch.rand(2), torch.arange(2)
    plain = Triplet(*pixels.split(2), votes, index)
    shared = SharedTriplet(pixels, torch.tensor([[0, 1, 2], [3, 4, 5]]), votes, index)
    for batch in (plain, shared):
        floats = batch_as_float(batch)
        assert type(floats) is type(batch) and floats.index is index
        for images, given in zip(floats.images(), batch.images(), strict=True):
            assert torch.equal(images, given.float() / 255)
    embedded = batch_as_float(EmbeddedImages(pixels, votes))
    assert isinstance(embedded, EmbeddedImages) and torch.equal(embedded.images, pixels.float() / 255)
    labels = torch.zeros(6, dtype=torch.uint8)
    images, same = batch_as_float([pixels, labels])
    assert torch.equal(images, pixels.float() / 255) and same is labels
    nothing = object()
    assert batch_as_float(nothing) is nothing and MOVES(nothing, (0,)) is nothing
    mixed = collate_triplets([Triplet(*pixels[:3], votes[0], index[0]), Triplet(*images[3:], votes[1], index[1])])
    assert torch.equal(torch.stack(mixed.images()), torch.stack([images[[0, 3]], images[[1, 4]], images[[2, 5]]]))


def _images(batch: Any) -> Tensor:
    return torch.cat(batch.images()) if isinstance(batch, Triplet) else batch


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x,
        lambda x: Triplet(x, x, x, torch.zeros(len(x)), torch.arange(len(x))),
        lambda x: SharedTriplet(x, torch.arange(3)[None], torch.zeros(1), torch.arange(1)),
    ],
)
def test_transforms_are_a_function_of_the_key(of: Callable[[Tensor], Any]) -> None:
    images = torch.rand(20, 3, 16, 16)
    state = torch.get_rng_state()
    first, again, other = (_images(MOVES(of(images), key)) for key in ((0, 1, 2, 0), (0, 1, 2, 0), (0, 1, 2, 1)))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == _images(of(images)).shape and 0 <= first.min() and first.max() <= 1
    assert not torch.equal(first, _images(of(images)))


def test_the_images_of_a_triplet_move_alike_and_triplets_apart() -> None:
    image = torch.rand(1, 3, 16, 16)
    same = image.expand(20, -1, -1, -1)
    moved = MOVES(Triplet(same, same, same, torch.zeros(20), torch.arange(20)), (0,))
    for part in (moved.left, moved.right):
        assert torch.equal(part, moved.reference)
    assert len(moved.reference.flatten(1).unique(dim=0)) > 5
    shared = MOVES(SharedTriplet(same, torch.zeros(4, 3).long(), torch.zeros(4), torch.arange(4)), (0,))
    assert len(shared.distinct.flatten(1).unique(dim=0)) == 1


@pytest.mark.parametrize("module", [v2.CenterCrop(8), v2.ToDtype(torch.float64)])
def test_a_transform_keeps_size_and_type(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"expected {type(module).__name__} to return torch.float32 images"):
        BatchTransforms([module])(torch.rand(2, 3, 16, 16), (0,))
