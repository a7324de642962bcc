"""Null-space moves: exact for every convolution, local, after an attack, and said where there are none."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipsim.attacks import (
    ClassificationObjective,
    Region,
    first_operator,
    null_space,
    null_space_after,
    null_space_move,
    pgd,
    require_operator,
)
from lipsim.attacks.projections import sample_norm
from lipsim.students import SLLNetwork


class Normalising(nn.Module):
    """A network behind the normalisation of its input, answering as segmenters and detectors do."""

    def __init__(self, first: nn.Module, kind: str) -> None:
        super().__init__()
        self.first, self.kind = first, kind

    def forward(self, x: Tensor) -> Any:
        std = torch.tensor([0.2, 0.25, 0.4]).to(x).view(3, 1, 1)
        z = torch.relu(self.first((x - 0.45) / std))
        return {"tensor": z, "dict": {"out": z}, "list": [{"boxes": z}]}[self.kind]


def _normalising(conv: nn.Module, kind: str = "tensor", dtype: torch.dtype = torch.float64) -> Normalising:
    return Normalising(conv, kind).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "outputs", "size"),
    [(4, 3, 0, 1, 8, 13), (3, 2, 1, 1, 2, 11), (5, 4, 2, 3, 6, 12), (4, 4, 0, 1, 7, 13), (2, 2, 1, 1, 4, 9)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moves_are_exact(
    kernel: int, stride: int, padding: int, groups: int, outputs: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, outputs, kernel, stride=stride, padding=padding, groups=groups)
    model = _normalising(conv, "dict", dtype)
    operator = first_operator(model, size)
    assert operator is not None and (operator.name, operator.kind) == ("first", "Conv2d")
    x = 0.1 + 0.8 * torch.rand(2, 3, size, size, dtype=dtype)
    found = null_space_move(operator, x, 0.2 * torch.randn_like(x))
    assert (found.length > 0.3).all() and not found.trivial.any()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    change = (model(found.x_adv)["out"] - model(x)["out"]).flatten(1).norm(dim=1)
    assert (change <= (1e-6 if dtype == torch.float64 else 1e-5) * found.length * 5).all()  # a normalised pixel: 1/std
    assert (found.relative <= (1e-6 if dtype == torch.float64 else 1e-5)).all()


@pytest.mark.parametrize(
    ("conv", "size", "dtype"),
    [
        (nn.Conv2d(3, 2, 3), 16, torch.float32),
        (nn.Conv2d(3, 2, 3), 16, torch.float64),
        (nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), 16, torch.float64),
        (nn.Conv2d(3, 6, 2, stride=2, padding=1), 33, torch.float64),
    ],
)
def test_wherever_there_is_a_kernel_images_move(conv: nn.Conv2d, size: int, dtype: torch.dtype) -> None:
    """Uniform images have values next to both ends of the box, and long directions clip most of them."""
    torch.manual_seed(0)
    conv.reset_parameters()
    operator = require_operator(_normalising(conv, dtype=dtype), size)
    x, target = torch.rand(2, 2, 3, size, size, dtype=dtype)
    for direction in (torch.randn_like(x), target - x):
        found = null_space_move(operator, x, direction)
        assert (found.length > 0.5).all() and not found.trivial.any()
        assert (found.relative <= (1e-6 if dtype == torch.float64 else 1e-5)).all()
        assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1


@pytest.mark.parametrize(
    ("conv", "size", "region", "least"),
    [
        (nn.Conv2d(3, 24, 7, stride=4, padding=3), 32, False, 8.0),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 24, True, 3.0),
    ],
    ids=["scattered", "region"],
)
def test_images_of_saturated_values_move(conv: nn.Conv2d, size: int, region: bool, least: float) -> None:
    """Six values in ten are at a bound, where Newton's steps do not converge; the other way moved by 0 and by 1."""
    torch.manual_seed(1)
    conv.reset_parameters()
    model = conv.double().eval().requires_grad_(False)
    x, target = torch.rand(2, 1, 3, size, size, dtype=torch.float64)
    if region:
        x[..., : round(0.6 * size)] = 1.0
    else:
        x = torch.where(torch.rand_like(x) < 0.6, x.round(), x)
    found = null_space_move(require_operator(model, size), x, target - x)
    assert found.length > least and sample_norm(target - found.x_adv) < sample_norm(target - x)
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    straight = model(target) - model(x)
    share = found.length / sample_norm(target - x)
    assert sample_norm(model(found.x_adv) - model(x)) <= 1e-6 * share * sample_norm(straight)


def test_what_no_window_reads_moves_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride of 2 leaves out the last row and column of even sizes, and 64 outputs see all of a window."""
    torch.manual_seed(0)
    monkeypatch.setattr(importlib.import_module("lipsim.attacks.null_space"), "project_to_kernel", None)
    model = _normalising(nn.Conv2d(3, 64, 3, stride=2))
    x, target = torch.rand(2, 2, 3, 224, 224, dtype=torch.float64)
    found = null_space_move(require_operator(model, 224), x, target - x)
    assert not found.trivial.any() and (found.residual == 0).all()
    change = (found.x_adv - x).abs()
    assert torch.equal(change[..., :223, :223], torch.zeros_like(change[..., :223, :223]))
    for edge in (slice(-1, None), slice(None)), (slice(None), slice(-1, None)):
        torch.testing.assert_close(found.x_adv[..., edge[0], edge[1]], target[..., edge[0], edge[1]])
    odd = null_space_move(require_operator(model, 15), x[..., :15, :15], target[..., :15, :15])
    assert odd.trivial.all() and not odd.length.any()


def test_the_semantic_move_is_the_nearest_within_the_box() -> None:
    """Against projections in turn (Dykstra), which converge to the same point slowly."""
    torch.manual_seed(0)
    model = _normalising(nn.Conv2d(3, 4, 3, stride=3))
    operator = first_operator(model, 6)
    assert operator is not None and operator.patches is not None
    x, target = torch.rand(2, 2, 3, 6, 6, dtype=torch.float64)
    operator = require_operator(_normalising(nn.Conv2d(3, 4, 3, stride=3)), 6)
    patches = operator.patches
    assert patches is not None and patches.unseen.shape == (23, 27)
    moved = null_space(operator.forward, x, target - x)
    assert moved.min() >= 0 and moved.max() <= 1
    z, p, q = target.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(3000):
        rows = patches.split(z + p - x)
        y = x + patches.join(rows @ patches.unseen.T @ patches.unseen, x)
        p = z + p - y
        z = (y + q).clamp(0, 1)
        q = y + q - z
    torch.testing.assert_close(moved, z, atol=1e-6, rtol=0)


def test_regions_have_their_own_strength_and_nothing_else_moves() -> None:
    torch.manual_seed(0)
    model = _normalising(nn.Conv2d(3, 4, 4, stride=4), "list")
    operator = require_operator(model, 16)
    x = 0.3 + 0.4 * torch.rand(2, 3, 16, 16, dtype=torch.float64)
    other = torch.randn_like(x)
    regions = [Region(0, 0, 8, 8), Region(8, 6, 7, 9, strength=0.5, direction=other)]  # the second cuts patches
    moved = null_space(operator, x, torch.randn_like(x), regions=regions)
    change = moved - x
    assert (change[..., :8, :8] != 0).any() and (change[..., 8:15, 6:15] != 0).any()
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[:8, :8] = outside[8:15, 6:15] = False
    assert torch.equal(moved[..., outside], x[..., outside])
    assert (operator(change).abs() < 1e-7).all()
    room = torch.where(change > 0, 1 - x, x)
    assert (change.abs() <= 0.5 * room + 1e-12)[..., 8:15, 6:15].all()
    with pytest.raises(ValueError, match="regions inside 16 x 16"):
        null_space(operator, x, other, regions=[Region(10, 0, 8, 8)])


@pytest.mark.parametrize("norm", [2, "inf"])
def test_after_an_attack_the_flip_survives_within_its_budget(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    model = model.double().eval().requires_grad_(False)
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    objective = ClassificationObjective(model, model(x).argmax(1))
    eps = 2.0 if norm == 2 else 0.15
    x_adv = pgd(objective, x, norm=norm, eps=eps, steps=20)
    assert (objective(x_adv) > 0).any()
    operator = require_operator(model, 8)
    found = null_space_after(operator, objective, x, x_adv, torch.randn_like(x), eps=eps, norm=norm)
    assert found.before is not None and found.after is not None
    assert torch.equal(found.before > 0, found.after > 0) and (found.length > 0.05).all()
    torch.testing.assert_close(objective(found.x_adv), found.before)
    assert (sample_norm(found.x_adv - x, norm) <= eps * (1 + 1e-9)).all()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert "broken answers stay broken" in str(found)


def test_after_an_attack_images_of_saturated_values_stay_within_the_budget() -> None:
    """The kernel part that would shorten the attack is longer than the attack where many values cannot move."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 24, 7, stride=4, padding=3), nn.Tanh(), nn.Flatten(), nn.Linear(24 * 64, 3))
    model = model.double().eval().requires_grad_(False)
    x, target = torch.rand(2, 6, 3, 32, 32, dtype=torch.float64)
    x = torch.where(torch.rand_like(x) < 0.6, x.round(), x)
    objective = ClassificationObjective(model, model(x).argmax(1))
    x_adv = pgd(objective, x, eps=0.5, steps=5)
    found = null_space_after(require_operator(model, 32), objective, x, x_adv, target - x, eps=0.5)
    assert (sample_norm(found.x_adv - x) <= 0.5 * (1 + 1e-9)).all()


def test_what_cannot_move_is_said() -> None:
    resnet = _normalising(nn.Conv2d(3, 64, 7, stride=2, padding=3))
    operator = require_operator(resnet, 16)
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    found = null_space_move(operator, x, torch.randn_like(x))
    assert found.trivial.all() and torch.equal(found.x_adv, x) and "kernel is trivial" in str(found)
    # Of no direction nothing is said about the kernel, which this one has.
    few = first_operator(nn.Conv2d(3, 4, 3, stride=2).double().requires_grad_(False), 9)
    assert few is not None
    small = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    assert null_space_move(few, small, torch.randn_like(small)).length.item() > 1
    still = null_space_move(few, small, torch.zeros_like(small))
    assert not still.trivial.any() and not still.length.any() and "the direction is 0" in str(still)
    sll = SLLNetwork(16, 8, channels=8, depth=1, linear_depth=1, linear_width=8).eval()
    nn.init.normal_(sll[1][0].bias)
    with pytest.raises(ValueError, match="first layer with weights is linear"):
        require_operator(sll, 16)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, bias=False))
    found = require_operator(nn.Sequential(spectral, nn.ReLU()).eval(), 16)  # whose weight is one, not a layer
    assert found.name == "0"
    torch.testing.assert_close(found(torch.ones(1, 3, 16, 16)), spectral(torch.ones(1, 3, 16, 16)))
    with pytest.raises(ValueError, match="does not take images"):
        first_operator(nn.Conv2d(1, 4, 3), 16)
    with pytest.raises(ValueError, match="expected images of shape"):
        null_space(operator, x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match="expected images of shape"):
        null_space(operator, x[..., :8], x[..., :8])


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 8, 4, stride=3), nn.Conv2d(3, 24, 4, stride=4)], ids=["windows", "patches"]
)
def test_moves_do_not_depend_on_the_batch(conv: nn.Conv2d) -> None:
    """An image that is solved at once, one with saturated pixels, and one in between."""
    operator = require_operator(_normalising(conv), 16)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    x[0] = 0.4 + 0.2 * x[0]
    x[1] = (2 * x[1] - 0.5).clamp(0, 1)
    direction = torch.randn_like(x) * torch.tensor([0.01, 0.3, 0.1], dtype=x.dtype).view(-1, 1, 1, 1)
    together = null_space(operator, x, direction)
    alone = torch.cat([null_space(operator, x[i : i + 1], direction[i : i + 1]) for i in range(3)])
    assert (sample_norm(together - x) > 0.05).all()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), [(1, 2, 0, 10), (2, 3, 1, 8), (3, 4, 0, 15)])
def test_a_convolution_that_skips_the_middle_pixel(kernel: int, stride: int, padding: int, size: int) -> None:
    """Where pixels are saturated, a window of what one output reads is asked for, wherever that is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, kernel, stride, padding), nn.ReLU(), nn.Flatten()).double()
    x = ((torch.rand(2, 3, size, size, dtype=torch.float64) - 0.5) * 4 + 0.5).clamp(0, 1)
    found = null_space_move(require_operator(model, size), x, 5 * torch.randn_like(x))
    moved = found.x_adv
    assert bool(((moved - x).flatten(1).norm(dim=1) > 0.1).all())
    assert torch.allclose(model[0](moved), model[0](x), rtol=0, atol=1e-9)
    assert 0 <= float(moved.min()) and float(moved.max()) <= 1
