"""The suite: worst case of each sample, budgets in order, nothing attacked twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lipsim
from lipsim import PerceptualMetric
from lipsim.attacks import ATTACKS, TwoAFCObjective, apgd, auto, minimal_norm, pgd, square
from lipsim.attacks.images import attack_pair, attack_triplet
from lipsim.attacks.projections import NORMS, Ball, Norm, sample_norm
from lipsim.attacks.registry import attacks_in, check_attacks, suite
from lipsim.callbacks import AttackRobustness
from lipsim.metric.distances import pixel_l2
from lipsim.students import OrthogonalProjection, SLLNetwork
from lipsim.utils.errors import LipsimError

EPS = [0.02, 0.1, 0.3, 1.0]


class Counting:
    """``⟨w, x⟩ − c``, which counts the images that it sees, by the row of their sample."""

    def __init__(self, w: Tensor, offset: Tensor, rows: Tensor, seen: Tensor) -> None:
        self.w, self.offset, self.rows, self.seen = w, offset, rows, seen

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.index_add_(0, self.rows, torch.ones(len(x), dtype=torch.int64))
        return (x * self.w).flatten(1).sum(1) - self.offset

    def select(self, rows: Tensor) -> Counting:
        return Counting(self.w[rows], self.offset[rows], self.rows[rows], self.seen)


def _counting(distance: Tensor) -> tuple[Counting, Tensor]:
    """Samples at a known ℓ2 distance from being broken."""
    x = 0.3 + 0.4 * torch.rand(len(distance), 3, 6, 6, dtype=torch.float64)
    w = torch.randn_like(x)
    offset = (x * w).flatten(1).sum(1) + distance * w.flatten(1).norm(dim=1)
    return Counting(w, offset, torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64)), x


def test_each_sample_breaks_at_the_first_budget_that_suffices() -> None:
    distance = torch.tensor([-0.1, 0.01, 0.05, 0.09, 0.2, 0.9, 2.0], dtype=torch.float64)
    objective, x = _counting(distance)
    found = auto(objective, x, eps=[0.3, 1.0, 0.02, 0.1, 0.1], steps=20, box=None)
    expected = torch.tensor([0, 0.02, 0.1, 0.1, 0.3, 1.0, math.inf], dtype=torch.float64)
    torch.testing.assert_close(found.broken_at, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(list(found.by.values())).amin(0), expected, rtol=0, atol=0)
    length = sample_norm(found.x_adv - x)
    assert (length[1:6] <= expected[1:6] + 1e-6).all() and (length[1:6] >= distance[1:6] * (1 - 1e-9)).all()
    assert torch.equal(found.x_adv[0], x[0])
    assert ((objective(found.x_adv) > 0) == torch.isfinite(expected)).all()
    # A broken sample costs a look at its clean image, or the attack that broke it, and nothing after that.
    seen = objective.seen.tolist()
    assert seen[0] < 12 and seen[1] < 30 and max(seen) == seen[6] > 500


@pytest.mark.parametrize("norm", [2, "inf", 0])
def test_the_worst_case_is_no_better_than_any_attack_alone(norm: Norm) -> None:
    sll = SLLNetwork(16, 8, channels=12, depth=2, linear_depth=1, linear_width=8)
    metric = PerceptualMetric(sll, 16).eval().requires_grad_(False)
    reference = torch.rand(16, 3, 16, 16)
    left, right = ((reference + 0.2 * torch.randn_like(reference)).clamp(0, 1) for _ in range(2))
    objective = TwoAFCObjective(metric, reference, left, right)
    eps: list[float] = {2: EPS, "inf": [0.005, 0.02, 0.1], 0: [1, 4, 16]}[norm]
    found = auto(objective, reference, norm=norm, eps=eps, steps=20)
    left_over = [int((found.broken_at > e).sum()) for e in eps]
    assert left_over == sorted(left_over, reverse=True) and left_over[-1] < left_over[0]
    for e, count in zip(eps, left_over, strict=True):
        alone = apgd(objective, reference, norm=norm, eps=e, steps=20)
        assert count <= int((objective(alone) <= 0).sum())
    broken = torch.isfinite(found.broken_at)
    assert (objective(found.x_adv)[broken] > 0).all()
    assert (sample_norm(found.x_adv - reference, norm)[broken] <= found.broken_at[broken] + 1e-6).all()
    if norm == 2:
        radius = metric.certify(reference, left, right).radius
        assert (sample_norm(found.x_adv - reference)[broken] >= radius[broken]).all()


def test_gradients_that_are_masked_are_passed_by() -> None:
    """A staircase has no slope anywhere; Square climbs it all the same."""

    class Stairs:
        def __call__(self, x: Tensor) -> Tensor:
            level = (x - 0.5).flatten(1).sum(1)
            return torch.floor(20 * level) / 20 - 1 + 0 * level

        def select(self, rows: Tensor) -> Stairs:
            return self

    x = torch.full((3, 3, 8, 8), 0.5)
    blind = auto(Stairs(), x, eps=0.5, attacks=["apgd", "minimal_norm"], steps=30)
    assert torch.isinf(blind.broken_at).all()
    found = auto(Stairs(), x, eps=0.5, steps=30, queries=300)
    assert (found.broken_at == 0.5).all() and (found.by["square"] == 0.5).all()
    assert torch.isinf(found.by["apgd"]).all()


def test_results_do_not_depend_on_batches() -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 24), 16).double().requires_grad_(False)
    images = torch.rand(3, 8, 3, 16, 16, dtype=torch.float64)
    options: dict[str, Any] = {"eps": EPS, "steps": 10, "restarts": 2, "seed": 5}
    whole = auto(TwoAFCObjective(metric, *images), images[0], index=torch.arange(40, 48), **options)
    for rows in (torch.arange(3), torch.tensor([7, 3, 4])):
        part = auto(TwoAFCObjective(metric, *images[:, rows]), images[0, rows], index=40 + rows, **options)
        assert torch.equal(part.broken_at, whole.broken_at[rows])
        torch.testing.assert_close(part.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9)


def test_three_images_share_the_suite_and_progress_is_told() -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 24), 16, lipschitz=1.0).double().requires_grad_(False)
    images = torch.rand(3, 6, 3, 16, 16, dtype=torch.float64)
    joint = metric.certify(*images).joint_radius
    objective = TwoAFCObjective(metric, *images, target="all")
    told: list[str] = []
    found = auto(objective, objective.images, eps=EPS, steps=20, parts=3, progress=told.append)
    broken = torch.isfinite(found.broken_at)
    assert broken.any()
    lengths = sample_norm(found.x_adv - objective.images, 2, 3)
    assert (lengths[broken] <= found.broken_at[broken] + 1e-6).all() and (lengths[broken] >= joint[broken]).all()
    assert told[0] == "apgd at ε = 0.02, 6 left"
    assert any(line.startswith("minimal_norm") for line in told) and any(line.startswith("square") for line in told)


def test_bad_suites_are_refused() -> None:
    objective, x = _counting(torch.ones(2, dtype=torch.float64))
    for attacks, norm in ((["pdg"], 2), ([], 2), (["apgd", "apgd"], 2), (["minimal_norm"], "inf"), (["square"], 0)):
        with pytest.raises(ValueError, match="expected different attacks among"):
            auto(objective, x, norm=norm, eps=1, attacks=attacks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one budget"):
        auto(objective, x, eps=[])


@pytest.mark.parametrize("norm", [1, 3, "2", "linf", None, math.inf, [2]])
def test_a_bad_norm_is_one_error_everywhere(norm: Any) -> None:
    x = torch.rand(2, 3, 8, 8)
    images = tuple(x[0] for _ in range(3))  # a tie, which nothing attacks
    attempts: list[Callable[[], object]] = [
        lambda: sample_norm(x, norm),
        lambda: Ball(norm, 1.0),
        lambda: auto(_counting(torch.ones(2))[0], x, norm=norm, eps=1),
        lambda: attacks_in(norm),
        lambda: suite(norm),
        lambda: check_attacks(None, norm),
        lambda: check_attacks(["apgd"], norm),
        lambda: attack_triplet(pixel_l2, *images, norm=norm),
        lambda: attack_triplet(pixel_l2, *images, norm=norm, eps=1),
        lambda: attack_pair(pixel_l2, x[0], x[1], norm=norm),
        lambda: attack_pair(pixel_l2, x[0], x[1], norm=norm, eps=1),
        lambda: square(_counting(torch.ones(2))[0], x, norm=norm, eps=1),
        lambda: AttackRobustness(norm=norm, attacks=["apgd"]),
    ]
    for attempt in attempts:
        with pytest.raises(LipsimError, match="expected norm 2, 'inf' or 0, got"):
            attempt()


def test_the_registry_says_what_an_attack_needs() -> None:
    """Each attack runs in its norms; those that say so, and no others, ask for gradients."""
    assert [suite(norm) for norm in NORMS] == [
        ("apgd", "minimal_norm", "square"),
        ("apgd", "square"),
        ("apgd", "one_pixel"),
    ]
    far, x = _counting(torch.full((2,), 50.0, dtype=torch.float64))
    for name, attack in ATTACKS.items():
        assert name == attack.name and getattr(lipsim.attacks, name).__name__ == name
        for norm in attack.norms:
            assert name in attacks_in(norm)
            found = auto(far, x, norm=norm, eps=1, attacks=[name], steps=3, queries=100)
            assert bool(found.passes.backward.any()) == attack.gradients
            assert bool(found.passes.forward.min() > 3)


def test_alone_and_in_the_suite_an_attack_does_the_same() -> None:
    objective, x = _counting(torch.full((4,), 0.2, dtype=torch.float64))
    options: dict[str, Any] = {"steps": 15, "seed": 2}
    for attack in (apgd, square):
        found = auto(objective, x, eps=0.25, attacks=[attack.__name__], queries=15, **options)
        assert torch.equal(found.x_adv, attack(objective, x, eps=0.25, **options))
    nearest = minimal_norm(objective, x, steps=15)
    assert (sample_norm(nearest - x) <= 0.25).all()
    assert (auto(objective, x, eps=0.25, attacks=["minimal_norm"], steps=15).broken_at == 0.25).all()


@pytest.mark.parametrize("attacks", [("apgd", "minimal_norm", "square"), ("square", "apgd"), ("minimal_norm", "pgd")])
def test_what_holds_has_the_largest_objective_that_any_attack_reached(attacks: tuple[str, ...]) -> None:
    """Whichever ran last; the truth is the best of the attacks run by themselves, at every budget."""
    distance = torch.tensor([0.9, 5.0, 2.0], dtype=torch.float64)
    objective, x = _counting(distance)
    options: dict[str, Any] = {"steps": 12, "seed": 2}
    result = auto(objective, x, eps=[0.1, 0.3], attacks=attacks, queries=12, **options)
    assert torch.isinf(result.broken_at).all()
    alone = {"apgd": apgd, "square": square, "pgd": pgd}
    found = [alone[name](objective, x, eps=e, **options) for name in attacks if name in alone for e in (0.1, 0.3)]
    best = torch.stack([objective(x), *(objective(x_adv) for x_adv in found)]).amax(0)
    torch.testing.assert_close(objective(result.x_adv), best, rtol=0, atol=1e-12)
    assert (objective(result.x_adv) > objective(x)).all()
    assert (sample_norm(result.x_adv - x) <= 0.3 + 1e-9).all()


class Stairs:
    """``⌊8⟨w, x⟩⌋/8 − c`` where ``flat``, ``⟨w, x⟩ − c`` elsewhere, and a gradient of NaN where ``odd``."""

    def __init__(self, w: Tensor, offset: Tensor, flat: Tensor, odd: Tensor) -> None:
        self.w, self.offset, self.flat, self.odd = w, offset, flat, odd

    def __call__(self, x: Tensor) -> Tensor:
        value = (x * self.w).flatten(1).sum(1)
        value = torch.where(self.flat, (8 * value).floor() / 8, value)
        # √0 has an infinite slope, which 0 · ∞ turns into NaN.
        root = torch.where(self.odd, (x - x).flatten(1).sum(1), 1.0).sqrt()
        return value - self.offset + root - torch.where(self.odd, 0.0, 1.0)

    def select(self, rows: Tensor) -> Stairs:
        return Stairs(self.w[rows], self.offset[rows], self.flat[rows], self.odd[rows])


def test_a_sample_without_gradients_is_told_from_a_robust_one() -> None:
    x = torch.full((5, 3, 6, 6), 0.5, dtype=torch.float64)
    w = torch.ones_like(x) / x[0].numel() ** 0.5
    start = (x * w).flatten(1).sum(1)
    near, far = 0.05, 50.0  # of the ball of radius 1 and outside it
    offset = start + torch.tensor([near, far, near, far, far], dtype=torch.float64)
    flat = torch.tensor([False, False, True, True, False])
    odd = torch.tensor([False, False, False, False, True])
    goal = Stairs(w, offset, flat, odd)
    result = auto(goal, x, eps=[1.0], steps=5, queries=100)
    assert result.no_gradient.tolist() == [False, False, True, True, True]
    assert torch.isfinite(result.broken_at).tolist() == [True, False, True, False, False]
    assert torch.isfinite(result.by["square"]).tolist() == [False, False, True, False, False]
    # Where only attacks without gradients ran, none was asked for.
    assert not auto(goal, x, eps=[1.0], attacks=["square"], queries=5).no_gradient.any()
