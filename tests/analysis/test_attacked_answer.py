"""An answer before and after an attack, beside its certificate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lipsim import PerceptualMetric
from lipsim.analysis.attacked_answer import AttackedAnswer, attacked_pair, attacked_triplet
from lipsim.layers import freeze
from lipsim.students import OrthogonalProjection


@pytest.fixture(scope="module")
def metric() -> PerceptualMetric:
    torch.manual_seed(0)
    metric = PerceptualMetric(OrthogonalProjection(8, 12), 8).double()
    return freeze(metric.requires_grad_(False))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.25 + 0.5 * torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=generator)


def test_a_triplet_inside_and_beyond_its_radius(metric: PerceptualMetric, images: Tensor) -> None:
    radius = float(metric.certify(*(image[None] for image in images)).radius)
    inside = attacked_triplet(metric, *images, eps=0.99 * radius, steps=20)
    assert inside.is_certified and inside.holds and inside.is_sound and inside.radius == radius
    assert 0 < inside.length <= 0.99 * radius * (1 + 1e-9)
    assert "is inside the certified radius" in inside.verdict
    # Nearly all of the way: an attack of 99 % of the radius leaves a hundredth of the margin.
    margin = [abs(b - a) for a, b in zip(*inside.distances.values(), strict=True)]
    assert margin[1] < 0.1 * margin[0]
    # The map is affine, so the radius is exact and an attack needs hardly more.
    beyond = attacked_triplet(metric, *images, eps=1.05 * radius, steps=20)
    assert {beyond.before, beyond.after} == {"left", "right"} and beyond.before == inside.before
    assert not beyond.is_certified and not beyond.holds and beyond.is_sound and beyond.length >= radius
    assert f"turned the answer to “{beyond.after}”" in beyond.verdict
    for name, other in (("d(reference, left)", images[1]), ("d(reference, right)", images[2])):
        found = [float(metric(image[None], other[None])) for image in (beyond.clean, beyond.attacked)]
        assert beyond.distances[name] == pytest.approx(found)


def test_a_pair_by_its_threshold(metric: PerceptualMetric, images: Tensor) -> None:
    distance = float(metric(images[:1], images[1:2]))
    for threshold, before, after in ((0.7 * distance, "different", "same"), (1.3 * distance, "same", "different")):
        still = attacked_pair(metric, images[0], images[1], threshold=threshold, eps=0.0)
        assert still.holds and still.length == 0 and still.distances["d"] == (distance, distance)
        inside = attacked_pair(metric, images[0], images[1], threshold=threshold, eps=0.99 * still.radius, steps=20)
        beyond = attacked_pair(metric, images[0], images[1], threshold=threshold, eps=2 * still.radius, steps=20)
        assert (inside.before, inside.after) == (before, before) and inside.is_certified and inside.is_sound
        assert (beyond.before, beyond.after) == (before, after) and not beyond.is_certified and beyond.is_sound
        assert beyond.interval and beyond.interval[0] <= beyond.distances["d"][1] <= beyond.interval[1]


def test_a_tie_and_a_broken_certificate(metric: PerceptualMetric, images: Tensor) -> None:
    tie = attacked_triplet(metric, images[0], images[1], images[1], eps=1.0, steps=2)
    assert (tie.before, tie.radius, tie.is_certified) == ("tie", 0.0, False) and tie.verdict.startswith("A tie")
    answer = AttackedAnswer("left", "right", {}, None, 1.0, 0, 0.5, 0.5, images[0], images[1])
    assert not answer.is_sound and "a fault of this package" in answer.verdict
    outside = dataclasses.replace(answer, after="left", interval=(0.1, 0.2), distances={"d": (0.15, 0.21)})
    assert outside.holds and not outside.is_sound
    change, gain = answer.change()
    assert gain * float((images[1] - images[0]).abs().max()) == pytest.approx(0.5)
    assert float(change.min()) >= 0 and float(change.max()) <= 1


def test_the_rounding_of_a_distance_breaks_no_certificate() -> None:
    """Intervals are of exact arithmetic where a metric has no feature error, and distances of float32."""
    torch.manual_seed(0)
    metric = freeze(PerceptualMetric(OrthogonalProjection(8, 12), 8).requires_grad_(False))
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        x, y = torch.rand(2, 3, 8, 8, generator=generator)
        answer = attacked_pair(metric, x, y, threshold=0.1, eps=1e-7, steps=1)  # type: ignore[arg-type]
        low, high = answer.interval or (2.0, 0.0)
        assert answer.is_sound and high - low < 1e-6
        far = dataclasses.replace(answer, distances={"d": (low, high + 2e-6)})
        assert not far.is_sound


def test_what_has_no_bound(metric: PerceptualMetric, images: Tensor) -> None:
    unbounded = PerceptualMetric(metric.encoder, 8, lipschitz=torch.inf)
    with pytest.raises(ValueError, match="no Lipschitz bound"):
        attacked_triplet(unbounded, *images, eps=1.0)
    with pytest.raises(ValueError, match="threshold in"):
        attacked_pair(metric, images[0], images[1], threshold=3.0, eps=1.0)


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_no_budget_is_no_certificate(metric: PerceptualMetric, images: Tensor, eps: float) -> None:
    with pytest.raises(ValueError, match="eps ≥ 0"):
        attacked_triplet(metric, *images[:3], eps=eps)
    with pytest.raises(ValueError, match="eps ≥ 0"):
        attacked_pair(metric, images[0], images[1], threshold=0.1, eps=eps)
