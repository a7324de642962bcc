"""Randomized smoothing on decisions whose probabilities under noise are known in closed form."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from scipy import stats
from torch import Tensor

from lipsim.certificates import (
    binomial_lower_bound,
    certify_counts,
    mean_interval,
    smoothed_mean_interval,
    smoothed_radius,
)


@pytest.mark.parametrize("trials", [1, 7, 1000, 100_000])
def test_the_bound_is_a_quantile_of_the_beta_distribution(trials: int) -> None:
    successes = sorted({0, 1, trials // 2, int(0.9 * trials), trials - 1, trials})
    for alpha in (0.9, 0.05, 1e-6):  # a quantile above one half is beyond k/n
        found = binomial_lower_bound(torch.tensor(successes), trials, alpha)
        expected = [float(stats.beta.ppf(alpha, k, trials - k + 1)) if k else 0.0 for k in successes]
        assert found.tolist() == pytest.approx(expected, rel=1e-8)
        assert all(bound <= truth * (1 + 1e-13) for bound, truth in zip(found.tolist(), expected, strict=True))


def test_the_bound_is_never_above_the_exact_one() -> None:
    """As many successes have at most the probability α, in exact arithmetic, and hardly less."""
    for k, alpha in ((30, 0.05), (50, 0.001), (1, 0.001)):
        p = Fraction(float(binomial_lower_bound(torch.tensor([k]), 50, alpha)))
        tail = sum(math.comb(50, j) * p**j * (1 - p) ** (50 - j) for j in range(k, 51))
        assert Fraction(alpha) * (1 - Fraction(1, 10**9)) < tail <= Fraction(alpha)


def test_bounds_of_simulated_draws_cover_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    for p in (0.5, 0.8, 0.95):
        drawn = torch.binomial(torch.full((2000,), 100.0), torch.full((2000,), p), generator=generator).long()
        wrong = float((binomial_lower_bound(drawn, 100, 0.05) > p).double().mean())
        assert 0.005 < wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000), (p, wrong)


def test_the_radius_of_a_half_space_is_its_distance() -> None:
    """And with the counts of draws, it is below the distance, except for a share α."""
    distance = torch.linspace(0.01, 2, 200, dtype=torch.float64)
    for sigma in (0.25, 1.0):
        p = torch.special.ndtr(distance / sigma)
        found = smoothed_radius(p, sigma)
        known = p < 1 - 1e-9  # farther away, p has too few digits
        torch.testing.assert_close(found[known], distance[known], rtol=1e-6, atol=0)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.binomial(torch.full_like(p, 1000), p, generator=generator).long()
        counts = torch.stack([drawn, 1000 - drawn, torch.zeros_like(drawn)], 1)
        certificate = certify_counts(torch.tensor([[1, 0, 0]]).expand(200, -1), counts, sigma=sigma)
        assert int((certificate.radius > distance).sum()) <= 1
        near = (p > 0.7) & (p < 0.999)
        assert bool((certificate.radius > 0.5 * distance)[near].all())
    assert smoothed_radius(torch.tensor([0.5, 0.2, 1.0, math.nan]), 1.0).tolist() == [0, 0, 0, 0]


def test_radii_stay_inside_the_smoothed_slab() -> None:
    """The answer "inside" of a slab ``|t| < c`` under noise: its own boundary is nearer than that of the slab."""
    sigma, c = 0.5, 0.6
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    p = torch.special.ndtr((c - t) / sigma) - torch.special.ndtr((-c - t) / sigma)
    boundary = float(t[p > 0.5].max()) + float(t[1] - t[0])  # beyond it, noise mostly leads outside
    inside = p > 0.5
    found = smoothed_radius(p, sigma)
    assert bool((found <= boundary - t)[inside].all()) and not found[~inside].any()
    assert boundary < c - 0.01 and float(found[0]) > 0.5 * boundary


def test_the_budget_of_all_three_is_that_of_their_stack_over_the_root_of_three() -> None:
    """For a half-space of the stacked images, whose worst change moves each of them by as much, the radius is tight."""
    count, sigma, normal = 10**6, 0.5, torch.ones(3, 5, dtype=torch.float64) / 15**0.5
    x = 0.02 * normal * 30  # 0.6 from the boundary
    distance = float((x * normal).sum())
    left = round(count * float(torch.special.ndtr(torch.tensor(distance / sigma, dtype=torch.float64))))
    counts = torch.tensor([[left, count - left, 0]])
    joint = certify_counts(torch.tensor([[3, 2, 0]]), counts, sigma=sigma, moving=3)
    alone = certify_counts(torch.tensor([[3, 2, 0]]), counts, sigma=sigma)
    assert float(alone.radius) == pytest.approx(3**0.5 * float(joint.radius), rel=1e-12)
    each = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)

    def attacked(length: float) -> Tensor:
        return ((x - length * each) * normal).sum()

    assert attacked(float(joint.radius)) > 0 > attacked(1.02 * float(joint.radius))


def test_answers_that_the_draws_do_not_tell() -> None:
    selection = torch.tensor([[6, 4, 0], [0, 10, 0], [0, 0, 10], [2, 8, 0], [5, 5, 0]])
    counts = torch.tensor([[50, 50, 0], [0, 100, 0], [0, 0, 100], [100, 0, 0], [99, 0, 1]])
    found = certify_counts(selection, counts, sigma=1.0)
    assert found.abstained.tolist() == [True, False, True, True, False]  # the fourth chose the rare answer
    assert found.choice.tolist() == [0, -1, 0, 0, 1] and found.prefers_left.tolist() == [False] * 4 + [True]
    assert (found.radius > 0).tolist() == [False, True, False, False, True]
    assert float(found.p_lower[1]) == pytest.approx(0.001**0.01, rel=1e-9)
    # A tie of the metric counts against an answer as the other one does.
    ties = certify_counts(selection[:1], torch.tensor([[60, 0, 40]]), sigma=1.0)
    others = certify_counts(selection[:1], torch.tensor([[60, 40, 0]]), sigma=1.0)
    assert ties.radius.equal(others.radius)
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert len(certify_counts(empty, empty, sigma=1.0).radius) == 0


def test_intervals_of_means_cover_the_truth_and_contain_the_binomial_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2000, 50, generator=generator, dtype=torch.float64).pow(3)  # mean 1/4
    low, high = mean_interval(values.mean(1), 50, 0.05)
    assert float(((low > 0.25) | (high < 0.25)).double().mean()) <= 0.05
    assert bool((high - low < 0.45).all())
    k = torch.arange(51)
    low, high = mean_interval(k / 50, 50, 0.05)
    rounding = 1e-9  # the same where every draw is a success
    assert bool((low <= binomial_lower_bound(k, 50, 0.025) + rounding).all())
    assert bool((1 - high <= binomial_lower_bound(50 - k, 50, 0.025) + rounding).all())
    assert bool((low <= k / 50).all()) and bool((high >= k / 50).all())
    assert float(low[-1]) == pytest.approx(0.025 ** (1 / 50), rel=1e-6)


def test_ends_near_1_are_rounded_outward() -> None:
    """``KL(mean, μ) = ln(2/α)/n`` at the upper end in 60 digits, and one value away from 1 is not enough for it."""
    with mpmath.workdps(60):
        for mean, samples, alpha in ((0.9955692645973805, 100, 0.001), (0.3, 2, 1e-12), (1e-9, 1, 1e-12)):
            high = float(mean_interval(torch.tensor([mean], dtype=torch.float64), samples, alpha)[1])
            m, end = mpmath.mpf(mean), mpmath.mpf(high)
            assert high < 1
            divergence = m * mpmath.log(m / end) + (1 - m) * mpmath.log((1 - m) / (1 - end))
            assert divergence >= mpmath.log(2 / mpmath.mpf(alpha)) / samples
    # A lower end that is no normal number any more is 0: nothing is known of its digits.
    low, high = smoothed_mean_interval(torch.tensor([0.999]), 10_000, 40.5, sigma=1.0)
    assert low.item() == 0 and high.item() == 1


def test_smoothed_means_of_known_functions() -> None:
    """``E Φ(s(x + σZ)) = Φ(s·x/√(1 + s²σ²))``; with the steepest slope, that of a step, nothing is given away."""
    sigma, eps, samples = 0.5, 0.3, 10**13
    x = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    for slope in (0.5, 3.0, 1e6):

        def mean(x: Tensor, slope: float = slope) -> Tensor:
            return torch.special.ndtr(slope * x / math.sqrt(1 + (slope * sigma) ** 2))

        low, high = smoothed_mean_interval(mean(x), samples, eps, sigma=sigma)
        assert bool((low <= mean(x - eps)).all()) and bool((mean(x + eps) <= high).all())
        widest = (low - mean(x - eps)).abs().max(), (high - mean(x + eps)).abs().max()
        assert max(map(float, widest)) < 1e-5 or slope < 1e6
    # With few draws the whole interval of the truth is still inside.
    low, high = smoothed_mean_interval(mean(x), 1000, 0.0, sigma=sigma)
    assert bool((low < mean(x)).all()) and bool((high > mean(x)).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binomial_lower_bound(torch.tensor([3]), 2, 0.1), "from 0 to the number of trials 2"),
        (lambda: binomial_lower_bound(torch.tensor([1.0]), 2, 0.1), "successes in int64"),
        (lambda: binomial_lower_bound(torch.tensor([1]), 2, 1.0), "alpha < 1"),
        (lambda: binomial_lower_bound(torch.tensor([1]), 2, 0.0), "alpha > 0"),
        (lambda: smoothed_radius(torch.tensor([0.9]), 0.0), "sigma > 0"),
        (lambda: mean_interval(torch.tensor([1.1]), 5, 0.1), r"values in \[0, 1\]"),
        (lambda: smoothed_mean_interval(torch.tensor([0.5]), 5, -1.0, sigma=1.0), "eps ≥ 0"),
        (lambda: certify_counts(torch.tensor([[1, 0, 0]]), torch.tensor([[9, -9, 9]]), sigma=1.0), "0 or more, got -9"),
        (lambda: certify_counts(torch.ones(2, 2), torch.ones(2, 2), sigma=1.0), r"counts \(N, 3\) in int64"),
        (
            lambda: certify_counts(torch.tensor([[1, 0, 0]] * 2), torch.tensor([[1, 0, 0], [2, 0, 0]]), sigma=1.0),
            "as many draws for each triplet",
        ),
    ],
)
def test_what_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
