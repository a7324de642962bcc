"""Certificates of a mean over tiles: one budget for an image, which a perturbation spreads over its tiles as it likes.

An image is cut into ``T`` tiles, each with features ``e_t = (z_t, κ)`` of its own, and what is certified is the mean
over the tiles of their distances or margins. A perturbation of length ``r`` moves tile ``t`` by ``r_t`` with
``Σ r_t² = r²``, hence ``e_t`` by at most ``ρ_t = L·r_t`` and its direction by at most ``α_t = arcsin(ρ_t/‖e_t‖)``. Each
quantity here is a sum of ``a_t·cos φ_t`` over angles ``φ_t`` between ``e_t`` and a vector that stays, so it loses at
most ``D_t(α_t) = a_t·(cos φ_t − cos(φ_t + α_t))`` in each tile, which a vector of features that moves freely reaches:
for ``κ = 0`` nothing smaller can be said of a tile, and for ``κ > 0``, whose coordinate does not move, it is a bound.

The worst split maximises ``Σ D_t`` under ``Σ ‖e_t‖² sin² α_t ≤ ρ²``. It is not concave, so what is used is its
Lagrangian dual: for *every* multiplier ``λ ≥ 0``

    Σ D_t ≤ λρ² + Σ_t max_α [D_t(α) − λ‖e_t‖² sin² α],

which is exact where the envelopes of the ``D_t`` are reached (it always is for one tile) and a bound otherwise. The
inner maximum is found exactly. With ``c = λ‖e_t‖²/a_t`` the derivative has the sign of ``q(α) − c``, where ``q(α) =
(sin φ/sin α + cos φ/cos α)/2`` decreases up to ``α_m`` with ``tan³ α_m = tan φ`` (all the way for ``φ > π/2``, where
``cos φ < 0``) and increases from there. So the maximum is at the one root of ``q = c`` before ``α_m``, which a bracket
of a checked change of sign holds, or at the end of the interval. Any ``λ`` gives a true bound, so a search for the best
one cannot err.

Without an anchor a tile of zero features has no direction, and then the image has none
(:class:`lipsim.metric.TiledMetric`): its distance from every other is 1. So no radius reaches beyond the shortest tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import Anchored, along, one_minus_cos, stacked_rotation, unit_angle
from lipsim.certificates.joint import joint_budget
from lipsim.certificates.numbers import check_constants, check_number
from lipsim.certificates.pixels import certified_pixels
from lipsim.certificates.rounding import bounded_norm, over_bound, round_down, round_up, rounding_error
from lipsim.certificates.triplets import TwoAFCCertificate

_MULTIPLIERS, _ZOOMS = 24, 7  # of the search for the best multiplier, on a logarithmic scale
_NEWTON = 20
_BRACKET = 1e-12  # relative width around the root of a derivative
_STEPS, _CLOSE = 24, 1e-8  # of the search for a radius, and its relative width
_SHAVE = 1 - 1e-11  # more than the roundings of sums over tiles are worth


@dataclass(frozen=True)
class Losses:
    """What a sum over tiles can lose, ``a·(cos φ − cos(φ + α))`` each, ``(N, T)`` float64.

    Attributes:
        scale: ``a ≥ 0``.
        angle: ``φ`` in [0, π].
        norm: ``‖e‖``, rounded down.
    """

    scale: Tensor
    angle: Tensor
    norm: Tensor

    def worst(self, budget: Tensor) -> Tensor:
        """More than the sum over tiles loses to ``Σ ρ_t² ≤ budget²``, ``(N,)``; at least 0."""
        budget = budget.unsqueeze(-1)
        most, _ = self._ends(budget)
        least = most.sum(-1)  # every tile with all of the budget: the multiplier 0
        top = least / budget[:, 0].square()
        low, high = top.log() - 12, top.log() + 0.1

        def loses(multipliers: Tensor) -> tuple[Tensor, Tensor]:
            best, place = (multipliers * budget[:, 0].square() + self._dual(multipliers, budget)).min(0)
            return best, place

        found = torch.minimum(least, loses((most / budget.square()).T)[0])  # the kinks of the dual
        for _ in range(_ZOOMS):
            multipliers = _between(low, high)
            best, place = loses(multipliers)
            found = torch.minimum(found, best)
            low, high = _around(low, high, place)
        found = torch.where(torch.isfinite(found), found, least)
        return torch.where(budget[:, 0] > 0, found, 0.0)

    def radius(self, margin: Tensor) -> Tensor:
        """A budget ``(N,)`` of which no split makes a margin ``(N,)`` vanish: ``Σ D_t < margin``; at least 0."""
        margin = torch.where(margin > 0, margin, 0.0)  # also where it is NaN
        # Beyond this every tile can be turned around.
        limit = self.norm.square().sum(-1).sqrt()
        limit = torch.where((margin > 0) & torch.isfinite(limit), limit, 0.0)
        # What a margin survives jumps where a budget gets large enough to turn a tile around.
        jumps = torch.cat([self.norm * (1 - 1e-12), self.norm * (1 + 1e-12)], -1).sort(-1).values
        jumps = jumps.expand(*limit.shape, -1)  # the margins may be of more images than the norms
        certified, high, domain = torch.zeros_like(limit), limit, limit
        left, right = torch.full_like(limit, math.inf), torch.zeros_like(limit)  # how far the ends are off
        for step in range(_STEPS):
            survived = self._survived(margin, domain)
            low, holds = torch.minimum(domain, survived), survived >= domain
            certified = torch.maximum(certified, torch.where(torch.isfinite(low), low, 0.0))
            high = torch.maximum(torch.minimum(high, torch.where(holds, survived, domain)), certified)
            left, right = torch.where(holds, survived - domain, left), torch.where(holds, right, survived - domain)
            if bool((high <= certified * (1 + _CLOSE)).all()):
                break
            if step % 2 == 0:  # nearly always enough: what is survived is the same in a range of domains
                domain = torch.minimum(torch.where(holds, high, certified * (1 + _CLOSE)), high)
                continue
            share = torch.where(torch.isfinite(left), left / (left - right), 0.5).clamp(0.05, 0.95)
            share = torch.where(torch.isfinite(share) & (step % 4 > 1), share, 0.5)
            domain = certified + share * (high - certified)
            first = (jumps <= certified.unsqueeze(-1)).sum(-1)
            between = (jumps < high.unsqueeze(-1)).sum(-1) - first
            place = (first + between // 2).clamp(max=jumps.shape[-1] - 1).unsqueeze(-1)
            domain = torch.where(between > 0, jumps.gather(-1, place).squeeze(-1), domain)
        return certified

    def _survived(self, margin: Tensor, domain: Tensor) -> Tensor:
        """What a margin survives as far as the dual says that knows no split of more than ``domain``, ``(N,)``."""
        budget = domain.unsqueeze(-1)
        most, _ = self._ends(budget)
        top = margin / domain.square()
        low, high = top.log() - 12, top.log() + 40

        def survives(multipliers: Tensor) -> tuple[Tensor, Tensor]:
            kept = (margin - self._dual(multipliers, budget)).clamp(min=0)
            best, place = torch.where(multipliers > 0, kept / multipliers, 0.0).sqrt().max(0)
            return best, place

        # Where a tile changes from losing nothing to losing all it can, the dual has a kink.
        found, _ = survives((most / budget.square()).T)
        for _ in range(_ZOOMS):
            multipliers = _between(low, high)
            best, place = survives(multipliers)
            found = torch.maximum(found, best)
            low, high = _around(low, high, place)
        found = torch.where(torch.isfinite(found), found, 0.0)
        return torch.where(most.sum(-1) < margin, math.inf, found)

    def _ends(self, budget: Tensor) -> tuple[Tensor, Tensor]:
        """What each tile loses to all of the budget ``(N, 1)``, and the largest angle short of turning around."""
        ratio = budget / self.norm
        turned = ~(ratio < 1)  # also where the norm is 0
        end = torch.asin(torch.where(turned, 1.0, ratio))
        loss = torch.where(turned, self.scale * (1 + torch.cos(self.angle)), self._loss(end))
        return loss, end

    def _loss(self, alpha: Tensor) -> Tensor:
        """``a·(cos φ − cos(φ + α))`` up to the largest, where ``φ + α = π``."""
        alpha = torch.minimum(alpha, math.pi - self.angle)
        return 2 * self.scale * torch.sin(alpha / 2) * torch.sin(self.angle + alpha / 2)

    def _dual(self, multiplier: Tensor, budget: Tensor) -> Tensor:
        """``Σ_t max [D_t(α) − λ‖e_t‖² sin² α]`` over angles within the budget, ``(M, N)`` for M multipliers."""
        square = self.norm.square()
        weight = multiplier.unsqueeze(-1) * square  # (M, N, T)
        most, end = self._ends(budget)
        # At the end of the interval; where the budget turns a tile around, for the price of doing so.
        price = torch.where(budget < self.norm, budget.square(), square)
        best = (most - multiplier.unsqueeze(-1) * price).clamp(min=0)
        smooth = self._loss(end) - weight * torch.sin(end).square()
        best = torch.maximum(best, smooth)
        # At the root of the derivative. A scale of 0 loses nothing.
        sine, cosine = torch.sin(self.angle), torch.cos(self.angle)
        level = weight / torch.where(self.scale > 0, self.scale, 1.0)
        turn = torch.where(cosine > 0, torch.atan(torch.tan(self.angle.clamp(max=math.pi / 2)).pow(1 / 3)), math.pi / 2)
        last = torch.minimum(torch.minimum(turn, end), math.pi - self.angle).expand_as(weight)

        def slope(alpha: Tensor) -> Tensor:
            """The sign of the derivative, as ``q − c`` times ``2 sin α cos α``."""
            return torch.sin(self.angle + alpha) - level * torch.sin(2 * alpha)

        rises = slope(last) > 0  # the whole way: the end is the best
        before, alpha, behind = self._root(level, sine, cosine, last, rises)
        low, high = alpha * (1 - _BRACKET), torch.minimum(alpha * (1 + _BRACKET), last)
        inside = (slope(low) >= 0) & (slope(high) <= 0)
        low, high = torch.where(inside, low, before), torch.where(inside, high, behind)
        low, high = torch.where(rises, last, low), torch.where(rises, last, high)
        best = torch.maximum(best, self._loss(high) - weight * torch.sin(low).square())
        return torch.where(self.scale > 0, best, 0.0).sum(-1)

    def _root(
        self, level: Tensor, sine: Tensor, cosine: Tensor, last: Tensor, rises: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nearly the root of ``sin φ/sin α + cos φ/cos α = 2c`` in ``[0, last]``, by Newton, and a bracket of it."""
        low, high = torch.zeros_like(last), last
        start = sine / (2 * level - cosine)
        alpha = torch.where((start > 0) & (start < 1), torch.asin(start.clamp(0, 1)), last)
        alpha = torch.where(rises, last, torch.minimum(alpha, last))
        for _ in range(_NEWTON):
            s, c = torch.sin(alpha), torch.cos(alpha)
            value = sine * c + cosine * s - 2 * level * s * c
            derivative = cosine * c - sine * s - 2 * level * (c * c - s * s)
            low, high = torch.where(value > 0, alpha, low), torch.where(value > 0, high, alpha)
            step = alpha - value / derivative
            step = torch.where((step > low) & (step < high), step, (low + high) / 2)
            settled = bool(((step - alpha).abs() <= _BRACKET / 4 * alpha).all())
            alpha = step
            if settled:
                break
        return low, alpha, high


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Multipliers ``(M, N)`` whose logarithms are evenly from ``low`` to ``high``."""
    places = torch.linspace(0, 1, _MULTIPLIERS, dtype=low.dtype, device=low.device).unsqueeze(-1)
    return torch.exp(low + (high - low) * places)


def _around(low: Tensor, high: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The interval between the neighbours of the best of :func:`_between`."""
    step = (high - low) / (_MULTIPLIERS - 1)
    centre = low + place * step
    return torch.maximum(centre - step, low), torch.minimum(centre + step, high)


def tiled_margin(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0) -> Tensor:
    """Mean over the tiles of ``d(x, x1) − d(x, x0)``, ``(N,)`` float64, from features ``(N, T, D)``.

    Example:
        >>> z, z0, z1 = (torch.tensor([[p, [1.0, 0.0]]]) for p in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
        >>> tiled_margin(z, z0, z1, anchor=0.0)  # 1 in one tile, 0 in the other
        tensor([0.5000], dtype=torch.float64)
    """
    return _margin(anchor, *(Anchored(features, anchor) for features in (z, z0, z1)))


def certify_tiles(
    reference: Tensor,
    z: Tensor,
    z0: Tensor,
    z1: Tensor,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> TwoAFCCertificate:
    """The certificate of N answers by the mean margin of T tiles, in float64.

    The radii of single images are the worst splits over the tiles; for the joint radius the stacked unit vectors of
    the tiles are one vector, whose angles add up: a change of ``ρ < min_t ‖e_t‖`` turns it most in the tile with the
    shortest features, by ``A`` with ``sin(A/2) = sin(arcsin(ρ/‖e‖)/2)/√T`` (``Σ (1 − cos α_t)`` is a convex function
    of the squares ``ρ_t²``, largest where one has all), and there is no joint radius beyond.

    Args:
        reference: images ``(N, 3, H, W)`` in [0, 1], cut into the tiles.
        z: features ``(N, T, D)`` of the tiles of the references.
        z0: of the left images.
        z1: of the right images.
        anchor: constant coordinate beside the features of a tile.
        lipschitz: bound of the encoder of a tile.
        feature_error: of a tile, that the radii cover.

    Example:
        >>> z, z0, z1 = (torch.tensor([[p, p]]) for p in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]))  # two tiles, both alike
        >>> certificate = certify_tiles(torch.full((1, 3, 2, 2), 0.5), z, z0, z1, anchor=0.0)
        >>> print(f"{certificate.radius.item():.4f}")  # 1 is exact, a turn by 45° in both: here the dual has a gap
        0.9776
    """
    check_constants(anchor, lipschitz, feature_error)
    e, e0, e1 = (Anchored(features, anchor) for features in (z, z0, z1))
    tiles, rounding = z.shape[-2], rounding_error(z)
    norm, norm0, norm1 = (bounded_norm(t, anchor) for t in (e, e0, e1))
    each = along(e.unit, e0.unit, e1.unit)
    margin = _margin(anchor, e, e0, e1)
    left = (margin > 0).unsqueeze(-1)
    theta0, theta1 = unit_angle(e.unit, e0.unit), unit_angle(e.unit, e1.unit)
    off, off0, off1 = (_off(n, feature_error) for n in (norm, norm0, norm1))
    slack = 8 * rounding

    def radius(losses: Losses, loss: Tensor, *others: Tensor) -> Tensor:
        kept = each.sum(-1).abs() - (loss + slack).sum(-1)
        budget = losses.radius(torch.where(kept > 0, kept, 0.0))
        budget = torch.minimum(budget, _directed(anchor, feature_error, losses.norm, *others))
        return _over(budget, tiles, lipschitz, feature_error)

    difference = [a - b for a, b in zip(e0.unit, e1.unit, strict=True)]
    length = torch.sqrt(difference[0].square().sum(-1) + difference[1].square())
    inverse = torch.where(left[:, 0], 1.0, -1.0).unsqueeze(-1) / torch.where(length > 0, length, 1.0)
    toward = (difference[0] * inverse.unsqueeze(-1), difference[1] * inverse)
    found = radius(Losses(length, unit_angle(e.unit, toward), norm), off0 + off1, norm0, norm1)
    return TwoAFCCertificate(
        prefers_left=margin > 0,
        margin=margin,
        radius=found,
        left_radius=radius(
            Losses(torch.ones_like(theta0), torch.where(left, theta0, math.pi - theta0), norm0),
            2 * off + off1,
            norm,
            norm1,
        ),
        right_radius=radius(
            Losses(torch.ones_like(theta1), torch.where(left, math.pi - theta1, theta1), norm1),
            2 * off + off0,
            norm,
            norm0,
        ),
        joint_radius=_over(_joint((e, e0, e1), (norm, norm0, norm1)), tiles, lipschitz, feature_error),
        pixels=certified_pixels(reference, found),
    )


def tiled_distance_interval(
    z: Tensor,
    y: Tensor,
    eps: float,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Interval ``(lower, upper)`` of the mean distance of T tiles when ``x`` moves by at most ``eps``, ``(N,)`` each.

    The tighter of two bounds: that of the worst split, and that of the angle between the stacked unit vectors of the
    tiles (see :func:`certify_tiles`).

    Args:
        z: features ``(N, T, D)`` of the tiles of ``x``.
        y: of the image that stays.
        eps: budget, at least 0.
        anchor: constant coordinate beside the features of a tile.
        lipschitz: bound of the encoder of a tile.
        feature_error: of a tile, that the interval covers.

    Raises:
        ValueError: a negative budget, or features that are neither of as many images nor of one.

    Example:
        >>> z, y = torch.tensor([[[1.0, 0.0]] * 2]), torch.tensor([[[0.0, 1.0]] * 2])
        >>> lower, upper = tiled_distance_interval(z, y, 0.5, anchor=0.0)  # all of it in one tile: 30°, or 21° in both
        >>> print(f"{lower.item():.4f} {upper.item():.4f}")
        0.6464 1.3536
    """
    check_constants(anchor, lipschitz, feature_error)
    check_number("budget eps", eps)
    _check_alike(z, y)
    e, other = Anchored(z, anchor), Anchored(y, anchor)
    tiles, rounding = z.shape[-2], rounding_error(z)
    norm = bounded_norm(e, anchor)
    theta = unit_angle(e.unit, other.unit)
    moved = lipschitz * eps if eps else 0.0
    budget = norm.new_full(norm.shape[:1], (moved + math.sqrt(tiles) * feature_error) / _SHAVE)
    distance = one_minus_cos(theta).sum(-1)
    slack = (_off(bounded_norm(other, anchor), feature_error) + 8 * rounding).sum(-1)
    ones = torch.ones_like(theta)
    upper = (distance + Losses(ones, theta, norm).worst(budget) / _SHAVE + slack) / tiles
    lower = (distance - Losses(ones, math.pi - theta, norm).worst(budget) / _SHAVE - slack) / tiles
    angle = unit_angle(_stacked(e), _stacked(other))
    still = stacked_rotation(
        bounded_norm(other, anchor).amin(-1), norm.new_full(norm.shape[:1], feature_error * math.sqrt(tiles)), tiles
    )
    turn = stacked_rotation(norm.amin(-1), budget, tiles) + still + tiles * rounding
    upper = torch.minimum(upper, one_minus_cos((angle + turn).clamp(max=math.pi)))
    lower = torch.maximum(lower, one_minus_cos((angle - turn).clamp(min=0)))
    without = budget >= _directed(anchor, feature_error, norm, bounded_norm(other, anchor))
    lower = torch.where(without, lower.clamp(max=1), lower)
    upper = torch.where(without, upper.clamp(min=1), upper)
    unknown = torch.isnan(lower) | torch.isnan(upper)
    lower, upper = torch.where(unknown, 0.0, lower.clamp(min=0)), torch.where(unknown, 2.0, upper)
    return round_down(lower, torch.float64), round_up(upper, torch.float64).clamp(max=2)


def tiled_threshold_radius(
    z: Tensor, y: Tensor, threshold: float, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which the mean distance of the tiles stays on its side of a threshold when ``x`` moves, ``(N,)``.

    Args:
        z: features ``(N, T, D)`` of the tiles of ``x``.
        y: of the image that stays.
        threshold: in [0, 2].
        anchor: constant coordinate beside the features of a tile.
        lipschitz: bound of the encoder of a tile.
        feature_error: of a tile, that the radius covers.

    Raises:
        ValueError: the threshold is outside [0, 2], or features that are neither of as many images nor of one.

    Example:
        >>> z, y = torch.tensor([[[1.0, 0.0]] * 2]), torch.tensor([[[0.0, 1.0]] * 2])
        >>> print(f"{tiled_threshold_radius(z, y, 0.5, anchor=0.0).item():.4f}")  # from 90° to 60° in both: √2·sin 30°
        0.7071
    """
    threshold = check_number("threshold in [0, 2], the range of the distance,", threshold, 0, 2)
    check_constants(anchor, lipschitz, feature_error)
    _check_alike(z, y)
    e, other = Anchored(z, anchor), Anchored(y, anchor)
    norm, tiles = bounded_norm(e, anchor), z.shape[-2]
    theta = unit_angle(e.unit, other.unit)
    excess = one_minus_cos(theta).sum(-1) - tiles * threshold
    angle = torch.where((excess > 0).unsqueeze(-1), math.pi - theta, theta)
    slack = (_off(bounded_norm(other, anchor), feature_error) + 8 * rounding_error(z)).sum(-1)
    kept = (excess.abs() - slack).clamp(min=0)
    budget = Losses(torch.ones_like(theta), angle, norm).radius(kept)
    budget = torch.minimum(budget, _directed(anchor, feature_error, norm, bounded_norm(other, anchor)))
    return _over(budget, tiles, lipschitz, feature_error)


def _margin(anchor: float, e: Anchored, e0: Anchored, e1: Anchored) -> Tensor:
    """Mean margin of the tiles, ``(N,)``, with the distance 1 of images of which a tile has no direction."""
    margin = along(e.unit, e0.unit, e1.unit).mean(-1)
    if anchor > 0:
        return margin
    without, *others = ((t.norm == 0).any(-1) for t in (e, e0, e1))
    if not bool((without | others[0] | others[1]).any()):
        return margin
    left, right = (
        torch.where(without | other, 1.0, one_minus_cos(unit_angle(e.unit, t.unit)).mean(-1))
        for other, t in zip(others, (e0, e1), strict=True)
    )
    return torch.where(without | others[0] | others[1], right - left, margin)


def _check_alike(z: Tensor, y: Tensor) -> None:
    """Refuse features ``(N, T, D)`` of unequal numbers of images, but for one against many, or of unequal tiles."""
    if z.ndim != 3 or y.ndim != 3 or z.shape[1:] != y.shape[1:] or (len(z) != len(y) and 1 not in (len(z), len(y))):
        raise LipsimError(
            f"expected features (N, T, D) of as many images on both sides, or of one on either, got {tuple(z.shape)} "
            f"and {tuple(y.shape)}"
        )


def _directed(anchor: float, feature_error: float, norm: Tensor, *others: Tensor) -> Tensor:
    """The budget ``(N,)`` below which every tile has a direction; 0 where a tile of another image may have none.

    That is where its features are no longer than their error: the image is at distance 1 from everything then.
    """
    least = norm.amin(-1)
    if anchor > 0:
        return torch.full_like(least, math.inf)
    for other in others:
        least = torch.where(other.amin(-1) > feature_error * (1 + 2.0**-20), least, 0.0)
    return least


def _off(norm: Tensor, feature_error: float) -> Tensor:
    """By how much a unit vector is off at most where its features are off by ``feature_error``."""
    left = norm - feature_error
    return torch.where(left > 0, feature_error / torch.where(left > 0, left, 1.0), 2.0).clamp(max=2)


def _over(radius: Tensor, tiles: int, lipschitz: float, feature_error: float) -> Tensor:
    """A budget of the features of all tiles as a radius of the image, rounded down."""
    free = (radius * _SHAVE - math.sqrt(tiles) * feature_error).clamp(min=0)
    return round_down(over_bound(free, lipschitz), torch.float64)


def _stacked(e: Anchored) -> tuple[Tensor, Tensor]:
    """The unit vectors of the tiles as one unit vector, in two parts of which the second is 0."""
    features, constant = e.unit
    whole = torch.cat([features, constant.unsqueeze(-1)], -1).flatten(1) / math.sqrt(features.shape[-2])
    return whole, torch.zeros_like(whole[:, 0])


def _joint(e: tuple[Anchored, Anchored, Anchored], norms: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The budget that all three images survive, each, ``(N,)``: that of the stacked unit vectors."""
    whole, left, right = (_stacked(t)[0] for t in e)
    shortest = torch.stack([n.amin(-1) for n in norms])
    tiles = norms[0].shape[-1]
    rounding = tiles * rounding_error(e[0].z)
    return joint_budget((whole, left, right), shortest, tiles=tiles, rounding=rounding)
