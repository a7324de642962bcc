"""Between which values a correlation with fixed scores lies when each of N distances is known to an interval only.

Notation: ``y`` are the scores of people, ``d`` distances with ``lower ≤ d ≤ upper``, each on its own. ``s`` and ``r``
are their ranks (ties share the average), ``σ_ij = sign(d_i − d_j)``. A pair ``i, j`` is *sure* where the intervals do
not touch, so that ``σ_ij`` is known, and *free* otherwise. What holds for every choice of the free signs, each on its
own, holds for every choice of distances: these are a part of the former. So the intervals here are never too narrow,
and may be too wide, as signs that contradict each other (``σ_12 = σ_23 = σ_31``) are admitted. Where all distances are
equal a correlation is not defined; its interval contains 0 then.

All is computed in float64. Sums over pairs are of multiples of ½ below 2⁵³ and have no rounding; the results are
rounded outward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lipsim.certificates import geometry
from lipsim.certificates.errors import LipsimError
from lipsim.certificates.rounding import EPS

_ROWS = 1024  # of the matrix of pairs, at a time


def kendall_interval(scores: Tensor, lower: Tensor, upper: Tensor) -> tuple[float, float]:
    """Interval of Kendall's τ_b between scores and distances, ties in either as τ_b has them.

    ``τ_b = Σ sign(y_i − y_j) σ_ij / √(m_y m_d)`` over pairs ``i < j``, with ``m_y`` and ``m_d`` the numbers of pairs
    that are not tied. Of the sure pairs let ``A`` be the sum and ``K`` the number; of the free ones let ``F`` have
    different scores and ``T`` equal ones. With ``M ≤ F`` of the former and ``t ≤ T`` of the latter not tied, the least
    value is ``(A − M)/√(m_y (K + M + t))``. It falls with ``M``, as ``A ≥ −K``; so ``M = F``, and ``t`` is 0 where the
    numerator is negative and ``T`` where it is not. The largest value is minus the least one of negated scores.

    Args:
        scores: ``(N,)``, high where people see a large difference.
        lower: ``(N,)``, the least each distance can be.
        upper: ``(N,)``, the most it can be.

    Returns:
        The least and the largest value, in [-1, 1].

    Raises:
        ValueError: other shapes, fewer than two pairs, equal scores, NaN, or a lower end above the upper.

    Example:
        >>> scores = torch.tensor([1.0, 2.0, 3.0])
        >>> centre = torch.tensor([0.1, 0.3, 0.5])
        >>> low, high = kendall_interval(scores, centre - 0.05, centre + 0.05)  # no two distances can change places
        >>> print(f"{low:.3f} {high:.3f}")
        1.000 1.000
        >>> low, high = kendall_interval(scores, centre - 0.15, centre + 0.15)  # 1 and 3 stay apart
        >>> print(f"{low:.3f} {high:.3f}")
        -0.333 1.000
    """
    scores, lower, upper = _checked(scores, lower, upper)
    total = num_free = num_free_tied = num_different = 0
    for sign, difference in _pairs(lower, upper, scores):
        order, free = difference.sign(), sign == 0
        total += int((order * sign).sum())
        num_free += int((free & (order != 0)).sum())
        num_free_tied += int((free & (order == 0)).sum())
        num_different += int((order != 0).sum())
    num_sure = math.comb(len(scores), 2) - num_free - num_free_tied

    def least(total: int) -> float:
        numerator = total - num_free
        not_tied = num_sure + num_free + (num_free_tied if numerator >= 0 else 0)
        return numerator / math.sqrt(num_different * not_tied)

    return _outward(least(total), -least(-total))


def spearman_interval(scores: Tensor, lower: Tensor, upper: Tensor) -> tuple[float, float]:
    """Interval of Spearman's ρ between scores and distances, the correlation of their average ranks.

    With ``c = s − (N + 1)/2`` and ``r_i = (N + 1)/2 + ½ Σ_j σ_ij``, the numerator is ``Σ_i c_i r_i =
    ½ Σ_{i<j} (s_i − s_j) σ_ij``, least at ``n = ½ [Σ_sure (s_i − s_j) σ_ij − Σ_free |s_i − s_j|]``. The denominator is
    ``√(V_s (V − T))`` with ``V = (N³ − N)/12``, ``V_s = Σ c²``, and ``T`` the sum of ``(t³ − t)/12`` over groups of
    ``t`` tied distances.

    Where ``n ≥ 0``, ``ρ ≥ n/√(V_s V)``. Where ``n < 0``, ties matter: a group ``G`` of tied distances adds
    ``½ Σ_{i<j∈G} |s_i − s_j|`` to ``n``. Two of its scores differ in rank by no less than they would if ``G`` were all
    there is, so that this is at least ``(t³ − t)/12 − Σ_k (g_k³ − g_k)/12``, with ``g_k`` the number of its members
    in the ``k``-th group of equal scores. Such members have intervals with a common point; if at most ``ω_k`` of the
    ``τ_k`` intervals of that group have one, all these subtractions together are at most ``Q = Σ_k τ_k (ω_k² − 1)/12``.
    So ``ρ ≥ (n + max(0, T − Q))/√(V_s (V − T))``. Up to ``T = Q`` this falls; from there on it rises, as ``n ≥ −V_s``
    and ``V − V_s ≥ Q``. Therefore ``ρ ≥ n/√(V_s (V − Q))``, which is at least -1.

    Args and errors as in :func:`kendall_interval`.

    Example:
        >>> scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> centre = torch.tensor([0.1, 0.3, 0.5, 0.7])
        >>> low, high = spearman_interval(scores, centre - 0.15, centre + 0.15)  # neighbours may change places
        >>> print(f"{low:.3f} {high:.3f}")
        0.400 1.000
    """
    scores, lower, upper = _checked(scores, lower, upper)
    ranks, groups = _average_ranks(scores)
    sure = free = 0.0
    for sign, difference in _pairs(lower, upper, ranks):
        sure += float((difference * sign).sum())
        free += float(difference[sign == 0].abs().sum())
    count = len(scores)
    most = (count**3 - count) / 12
    of_scores = float((ranks - (count + 1) / 2).square().sum())
    common = sum(len(group) * (_most_common(lower[group], upper[group]) ** 2 - 1) for group in groups) / 12

    def least(sure: float) -> float:
        numerator = (sure - free) / 2
        return numerator / math.sqrt(of_scores * (most if numerator >= 0 else most - common))

    return _outward(least(sure), -least(-sure))


def pearson_interval(scores: Tensor, lower: Tensor, upper: Tensor) -> tuple[float, float]:
    """Interval of Pearson's correlation between scores and distances.

    It is the cosine of the angle between both after their means are taken off. Around the middles of their intervals,
    distances move by a vector no longer than that of the half-widths ``h``, which turns theirs by at most
    ``arcsin(‖h‖/‖d − d̄‖)`` (π from 1 on). Where the least numerator ``Σ min(c_i l_i, c_i u_i)``, ``c = y − ȳ``, is
    positive, that over ``‖c‖`` and the largest ``‖d − m‖``, ``m`` the mean of the middles, is a bound as well; the
    better one counts.

    Args and errors as in :func:`kendall_interval`.

    Example:
        >>> scores = torch.tensor([1.0, 2.0, 3.0])
        >>> centre = torch.tensor([0.1, 0.3, 0.5])
        >>> low, high = pearson_interval(scores, centre - 0.02, centre + 0.02)
        >>> print(f"{low:.3f} {high:.3f}")
        0.992 1.000
    """
    scores, lower, upper = _checked(scores, lower, upper)
    # By powers of two, which cost no digit: no square overflows, and none vanishes that counts.
    scores = scores / geometry.binary_scale(scores.unsqueeze(0))
    scale_of_distances = geometry.binary_scale(torch.cat([lower, upper]).unsqueeze(0))
    lower, upper = lower / scale_of_distances, upper / scale_of_distances
    rounding = 8 * (len(scores) + 16) * EPS
    middle = lower / 2 + upper / 2
    half = (upper - middle).maximum(middle - lower) * (1 + rounding)
    c, centred = scores - scores.mean(), middle - middle.mean()
    scale = float(c.abs().max())
    length, reach = _norm(centred), _norm(half) * (1 + rounding)
    if scale == 0 or length == 0:  # what differs is lost in the rounding
        return -1.0, 1.0
    c, scores = c / scale, scores / scale
    # A mean is off by N roundings of the mean size, which may be more than what is left when it is taken off.
    lost = rounding * _norm(scores) / _norm(c), rounding * _norm(middle) / length

    turn = math.pi
    if reach < length * (1 - lost[1]):
        turn = math.asin(reach / (length * (1 - lost[1]))) + rounding + 2 * sum(lost)
    p, q = c / _norm(c), centred / length
    angle = 2 * math.atan2(_norm(p - q), _norm(p + q))
    low, high = math.cos(min(math.pi, angle + turn)), math.cos(max(0.0, angle - turn))

    size = _norm((lower - middle.mean()).abs().maximum((upper - middle.mean()).abs())) * (1 + rounding)
    ends = torch.stack([c * lower, c * upper])
    error = rounding * (1 + float(scores.abs().max())) * float((lower.abs() + upper.abs()).sum())
    least, most = float(ends.amin(0).sum()) - error, float(ends.amax(0).sum()) + error
    product = _norm(c) * (1 + rounding + lost[0]) * size
    if least > 0:
        low = max(low, least / product)
    if most < 0:
        high = min(high, most / product)
    return _outward(low, high)


def _checked(*values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and both ends in float64."""
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1 or values[0].ndim != 1 or len(values[0]) < 2:
        raise LipsimError(
            f"expected scores and both ends of the distances of at least two pairs, (N,) each, got {shapes}"
        )
    scores, lower, upper = (value.detach().double() for value in values)
    if not all(bool(torch.isfinite(value).all()) for value in (scores, lower, upper)):
        raise LipsimError("expected finite scores and distances, got NaN or infinite ones; leave these pairs out")
    if (lower > upper).any():
        raise LipsimError("expected lower ≤ upper for every distance")
    if (scores == scores[0]).all():
        raise LipsimError(f"expected scores that differ, got {float(scores[0])} for every pair: nothing can agree")
    return scores, lower, upper


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))


def _pairs(lower: Tensor, upper: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For some pairs ``i < j`` after others: ``σ_ij``, 0 for free pairs, and the difference of the values."""
    for start in range(0, len(values), _ROWS):
        rows, others = slice(start, start + _ROWS), slice(start, None)
        above = lower[rows].unsqueeze(1) > upper[others]
        below = upper[rows].unsqueeze(1) < lower[others]
        once = torch.ones_like(above).triu(1)
        difference = values[rows].unsqueeze(1) - values[others]
        yield (above.double() - below.double())[once], difference[once]


def _average_ranks(values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Ranks from 1, where equal values share the average; and the positions of each group of equal ones."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)
    ranks = (last - (sizes - 1) / 2.0).double()[group]
    positions = torch.argsort(group, stable=True).split(sizes.tolist())
    return ranks, [part for part in positions if len(part) > 1]


def _most_common(lower: Tensor, upper: Tensor) -> int:
    """How many of some closed intervals have a point in common, at most."""
    # The most are met where one begins.
    begun = torch.searchsorted(lower.sort().values, lower, right=True)
    ended = torch.searchsorted(upper.sort().values, lower)
    return int((begun - ended).max())


def _outward(low: float, high: float) -> tuple[float, float]:
    """Rounded outward, by more than a few operations are off."""
    return max(-1.0, low - 8 * EPS), min(1.0, high + 8 * EPS)
