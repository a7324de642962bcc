"""Colour jitter of each image: the operations and the distribution of torchvision's, by key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from lipsim.data.augment import ColorJitter, brightened, contrasted, gray, hue_turned, random_reflections, saturated
from lipsim.utils.sampling import key_of, subkeys

OPERATIONS = [
    (brightened, V.adjust_brightness, (0.6, 1.4)),
    (contrasted, V.adjust_contrast, (0.6, 1.4)),
    (saturated, V.adjust_saturation, (0.8, 1.2)),
    (hue_turned, V.adjust_hue, (-0.1, 0.1)),
]


def _images() -> Tensor:
    """Noise, and images at the corners: gray, of two equal channels, of zeros and ones, black, white."""
    images = torch.rand(24, 3, 9, 11)
    images[0] = 0.5
    images[1, 0] = images[1, 1]
    images[2, 1] = images[2, 2]
    images[3] = (images[3] > 0.5).float()
    images[4], images[5] = 0, 1
    return images


@pytest.mark.parametrize(("ours", "theirs", "limits"), OPERATIONS)
def test_each_operation_is_that_of_torchvision(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], limits: tuple[float, float]
) -> None:
    images = _images()
    factors = torch.linspace(*limits, len(images))
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors.tolist(), strict=True)])
    torch.testing.assert_close(ours(images, factors.view(-1, 1, 1, 1)), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(gray(images), V.rgb_to_grayscale(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("theirs_count", [300, pytest.param(6000, marks=pytest.mark.slow)])  # 8 s
def test_draws_are_distributed_as_those_of_torchvision(theirs_count: int) -> None:
    """Mean and spread of what becomes of pixels of four colours, and their correlations."""
    torch.manual_seed(1)
    image = torch.tensor([[0.7, 0.2, 0.3], [0.1, 0.5, 0.45], [0.9, 0.8, 0.1], [0.3, 0.3, 0.6]]).T.reshape(3, 2, 2)
    count = 6000
    theirs = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)])
    expected = torch.stack([theirs(image) for _ in range(theirs_count)]).flatten(1).double()
    found = ColorJitter()(image.expand(count, -1, -1, -1), subkeys(key_of(0), torch.arange(count))).flatten(1).double()
    spread, error = expected.std(0), (1 / count + 1 / theirs_count) ** 0.5
    assert ((found.mean(0) - expected.mean(0)).abs() / spread).max() < 4 * error
    assert (found.std(0) / spread - 1).abs().max() < 3 * error
    assert (torch.corrcoef(found.T) - torch.corrcoef(expected.T)).abs().max() < 5 * error
    unchanged = (found == image.flatten().double()).all(1).double().mean()
    grays = (found.view(count, 3, 4).diff(dim=1).abs().amax((1, 2)) < 1e-6).double().mean()
    assert abs(unchanged - 0.2 * 0.8) < 0.02 and abs(grays - 0.2) < 0.02


def test_an_image_is_jittered_alike_in_any_batch_and_no_two_are() -> None:
    images, keys = _images(), subkeys(key_of(7), torch.arange(24))
    before, jitter = images.clone(), ColorJitter()
    whole = jitter(images, keys)
    assert torch.equal(images, before) and 0 <= whole.min() and whole.max() <= 1
    assert torch.equal(torch.cat([jitter(images[[i]], keys[[i]]) for i in range(23, -1, -1)]).flip(0), whole)
    same = jitter(images[6:7].expand(24, -1, -1, -1), keys)
    assert len({tuple(image.flatten().tolist()) for image in same}) > 15  # about one of six stays as it is


def test_every_symmetry_of_the_square_is_as_likely() -> None:
    drawn = random_reflections(subkeys(key_of(0), torch.arange(8000)))
    counts = (drawn.long() * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    assert (counts - 1000).abs().max() < 130  # four standard deviations
