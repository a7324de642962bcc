"""Random views of photographs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lipsim.data.augment import MAX_SHIFT, random_views


def test_views_are_small_moves_of_the_picture() -> None:
    # A bright blob in the middle: its centroid moves by a sixteenth of the side at most, and it may be mirrored.
    size = 64
    place = torch.arange(size) - (size - 1) / 2
    blob = torch.exp(-(place[:, None] ** 2 + place**2) / 50).expand(40, 3, size, size).contiguous()
    views = random_views(blob, torch.Generator().manual_seed(0))
    assert views.shape == blob.shape and 0 <= views.min() and views.max() <= 1
    weight = views / views.sum((2, 3), keepdim=True)
    moved = torch.stack([(weight.sum(2) * place).sum(-1), (weight.sum(3) * place).sum(-1)])
    assert moved.abs().max() < 1.15 * MAX_SHIFT * size and moved.std() > 1.0


def test_views_mirror_half_of_the_pictures() -> None:
    ramp = torch.linspace(0, 1, 32).expand(400, 3, 32, 32).contiguous()
    views = random_views(ramp, torch.Generator().manual_seed(1))
    rising = (views[..., 24:].mean((1, 2, 3)) > views[..., :8].mean((1, 2, 3))).float().mean()
    assert 0.4 < rising < 0.6


def test_views_depend_on_the_generator_alone() -> None:
    images = F.avg_pool2d(torch.rand(6, 3, 20, 20), 3, 1, 1)
    first, again, other = (random_views(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
