"""Objectives say what is broken, and have a slope wherever an attack may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipsim.attacks import DistanceObjective, apgd, auto
from lipsim.attacks.objectives import UnendingObjective, value_and_gradient
from lipsim.attacks.retrieval import RetrievalObjective
from lipsim.metric import PerceptualMetric


def _at(*degrees: float) -> Tensor:
    """Images ``(N, 3, 1, 1)`` whose first two values lie on a circle around (0.5, 0.5)."""
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return (0.5 + 0.4 * torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 1)).view(-1, 3, 1, 1)


class _Plane(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] - 0.5


def test_the_rival_of_a_unanimous_vote_is_the_nearest_other_label() -> None:
    metric = PerceptualMetric(_Plane(), 1, anchor=0.0, lipschitz=1.0).double()
    labels = torch.tensor([4, 4, 4, 0, 0, 2, 2, 3])
    items = metric.embed(_at(0, 2, -2, 170, 172, 30, 32, 60))
    unit = torch.nn.functional.normalize(torch.cat([items, torch.zeros(8, 1, dtype=items.dtype)], 1), dim=1)
    query = _at(0, 45)
    found = RetrievalObjective(metric, query, unit, labels, torch.tensor([4, 4]), 3, "vote")
    assert found.rival.tolist() == [2, 2]  # none of three votes, and two of them
    assert (found(query) > 0).tolist() == [False, True]
    # Halfway to the next label the vote turns: far nearer than to label 0, the first of those without a vote.
    half = 2 * 0.4 * math.sin(math.radians(16.5) / 2)
    moved = apgd(found.select(torch.tensor([0])), query[:1], eps=1.1 * half, steps=20)
    assert bool(found.select(torch.tensor([0]))(moved) > 0)


def test_a_distance_that_rounding_leaves_below_zero_is_attacked() -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().flatten(1).sum(1) - torch.tensor([1e-6, 0.0, -1e-6])

    x = torch.full((3, 3, 2, 2), 0.5)
    objective = DistanceObjective(distance, x)
    assert bool((objective(x) <= 0).all())
    moved = apgd(objective, x, eps=0.1, steps=5)
    assert torch.allclose((moved - x).flatten(1).norm(dim=1), torch.tensor(0.1))


def test_what_nothing_breaks_is_negative_and_has_a_slope_however_far_it_is() -> None:
    class Line:
        def __call__(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1)

        def select(self, rows: Tensor) -> Line:
            return self

    levels = torch.tensor([-1000.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0, 150.0, 1e6])
    value, gradient = value_and_gradient(UnendingObjective(Line()), levels.view(-1, 1))
    assert bool((value < 0).all()) and bool((value.diff() > 0).all()) and bool((gradient > 0).all())
    # One slope on both sides of 0, that of softplus.
    assert torch.allclose(gradient[2:5].flatten(), torch.tensor(0.5), atol=1e-4)
    assert torch.allclose(value[:4], torch.nn.functional.logsigmoid(levels[:4]))


@pytest.mark.parametrize("index", [[0], [0, 1, 2, 3]])
def test_a_suite_wants_one_index_a_sample(index: list[int]) -> None:
    x = torch.full((2, 3, 2, 2), 0.5)
    objective = DistanceObjective(lambda x, y: (x - y).flatten(1).norm(dim=1), x, threshold=0.5)
    with pytest.raises(ValueError, match=rf"one index a sample, got {len(index)} for 2"):
        auto(objective, x, eps=0.1, index=index)
