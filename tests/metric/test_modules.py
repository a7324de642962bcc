"""A plain module for images of any size, as libraries of image quality measures register it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lipsim import PerceptualMetric
from lipsim.metric import ImageDistance, save
from lipsim.students import OrthogonalProjection


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(16, 4), 16).eval().requires_grad_(False)


def test_images_of_any_size_are_compared_as_they_are_read(metric: PerceptualMetric) -> None:
    x, y = torch.rand(3, 3, 24, 40), torch.rand(3, 3, 16, 16)
    expected = metric(metric.read(x), y)
    assert torch.equal(ImageDistance(metric)(x, y), expected)
    assert torch.equal(ImageDistance(metric, keepdim=True)(x, y), expected[:, None])
    torch.testing.assert_close(ImageDistance(metric, "mean", keepdim=True)(x, y), expected.mean())
    torch.testing.assert_close(ImageDistance(metric, normalize=True)(2 * x - 1, 2 * y - 1), expected)
    gray = torch.rand(3, 1, 20, 20)
    assert torch.equal(ImageDistance(metric)(gray, y), ImageDistance(metric)(gray.expand(-1, 3, -1, -1), y))


def test_no_images_of_any_size_have_no_distances(metric: PerceptualMetric) -> None:
    for size in (metric.image_size, 90):
        nothing = torch.zeros(0, 3, size, size)
        assert ImageDistance(metric)(nothing, nothing).shape == (0,)


def test_it_is_a_loss_for_images_of_any_size(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 3, 24, 40, requires_grad=True), torch.rand(2, 3, 20, 20)
    loss = ImageDistance(metric, reduction="mean")
    before = loss(x, y)
    (gradient,) = torch.autograd.grad(before, x)
    assert loss((x - 0.1 * gradient / gradient.abs().max()).clamp(0, 1), y) < before
    same = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(same, x.detach()), same)
    assert not gradient.any()


def test_it_is_loaded_by_name_or_file_with_its_weights_in_the_state(metric: PerceptualMetric, tmp_path: Path) -> None:
    distance = ImageDistance(save(metric, tmp_path / "metric.safetensors"))
    x, y = torch.rand(2, 2, 3, 16, 16)
    torch.testing.assert_close(distance(x, y), metric(x, y))
    assert not distance.metric.training and distance.lower_better and distance.metric_mode == "FR"
    distance.load_state_dict(distance.state_dict())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating-point tensor of images, got torch.uint8; metric.read"),
        ("x.png", "got str; metric.read"),
        (torch.rand(3, 8, 8), r"shape \(N, 3, H, W\), got \(3, 8, 8\); metric.read"),
        (torch.rand(2, 8, 8, 3), r"got \(2, 8, 8, 3\)"),
        (torch.rand(2, 3, 8, 8) * 255, "divide 8-bit images by 255"),
    ],
)
def test_other_images_are_refused(metric: PerceptualMetric, images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDistance(metric)(torch.rand(2, 3, 8, 8), images)  # type: ignore[arg-type]
