"""The minimal-norm attack against closed forms and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipsim import PerceptualMetric
from lipsim.attacks import TwoAFCObjective, minimal_norm
from lipsim.attacks.projections import sample_norm
from lipsim.students import OrthogonalProjection, SLLNetwork


class RowObjective:
    """A function of a point and its row's parameters."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        self.function, self.parameters = function, parameters

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters)

    def select(self, rows: Tensor) -> RowObjective:
        return RowObjective(self.function, *(p[rows] for p in self.parameters))


def _linear(x: Tensor, w: Tensor, offset: Tensor) -> Tensor:
    return (x * w).flatten(1).sum(1) - offset


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_linear_objective_is_solved_exactly(dtype: torch.dtype, tolerance: float) -> None:
    x, w = torch.rand(20, 3, 4, 4, dtype=dtype), torch.randn(20, 3, 4, 4, dtype=dtype)
    distance = torch.logspace(-3, 1, 20, dtype=dtype)
    objective = RowObjective(_linear, w, (x * w).flatten(1).sum(1) + distance * w.flatten(1).norm(dim=1))
    x_adv = minimal_norm(objective, x, steps=20, box=None)
    assert (objective(x_adv) > 0).all()
    ratio = sample_norm(x_adv - x) / distance
    if dtype == torch.float64:
        assert ratio.min() >= 1 - 1e-12
    assert ratio.max() <= 1 + tolerance


def test_a_linear_objective_in_the_box() -> None:
    """Against bisection on the multiplier of ``δ = clip(λw)``."""
    x, w = torch.rand(12, 3, 4, 4, dtype=torch.float64), torch.randn(12, 3, 4, 4, dtype=torch.float64)
    most = (torch.where(w > 0, 1 - x, -x) * w).flatten(1).sum(1)
    wanted = most * torch.linspace(0.2, 0.98, 12, dtype=torch.float64)
    low, high = torch.zeros(12, dtype=torch.float64), torch.full((12,), 1e4, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        delta = (x + middle.view(-1, 1, 1, 1) * w).clamp(0, 1) - x
        short = (delta * w).flatten(1).sum(1) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    objective = RowObjective(_linear, w, (x * w).flatten(1).sum(1) + wanted)
    x_adv = minimal_norm(objective, x, steps=30)
    assert (objective(x_adv) > 0).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    ratio = sample_norm(x_adv - x) / sample_norm(delta)
    assert ratio.min() >= 1 - 1e-9 and ratio.max() <= 1 + 1e-9


def test_no_break_leaves_the_image_and_broken_ones_stay() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    out_of_reach = RowObjective(lambda x: x.flatten(1).sum(1) - 49)
    assert torch.equal(minimal_norm(out_of_reach, x, steps=20, polish=5), x)
    broken = RowObjective(lambda x: x.flatten(1).sum(1) + 1)
    assert torch.equal(minimal_norm(broken, x, steps=20, polish=5), x)
    flat = RowObjective(lambda x: 0 * x.flatten(1).sum(1) - 1)
    assert torch.equal(minimal_norm(flat, x, steps=5, polish=5), x)


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_against_brute_force_on_a_curved_boundary(box: tuple[float, float] | None) -> None:
    """Ellipses with waves: the nearest boundary point of each is found on a fine grid of angles and radii."""

    def waves(x: Tensor, centre: Tensor) -> Tensor:
        u, v = (x.flatten(1) - centre).unbind(1)
        return u**2 / 0.04 + v**2 / 0.01 + 0.3 * torch.sin(20 * u) - 1

    x = torch.full((6, 2, 1, 1), 0.5, dtype=torch.float64)
    centre = 0.5 + 0.03 * torch.randn(6, 2, dtype=torch.float64)
    objective = RowObjective(waves, centre)
    assert (objective(x) < 0).all()
    generous = (x[None] + 0.1 * torch.randn(8, 6, 2, 1, 1, dtype=torch.float64)).clamp(0, 1)
    x_adv = minimal_norm(objective, x, steps=50, box=box, starts=generous)
    found = sample_norm(x_adv - x)
    angle = torch.linspace(0, 2 * math.pi, 1001, dtype=torch.float64)
    radius = torch.linspace(0, 0.3, 2001, dtype=torch.float64)
    ray = torch.stack([angle.cos(), angle.sin()], 1)
    for row in range(6):
        points = 0.5 + radius[:, None, None] * ray
        value = waves(points.view(-1, 2), centre[row]).view(2001, -1)
        nearest = radius[(value > 0).any(1)].min()
        assert nearest - 1.6e-4 < found[row] <= nearest + 1e-6
    assert (objective(x_adv) > 0).all()


def test_parts_share_the_budget() -> None:
    """``⟨w, x⟩`` over three images: the least common budget is ``c/Σ‖w_i‖``, and the box only adds to it."""
    x, w = torch.rand(8, 9, 4, 4, dtype=torch.float64), torch.randn(8, 9, 4, 4, dtype=torch.float64)
    w[:, 3:6] *= 3
    slopes = w.view(8, 3, -1).norm(dim=2).sum(1)
    objective = RowObjective(_linear, w, (x * w).flatten(1).sum(1) + 0.5 * slopes)
    for box in (None, (0.0, 1.0)):
        x_adv = minimal_norm(objective, x, steps=30, box=box, parts=3)
        norms = (x_adv - x).view(8, 3, -1).norm(dim=2)
        assert (objective(x_adv) > 0).all()
        assert norms.amax(1).min() >= 0.5 * (1 - 1e-12)
        if box is None:
            assert norms.amax(1).max() <= 0.5 * (1 + 1e-9)
        else:
            assert x_adv.min() >= 0 and x_adv.max() <= 1 and norms.amax(1).max() < 0.6


def test_it_reaches_the_exact_radius_of_a_linear_encoder_and_no_certificate_breaks() -> None:
    images = torch.rand(3, 6, 3, 16, 16, dtype=torch.float64)
    sll = SLLNetwork(16, 8, channels=12, depth=2, linear_depth=1, linear_width=8)
    for encoder, exact in ((OrthogonalProjection(16, 24), True), (sll, False)):
        metric = PerceptualMetric(encoder, 16).double().eval().requires_grad_(False)
        radius = metric.certify(*images).radius
        x_adv = minimal_norm(TwoAFCObjective(metric, *images), images[0], steps=60, box=None)
        ratio = sample_norm(x_adv - images[0]) / radius
        assert (TwoAFCObjective(metric, *images, chosen_left=metric.certify(*images).prefers_left)(x_adv) > 0).all()
        assert ratio.min() >= 1 - 1e-9
        assert ratio.max() <= (1 + 1e-9 if exact else 20)


def test_samples_do_not_depend_on_their_batch() -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16).double().requires_grad_(False)
    images = torch.rand(3, 4, 3, 16, 16, dtype=torch.float64)
    whole = minimal_norm(TwoAFCObjective(metric, *images), images[0], steps=20, index=[4, 5, 6, 7])
    part = minimal_norm(TwoAFCObjective(metric, *images[:, 2:]), images[0, 2:], steps=20, index=[6, 7])
    torch.testing.assert_close(whole[2:], part, rtol=0, atol=1e-9)


def test_no_images_are_no_fault() -> None:
    x = torch.rand(0, 3, 8, 8)
    objective = TwoAFCObjective(PerceptualMetric(OrthogonalProjection(8, 4), 8), x, x, x)
    assert minimal_norm(objective, x).shape == x.shape


def test_bad_arguments() -> None:
    x = torch.rand(2, 3, 4, 4)
    objective = RowObjective(lambda x: x.flatten(1).sum(1))
    with pytest.raises(ValueError, match="starts of shape"):
        minimal_norm(objective, x, starts=x)
    with pytest.raises(ValueError, match="2 parts divide"):
        minimal_norm(objective, x, parts=2)
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\], got values from"):
        minimal_norm(objective, x + 1)
