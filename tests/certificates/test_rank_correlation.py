"""Certified intervals of correlations against brute force: every order of few pairs, and distances within intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from lipsim.certificates import kendall_interval, pearson_interval, spearman_interval
from lipsim.certificates import rank_correlation as R

Array = np.ndarray
INTERVALS = {"kendall": kendall_interval, "spearman": spearman_interval, "pearson": pearson_interval}


def correlations(scores: Array, distances: Array) -> dict[str, Array]:
    """Each coefficient of scores ``(N,)`` with many choices of distances ``(M, N)``, not all equal, from its sums."""
    i, j = np.triu_indices(len(scores), 1)
    of_scores = np.sign(scores[i] - scores[j])
    of_distances = np.sign(distances[:, i] - distances[:, j])
    tied = np.sqrt((of_scores != 0).sum() * (of_distances != 0).sum(1))

    def pearson(x: Array, y: Array) -> Array:
        x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        found: Array = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
        return found

    return {
        "kendall": of_distances @ of_scores / tied,
        "spearman": pearson(stats.rankdata(scores), stats.rankdata(distances, axis=1)),
        "pearson": pearson(scores, distances),
    }


def choices(lower: Array, upper: Array, rng: np.random.Generator, count: int = 600) -> Array:
    """Distances within the intervals: anywhere, at the ends, tied at ends of others; not all equal."""
    shape = (count, len(lower))
    anywhere = lower + (upper - lower) * rng.random(shape)
    ends = np.where(rng.random(shape) < 0.5, lower, upper)
    common = np.clip(rng.choice(np.concatenate([lower, upper]), shape), lower, upper)
    few = np.clip(rng.choice(lower, (count, 1)), lower, upper)
    found = np.clip(np.concatenate([anywhere, ends, common, few, [lower, upper]]), lower, upper)
    different: Array = found[(found != found[:, :1]).any(1)]
    return different


def test_the_sums_here_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, distances = rng.integers(0, 4, 9).astype(float), rng.integers(0, 5, (1, 9)).astype(float)
        found = correlations(scores, distances)
        assert found["kendall"][0] == pytest.approx(stats.kendalltau(scores, distances[0]).statistic)
        assert found["spearman"][0] == pytest.approx(stats.spearmanr(scores, distances[0]).statistic)
        assert found["pearson"][0] == pytest.approx(stats.pearsonr(scores, distances[0]).statistic)


def test_nothing_within_the_intervals_is_outside() -> None:
    rng = np.random.default_rng(0)
    reached = dict.fromkeys(INTERVALS, 0)
    for _ in range(80):
        count = int(rng.integers(2, 9))
        scores = rng.integers(0, rng.integers(2, 9), count).astype(float)
        if (scores == scores[0]).all():
            continue
        centre = scores * rng.uniform(-0.6, 0.6) + rng.normal(size=count)
        half = rng.random(count) * rng.choice([0.0, 0.1, 0.5, 2.0])
        if rng.random() < 0.5:  # ends that touch, and ties
            centre, half = centre.round(), (2 * half).round() / 2
        lower, upper = centre - half, centre + half
        distances = choices(lower, upper, rng)
        if not len(distances):
            continue
        values = correlations(scores, distances)
        for name, interval in INTERVALS.items():
            low, high = interval(*map(torch.tensor, (scores, lower, upper)))
            assert -1 <= low <= values[name].min() + 1e-12, (name, scores, lower, upper)
            assert 1 >= high >= values[name].max() - 1e-12, (name, scores, lower, upper)
            reached[name] += values[name].min() < low + 1e-9
    # Rank correlations are attained at an end more often than not.
    assert reached["kendall"] > 40 and reached["spearman"] > 40


@pytest.mark.parametrize("scores", [[1, 2, 3, 4, 5], [1, 1, 2, 2, 3], [0, 1, 1, 1, 0], [2, 1, 1, 2, 2]])
def test_all_orders_are_possible_where_all_intervals_overlap(scores: list[float]) -> None:
    """Every weak order of five: the intervals end at the extremes exactly, -1 and 1."""
    y = np.array(scores, dtype=float)
    weak = np.array([order for order in itertools.product(range(5), repeat=5) if len(set(order)) > 1], dtype=float)
    values = correlations(y, weak)
    ends = torch.tensor(y), torch.zeros(5), torch.full((5,), 4.0)
    for name in ("kendall", "spearman"):
        assert values[name].min() == pytest.approx(-1) and values[name].max() == pytest.approx(1)
        assert INTERVALS[name](*ends) == (-1, 1)
    assert pearson_interval(*ends) == (-1, 1)


def test_known_distances_have_their_correlation() -> None:
    rng = np.random.default_rng(1)
    for scores in (rng.random(40), rng.integers(0, 6, 40).astype(float)):
        distances = scores + rng.normal(size=40)
        expected = correlations(scores, distances[None])
        d = torch.tensor(distances)
        for name, interval in INTERVALS.items():
            assert interval(torch.tensor(scores), d, d) == pytest.approx(2 * (expected[name][0],), abs=1e-11)


def test_intervals_grow_and_mirror() -> None:
    rng = np.random.default_rng(2)
    scores = torch.tensor(rng.integers(0, 10, 60).astype(float))
    centre = scores / 10 + torch.tensor(rng.normal(size=60)) / 5
    for interval in INTERVALS.values():
        widths = [interval(scores, centre - half, centre + half) for half in (0.0, 0.01, 0.03, 0.1, 3.0)]
        assert all(a[0] >= b[0] - 1e-12 and a[1] <= b[1] + 1e-12 for a, b in itertools.pairwise(widths))
        assert widths[1][0] < widths[0][0] and widths[-1] == (-1, 1)
        low, high = widths[2]
        assert interval(-scores, centre - 0.03, centre + 0.03) == pytest.approx((-high, -low), abs=1e-12)


def test_tables_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    scores, centre = torch.tensor(rng.integers(0, 9, 50).astype(float)), torch.tensor(rng.random(50))
    whole = [interval(scores, centre - 0.1, centre + 0.1) for interval in (kendall_interval, spearman_interval)]
    monkeypatch.setattr(R, "_ROWS", 7)
    assert whole == [interval(scores, centre - 0.1, centre + 0.1) for interval in (kendall_interval, spearman_interval)]


@pytest.mark.parametrize(("far", "wide"), [(1e9, 1e-5), (1e14, 0.5)])
def test_what_rounding_loses_is_covered(far: float, wide: float) -> None:
    """Scores and distances far from 0, of which little is left beside their means; near 0 no digit is lost."""
    rng = np.random.default_rng(4)
    widest = 0.0
    for _ in range(30):
        scores = far + np.round(1e4 * rng.random(30)) / 16
        distances = scores + np.round(1e2 * rng.normal(size=30)) / 16
        near = (scores - far, distances[None] - far)  # exact
        low, high = pearson_interval(*map(torch.tensor, (scores, distances, distances)))
        value = correlations(*near)["pearson"][0]
        assert low <= value <= high
        widest = max(widest, high - low)
    assert 0 < widest < wide


@pytest.mark.parametrize("unit", [1e-300, 1e-158, 1e290])
def test_the_unit_of_distances_and_scores_does_not_matter(unit: float) -> None:
    """Squares of such numbers are none that float64 holds."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        scores = rng.normal(size=12)
        lower = scores + rng.normal(size=12) / 10
        upper = lower + rng.random(12) / 100
        found = pearson_interval(*map(torch.tensor, (scores * unit, lower * unit, upper * unit)))
        assert found == pytest.approx(pearson_interval(*map(torch.tensor, (scores, lower, upper))), abs=1e-9)


@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)
@pytest.mark.parametrize(
    ("scores", "lower", "upper", "message"),
    [
        ([1.0], [0.0], [1.0], "at least two pairs"),
        ([1.0, 2.0], [0.0], [1.0], "at least two pairs"),
        ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0], "scores that differ, got 1.0"),
        ([1.0, float("nan")], [0.0, 0.0], [1.0, 1.0], "finite"),
        ([1.0, 2.0], [0.0, 0.0], [1.0, float("inf")], "finite"),
        ([1.0, 2.0], [0.0, 0.5], [1.0, 0.4], "lower ≤ upper"),
    ],
)
def test_what_has_no_correlation_is_refused(
    interval: Callable[..., object], scores: list[float], lower: list[float], upper: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interval(torch.tensor(scores), torch.tensor(lower), torch.tensor(upper))
