"""Radii within which the answer to a triplet stays; notation as in :mod:`lipsim.certificates`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipsim.certificates import geometry
from lipsim.certificates.geometry import anchored_norm, angle, binary_scale, project, rotation
from lipsim.certificates.numbers import check_constants
from lipsim.certificates.rounding import bounded_norm, doubles, over_bound, round_down, rounding_error

_TURNS = (2, 1, 1)  # the reference turns against both candidates


def linear_margin(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear margin ``g = ⟨z, w⟩ + κv`` and its slope ``‖w‖`` in feature space, ``(N,)`` each.

    ``g > 0`` where the metric prefers left: normalising the reference does not change the sign of
    ``d(x, x1) − d(x, x0)``, so the decision is a half-space of ``z``.
    """
    check_constants(anchor)
    (p0, s0), (p1, s1) = project(z0, anchor), project(z1, anchor)
    w, v = p0 - p1, s0 - s1
    return (z * w).sum(-1) + anchor * v, anchored_norm(w, 0.0)


def signed_reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0
) -> Tensor:
    """Signed distance of the reference to the decision boundary over ``L``, ``(N,)``: positive prefers left.

    Its absolute value is :func:`reference_radius`; fine-tuning maximises it on the side of the votes.
    """
    check_constants(anchor, lipschitz)
    g, slope = linear_margin(z, z0, z1, anchor=anchor)
    return _ratio(g, lipschitz * slope)


def reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Exact radius ``|g|/(L‖w‖)`` within which a perturbed *reference* keeps its answer, ``(N,)``, at least 0.

    It is the distance of ``z`` to the decision hyperplane, so no larger radius follows from ``z`` and ``L``. It is
    never below :func:`published_radius` for ``anchor ≥ 1``.
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, (z, z0, z1) = z.dtype, doubles(z, z0, z1)
    (p0, s0), (p1, s1) = project(z0, anchor), project(z1, anchor)
    w, v = p0 - p1, s0 - s1
    slope = anchored_norm(w, 0.0)
    # In units of the reference's own size, of which the radius is a multiple, so that no product leaves the range.
    scale = binary_scale(z, anchor)
    z, constant = geometry.scaled(z, anchor, scale)
    error = torch.full_like(scale, feature_error) / scale
    norm = anchored_norm(torch.cat([z, constant.unsqueeze(-1)], -1), 0.0)
    norm0, norm1 = (anchored_norm(t, anchor) - feature_error for t in (z0, z1))
    # A unit vector turns by at most η/‖e‖ when e moves by η; ‖e‖ itself is known to η only, hence the subtraction.
    beta = feature_error / norm0 + feature_error / norm1 + rounding_error(z)
    slack = error * slope + (norm + error) * beta
    known = (norm > error) & (norm0 > 0) & (norm1 > 0)
    g = torch.where(known, ((z * w).sum(-1) + constant * v).abs() - slack, 0.0).clamp(min=0)
    return round_down(over_bound(_ratio(g, slope + beta) * scale, lipschitz), dtype)


def candidate_radii(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Radii within which a perturbed *left* or a perturbed *right* image keeps the answer, ``(N,)`` each.

    ``‖e_i‖·sin(min(|θ_1 − θ_0|, π/2))/L``: exact for ``anchor = 0``, a lower bound above.
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, (z, z0, z1) = z.dtype, doubles(z, z0, z1)
    rounding = rounding_error(z)
    norm, norm0, norm1 = (bounded_norm(t, anchor) for t in (z, z0, z1))
    gap = _gap(z, z0, z1, anchor) - rounding
    turn, turn0, turn1 = (rotation(n, feature_error * (1 + rounding)) for n in (norm, norm0, norm1))
    radii = []
    for moving, still in ((norm0, turn1), (norm1, turn0)):
        free = (gap - 2 * turn - still).clamp(min=0, max=math.pi / 2)
        reach = moving * torch.sin(free) * (1 - rounding) - feature_error
        radii.append(round_down(over_bound(reach.clamp(min=0), lipschitz), dtype))
    return radii[0], radii[1]


def joint_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius of a common budget: all three images may move by less than it, each, and the answer stays, ``(N,)``.

    The largest ε with ``2α(e, Lε) + α(e0, Lε) + α(e1, Lε) < |θ_1 − θ_0|``, by bisection, rounded down. Its gradient is
    that of the equation (implicit differentiation).
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, (z, z0, z1) = z.dtype, doubles(z, z0, z1)
    radius = _joint((z, z0, z1), anchor, rounding_error(z))
    return round_down(over_bound((radius - feature_error).clamp(min=0), lipschitz), dtype)


def signed_joint_radius(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """:func:`joint_radius` with the sign of the margin, ``(N,)``: positive prefers left. What a loss can push."""
    check_constants(anchor, lipschitz)
    g, _ = linear_margin(z, z0, z1, anchor=anchor)
    return torch.sign(g.detach()) * over_bound(_joint((z, z0, z1), anchor), lipschitz)


def published_radius(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """Radius as published with LipSim, ``|⟨p, p0 − p1⟩|/(L‖p0 − p1‖)``, ``(N,)``: for comparison only.

    Not sound for ``anchor = 0`` where ``‖z‖ < 1``: it overclaims there by ``1/‖z‖`` (Ghazanfari et al. 2024, §3).
    """
    check_constants(anchor, lipschitz)
    (p, s), (p0, s0), (p1, s1) = project(z, anchor), project(z0, anchor), project(z1, anchor)
    h = (p * (p0 - p1)).sum(-1) + s * (s0 - s1)
    slope = torch.hypot(anchored_norm(p0 - p1, 0.0), s0 - s1)
    return _ratio(h.abs(), lipschitz * slope)


def _gap(z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
    """How much nearer, as an angle, one candidate is than the other, ``(N,)``."""
    return (angle(z, z1, anchor) - angle(z, z0, anchor)).abs()


def _joint(features: tuple[Tensor, Tensor, Tensor], anchor: float, rounding: float = 0.0) -> Tensor:
    """Joint radius in feature space, in the dtype of the features, rounded down as far as ``rounding`` says."""
    norms = tuple(bounded_norm(t, anchor) for t in features)
    gap = _gap(*features, anchor) - rounding
    with torch.no_grad():
        low, high = torch.zeros_like(gap), torch.minimum(norms[0], torch.minimum(norms[1], norms[2])).expand_as(gap)
        for _ in range(60 if gap.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            holds = _turned(norms, middle * (1 + rounding)) < gap
            low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low + _implicit(norms, gap, low) if gap.requires_grad else low


def _turned(norms: tuple[Tensor, ...], radius: Tensor) -> Tensor:
    """How far the difference of two angles can turn when reference, left and right move by at most ``radius``."""
    reference, left, right = (c * rotation(norm, radius) for c, norm in zip(_TURNS, norms, strict=True))
    return reference + left + right


def _implicit(norms: tuple[Tensor, ...], gap: Tensor, radius: Tensor) -> Tensor:
    """Zeros with the gradient of the ``radius`` that solves ``_turned(norms, radius) = gap``."""
    with torch.no_grad():
        # At the smallest norm the arcsine is vertical; vectors without a length have no gradient.
        radius = torch.minimum(radius, (1 - 1e-6) * torch.stack([n.expand_as(gap) for n in norms]).amin(0))
        known = radius > 0
        radius = torch.where(known, radius, 0.0)
    norms = tuple(torch.where(known, norm, 1.0) for norm in norms)
    slopes = [c / ((n - radius).sqrt() * (n + radius).sqrt()) for c, n in zip(_TURNS, norms, strict=True)]
    slope = (slopes[0] + slopes[1] + slopes[2]).detach()
    excess = torch.where(known, _turned(norms, radius) - gap, 0.0)
    return (excess.detach() - excess) / slope


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0, with zero gradient, where it is not finite."""
    valid = (denominator > 0) & torch.isfinite(denominator) & torch.isfinite(numerator)
    return torch.where(valid, numerator, 0.0) / torch.where(valid, denominator, 1.0)
