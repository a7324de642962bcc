"""What an attack says that it cost, against an encoder that counts the images it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipsim import PerceptualMetric
from lipsim.attacks import (
    Objective,
    TwoAFCObjective,
    WatchedObjective,
    apgd,
    auto,
    mi_fgsm,
    minimal_norm,
    one_pixel,
    pgd,
    square,
)
from lipsim.attacks.images import attack_pair, attack_triplet
from lipsim.students import OrthogonalProjection

N = 5


class Counting(nn.Module):
    """Counts images on their way forward and gradients on their way back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = OrthogonalProjection(8, 24)
        self.forward_images = self.backward_images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forward_images += len(x)
        if x.requires_grad:
            x.register_hook(self._count)
        z: Tensor = self.encoder(x)
        return z

    def _count(self, gradient: Tensor) -> None:
        self.backward_images += len(gradient)

    @property
    def counts(self) -> tuple[int, int]:
        return self.forward_images, self.backward_images


def _problem(target: Any = "reference") -> tuple[Counting, TwoAFCObjective]:
    encoder = Counting()
    metric = PerceptualMetric(encoder, 8, lipschitz=1.0).eval().requires_grad_(False)
    reference = torch.full((N, 3, 8, 8), 0.5) + 0.01 * torch.randn(N, 3, 8, 8)
    left, right = (reference + 0.1 * torch.randn(N, 3, 8, 8) for _ in range(2))
    objective = TwoAFCObjective(metric, reference, left, right.clamp(0, 1), target)
    encoder.forward_images = 0  # what stays was embedded above
    return encoder, objective


CASES: list[tuple[Callable[..., Tensor], dict[str, Any], int, int]] = [
    # Unbroken within a tiny budget: every pass is made.
    (pgd, {"eps": 1e-5, "steps": 7, "restarts": 3}, 1 + 3 * 8, 3 * 7),
    (apgd, {"eps": 1e-5, "steps": 7, "restarts": 3}, 1 + 3 * 8, 3 * 7),
    (mi_fgsm, {"eps": 1e-5, "steps": 7, "restarts": 3}, 1 + 3 * 8, 3 * 7),
    (square, {"eps": 1e-5, "steps": 7, "restarts": 3}, 1 + 3 * 7, 0),
    (minimal_norm, {"steps": 7, "polish": 0, "starts": 2}, 2 * 9, 2 * 9),
]


@pytest.mark.parametrize(
    ("attack", "options", "forward", "backward"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_counts_are_those_of_the_docstrings(
    attack: Callable[..., Tensor], options: dict[str, Any], forward: int, backward: int
) -> None:
    encoder, objective = _problem()
    x = objective.images
    if attack is minimal_norm:
        options = {**options, "starts": torch.stack([x, x.flip(0)])}
    watched = WatchedObjective(objective, x)
    attack(watched, x, **options)
    passes = watched.passes
    assert (int(passes.forward.sum()), int(passes.backward.sum())) == encoder.counts
    if attack is minimal_norm:  # and up to five passes of the polish, which begins with one look
        assert forward < int(passes.forward[0]) <= forward + 5
        assert torch.equal(passes.forward, passes.backward)
    else:
        assert (passes.forward == forward).all() and (passes.backward == backward).all()


def test_queries_of_one_pixel() -> None:
    encoder, objective = _problem()
    far = _Shifted(objective, 10.0)
    watched = WatchedObjective(far, objective.images)
    one_pixel(watched, objective.images, generations=3, population=6, restarts=2)
    assert (watched.passes.forward == 1 + 2 * 6 * 4).all() and not watched.passes.backward.any()
    assert (int(watched.passes.forward.sum()), 0) == encoder.counts


@pytest.mark.parametrize("queries", [20, 50, 90, 150])
def test_pixels_in_a_suite_ask_no_more_than_their_queries(queries: int) -> None:
    _, objective = _problem()
    found = auto(_Shifted(objective, 10.0), objective.images, norm=0, eps=1, attacks=["one_pixel"], queries=queries)
    # Besides, the suite looks at the clean image and at what was found.
    assert (found.passes.forward <= queries + 3).all() and (found.passes.forward > queries / 2).all()


class _Shifted:
    """An objective moved out of reach."""

    def __init__(self, objective: Objective, by: float) -> None:
        self.objective, self.by = objective, by

    def __call__(self, x: Tensor) -> Tensor:
        return self.objective(x) - self.by

    def select(self, rows: Tensor) -> _Shifted:
        return _Shifted(self.objective.select(rows), self.by)


@pytest.mark.parametrize("attack", [pgd, apgd, mi_fgsm, square, minimal_norm])
def test_samples_that_break_early_cost_less_and_are_counted_exactly(attack: Callable[..., Tensor]) -> None:
    encoder, objective = _problem()
    watched = WatchedObjective(objective, objective.images)
    options = {} if attack is minimal_norm else {"eps": 2.0}
    x_adv = attack(watched, objective.images, steps=20, **options)
    assert (int(watched.passes.forward.sum()), int(watched.passes.backward.sum())) == encoder.counts
    broken = objective(x_adv) > 0
    assert broken.any()
    if attack is not minimal_norm:
        assert (watched.passes.forward[broken] < 22).all()


@pytest.mark.parametrize("norm", [2, "inf", 0])
@pytest.mark.parametrize("target", ["reference", "all"])
def test_the_suite_tells_what_each_attack_cost(norm: Any, target: Any) -> None:
    encoder, objective = _problem(target)
    eps: list[float] = {2: [1e-4, 0.3], "inf": [1e-5, 0.02], 0: [1, 4]}[norm]
    found = auto(objective, objective.images, norm=norm, eps=eps, steps=5, queries=100, parts=objective.parts)
    images = objective.parts  # that the encoder sees in each pass
    assert (images * int(found.passes.forward.sum()), images * int(found.passes.backward.sum())) == encoder.counts
    by = list(found.passes_by.values())
    # One look at each clean image belongs to no attack.
    assert torch.equal(sum(passes.forward for passes in by) + 1, found.passes.forward)  # type: ignore[arg-type]
    assert torch.equal(sum(passes.backward for passes in by), found.passes.backward)
    without = "one_pixel" if norm == 0 else "square"
    assert not found.passes_by[without].backward.any() and found.passes_by["apgd"].backward.any()


def test_one_budget_of_the_suite_costs_what_its_attacks_cost() -> None:
    _, objective = _problem()
    found = auto(
        objective, objective.images, eps=1e-5, attacks=["apgd", "square", "pgd"], steps=4, queries=9, restarts=2
    )
    # Each attack, and a look at what it found.
    assert (found.passes_by["apgd"].forward == 1 + 2 * 5 + 1).all() and (found.passes_by["apgd"].backward == 8).all()
    assert (found.passes_by["square"].forward == 1 + 2 * 9 + 1).all()
    assert (found.passes_by["pgd"].forward == found.passes_by["apgd"].forward).all()


def test_images_tell_what_they_cost() -> None:
    encoder, objective = _problem()
    metric = objective.metric
    images = torch.rand(3, 3, 8, 8)
    told = attack_pair(metric, images[0], images[1], eps=0.1, steps=6, restarts=2).passes
    assert told == {"forward": 1 + 2 * 7, "backward": 12}
    triplet = attack_triplet(metric, *images, eps=1e-6, attacks=["apgd"], steps=6)
    # A look for a tie, one by the suite, the attack, a look at what it found.
    assert triplet.passes == {"forward": 1 + 1 + (1 + 7) + 1, "backward": 6}
    assert triplet.facts()["passes"] == triplet.passes
    assert attack_triplet(metric, images[0], images[1], images[1]).passes == {"forward": 1, "backward": 0}
    assert encoder.backward_images == 18


def test_rows_keep_their_counts() -> None:
    _, objective = _problem()
    watched = WatchedObjective(objective, objective.images)
    rows = torch.tensor([3, 1, 3])
    with torch.no_grad():
        watched.select(rows).select(torch.tensor([0, 2]))(objective.images[[3, 3]])
    assert watched.passes.forward.tolist() == [0, 0, 0, 2, 0] and not watched.no_gradient.any()
    before = watched.passes
    with torch.no_grad():
        watched(objective.images)
    assert before.forward.tolist() == [0, 0, 0, 2, 0]
    assert (watched.passes - before).forward.tolist() == [1] * N
