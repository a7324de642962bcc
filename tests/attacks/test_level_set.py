"""Walks on level sets: the published rule, the Newton-corrected one, and that neither ever leaves the set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lipsim
from lipsim.attacks import (
    ConfidenceObjective,
    DistanceObjective,
    Objective,
    Traversal,
    TwoAFCObjective,
    WatchedObjective,
    level_set,
)

RULES = pytest.mark.parametrize("newton", [False, True])


class Function:
    """A plain function of images as an objective."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def select(self, rows: Tensor) -> Function:
        """The same function."""
        return self


def small_classifier() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 4)).double()
    with torch.no_grad():
        model[-1].weight.mul_(10)  # confident
    return model.requires_grad_(False)


def images(count: int = 4, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def least_like(model: nn.Module, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Of some images the one in whose class a model has the least confidence, for each label."""
    many = images(50, seed=2, dtype=dtype)
    return many[model(many).softmax(1)[:, labels].argmin(0)]


def test_published_rule_is_that_of_the_paper() -> None:
    """Step by step, as the authors' program does it on one image with the cross-entropy's gradient."""
    model, x = small_classifier(), images(1)
    label = model(x).argmax(1)
    target = least_like(model, label, torch.float64)
    least = model(x).softmax(1)[:, label] - 0.001

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), label, reduction="none")

    expected, push, refused = x.clone(), torch.zeros_like(x), 0
    for _ in range(150):
        expected.requires_grad_()
        (g,) = torch.autograd.grad(loss(expected).sum(), expected)
        expected = expected.detach()
        v = target - expected
        push = (push + 5e-5 / 2 * g).clamp(-5e-5, 5e-5)
        candidate = (expected + 0.05 * (v - g * (g * v).sum() / (g * g).sum()) - push).clamp(0, 1)
        if model(candidate).softmax(1)[:, label] >= least:
            expected = candidate
        else:
            refused += 1
    objective = Function(lambda x: loss(x) + least.log().squeeze(1))
    reached = level_set(objective, x, target, steps=150, step_size=0.05, correction=5e-5, noise=0)
    assert 3 <= refused < 20  # the boundary was met
    torch.testing.assert_close(reached, expected, rtol=0, atol=1e-12)


def test_newton_rule_reaches_the_nearest_point_of_a_ball() -> None:
    x, target = images(1).expand(3, -1, -1, -1), images(3, seed=2)
    objective = Function(lambda y: (y - x[:1]).flatten(1).norm(dim=1) - 1.5)
    # Nothing is clipped on the way, so the nearest point is where the straight line leaves the ball.
    way = target - x
    nearest = x + 1.5 * way / way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    reached = level_set(objective, x, target, steps=300, step_size=0.05, newton=True)
    torch.testing.assert_close(reached, nearest, rtol=0, atol=1e-4)
    published = level_set(objective, x, target, steps=300, step_size=0.05)
    assert bool(((published - target).flatten(1).norm(dim=1) > (reached - target).flatten(1).norm(dim=1)).all())


def test_newton_rule_solves_a_linear_level_within_the_box() -> None:
    """The nearest point of a half-space and a box, ``clip(target − λw)``, with λ by bisection."""
    w, target = images(1, size=3, seed=3) - 0.3, images(1, size=3, seed=4).mul(2).clamp(max=1)

    def objective(y: Tensor) -> Tensor:
        return (y * w).flatten(1).sum(1) - 0.5

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(objective((target - middle * w).clamp(0, 1))) > 0 else (low, middle)
    nearest = (target - high * w).clamp(0, 1)
    assert bool(((nearest == 0) | (nearest == 1)).any())
    start = torch.zeros_like(target)
    reached = level_set(Function(objective), start, target, steps=400, step_size=0.1, newton=True, noise=0)
    torch.testing.assert_close(reached, nearest, rtol=0, atol=1e-4)


def objectives(kind: str, dtype: torch.dtype) -> tuple[Objective, Tensor, Tensor]:
    """An objective, three sources on its level set, and targets that are not."""
    if kind == "confidence":
        model, x = small_classifier().to(dtype), images(3, dtype=dtype)
        labels = model(x).argmax(1)
        return ConfidenceObjective(model, labels, x), x, least_like(model, labels, dtype)
    metric = lipsim.load("quickstart").frozen_copy(dtype)
    x, left, right = (images(3, 64, seed, dtype) * scale for seed, scale in ((1, 1.0), (2, 1.0), (3, 0.6)))
    if kind == "distance":
        return DistanceObjective(metric, x, threshold=0.1), x, right
    answer = TwoAFCObjective(metric, x, left, right)
    return answer, x, right


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["confidence", "distance", "triplet"])
def test_no_step_leaves_the_level(kind: str, dtype: torch.dtype, newton: bool) -> None:
    objective, x, target = objectives(kind, dtype)
    assert bool((objective(target) > 0).all())
    options = {"step_size": 0.1, "correction": 0.05, "newton": newton}
    state = Traversal.start(objective, x)
    distance = (x - target).flatten(1).norm(dim=1)
    for _ in range(8):
        state = state.advance(objective, target, steps=1, **options)
        assert bool((objective(state.x) <= 0).all())
        assert bool(((state.x >= 0) & (state.x <= 1)).all())
        torch.testing.assert_close(state.value, objective(state.x))
    assert state.x.dtype == dtype
    assert bool((state.accepted > 0).all())
    assert bool(((state.x - target).flatten(1).norm(dim=1) < distance).all())


@RULES
def test_interrupted_run_gives_the_same_bits(newton: bool, tmp_path: Path) -> None:
    objective, x, target = objectives("confidence", torch.float64)
    options = {"step_size": 0.2, "newton": newton}
    whole = level_set(objective, x, target, steps=60, **options)
    state = Traversal.start(objective, x).advance(objective, target, steps=23, **options)
    save_file(state.tensors, tmp_path / "state.safetensors")
    state = Traversal.from_tensors(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(state.advance(objective, target, steps=37, **options).x, whole)
    with pytest.raises(ValueError, match="missing: slack"):
        Traversal.from_tensors({name: tensor for name, tensor in state.tensors.items() if name != "slack"})


@RULES
def test_a_sample_walks_alike_in_any_batch(newton: bool) -> None:
    objective, x, target = objectives("confidence", torch.float64)
    together = level_set(objective, x, target, steps=30, index=[5, 6, 7], newton=newton, seed=3)
    alone = [
        level_set(
            objective.select(torch.tensor([i])), x[[i]], target[[i]], steps=30, index=[5 + i], newton=newton, seed=3
        )
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)
    other = level_set(objective, x, target, steps=0, index=[8, 6, 7], newton=newton, seed=3)
    start = level_set(objective, x, target, steps=0, index=[5, 6, 7], newton=newton, seed=3)
    assert [torch.equal(a, b) for a, b in zip(other, start, strict=True)] == [False, True, True]
    assert 0 < float((start - x).abs().max()) <= 2 / 255


@RULES
def test_broken_starts_stay_as_they_are(newton: bool) -> None:
    x = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1, 1)
    walk = Function(lambda y: y.flatten() - 0.5)  # of the three, one is inside, one just so and one broken
    reached = level_set(walk, x, torch.ones_like(x), noise=0, newton=newton, steps=500).flatten()
    # Of one pixel, the published rule has nothing but its way down.
    assert reached[0] == pytest.approx(0.5, abs=2e-3) if newton else reached[0] < 0.4
    assert reached[1] <= 0.5
    assert reached[2] == x[2]
    # Random starts outside the level go back to the image, of which NaN is never a part.
    state = Traversal.start(Function(lambda y: (y.flatten() - x.flatten()).abs() - 1e-6), x, noise=0.1)
    assert torch.equal(state.x, x)
    assert bool((state.value <= 0).all())
    nothing = level_set(Function(lambda y: y.flatten() * torch.nan), x, torch.ones_like(x), newton=newton)
    assert torch.equal(nothing, x)


@RULES
def test_costs_a_forward_and_a_backward_pass_a_step(newton: bool) -> None:
    objective, x, target = objectives("confidence", torch.float64)
    watched = WatchedObjective(objective, x)
    level_set(watched, x, target, steps=50, newton=newton)
    assert bool((watched.passes.forward <= 52).all())
    assert bool((watched.passes.backward <= 51).all())
    # Who has arrived stands still, and costs nothing any more.
    watched = WatchedObjective(Function(lambda y: y.flatten(1).sum(1) - 1e6), x)
    assert torch.equal(level_set(watched, x, target, steps=50, step_size=1.0, newton=True), target)
    assert watched.passes.forward.tolist() == [4] * 3


def test_confidence_of_the_clean_image_is_what_counts() -> None:
    model, x = small_classifier(), images(2)
    labels = torch.tensor([1, 2])
    objective = ConfidenceObjective(model, labels, x, drop=0.25)
    torch.testing.assert_close(objective(x), torch.full((2,), -0.25, dtype=torch.float64))
    p = model(images(2, seed=5)).softmax(1)[[0, 1], labels]
    torch.testing.assert_close(objective(images(2, seed=5)), model(x).softmax(1)[[0, 1], labels] - 0.25 - p)
    torch.testing.assert_close(objective.select(torch.tensor([1]))(x[1:]), objective(x)[1:])


def test_bad_input_gets_one_line() -> None:
    model, x = small_classifier(), images(2)
    objective = ConfidenceObjective(model, torch.tensor([0, 1]), x)
    for options, message in (
        ({"step_size": 0.0}, r"expected a step_size in \(0, 1\]"),
        ({"steps": -1}, "expected steps and a correction of at least 0"),
        ({"noise": -1.0}, "finite budget eps"),
    ):
        with pytest.raises(ValueError, match=message):
            level_set(objective, x, x, **options)
    with pytest.raises(ValueError, match="expected a target like the images"):
        level_set(objective, x, images(2, size=9))
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
        level_set(objective, x * 255, x)
    with pytest.raises(ValueError, match=r"drop of confidence in \[0, 1\], got 20"):
        ConfidenceObjective(model, torch.tensor([0, 1]), x, drop=20)
    with pytest.raises(ValueError, match="expected 2 labels in 0 to 3"):
        ConfidenceObjective(model, torch.tensor([0, 4]), x)
    with pytest.raises(ValueError, match=r"labels in torch\.int64, got torch\.float32"):
        ConfidenceObjective(model, torch.tensor([0.0, 1.0]), x)
    with pytest.raises(ValueError, match=r"the classifier does not take images of shape \(2, 1, "):
        ConfidenceObjective(model, torch.tensor([0, 1]), x[:, :1])
    with pytest.raises(ValueError, match=r"logits \(2, classes\), got a dict"):
        ConfidenceObjective(lambda x: {"out": x}, torch.tensor([0, 1]), x)
