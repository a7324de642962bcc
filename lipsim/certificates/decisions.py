"""Radii within which the answer to a triplet stays; notation as in :mod:`lipsim.certificates`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipsim.certificates.geometry import (
    HALF,
    Anchored,
    along,
    anchored_norm,
    binary_scale,
    project,
    rotation,
    scaled,
    scaled_norm,
    unit_angle,
)
from lipsim.certificates.numbers import check_constants
from lipsim.certificates.rounding import (
    Features,
    anchored,
    bounded_norm,
    over_bound,
    round_down,
    rounding_error,
)

Parts = tuple[Tensor, Tensor]  # of features and of the anchor


def linear_margin(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear margin ``g = ⟨z, w⟩ + κv`` and its slope ``‖w‖`` in feature space, ``(N,)`` each.

    ``g > 0`` where the metric prefers left: normalising the reference does not change the sign of
    ``d(x, x1) − d(x, x0)``, so the decision is a half-space of ``z``. Half precision is that of the results alone.
    """
    check_constants(anchor)
    if (dtype := z.dtype) in HALF:
        g, slope = linear_margin(z.float(), z0.float(), z1.float(), anchor=anchor)
        return g.to(dtype), slope.to(dtype)
    left, right = project(z0, anchor), project(z1, anchor)
    return along((z, anchor), left, right), anchored_norm(left[0] - right[0], 0.0)


def margin(z: Features, z0: Features, z1: Features, *, anchor: float = 1.0, least_norm: float = 0.0) -> Tensor:
    """Margin ``h = d(x, x1) − d(x, x0)``, ``(N,)``, in the dtype of the features: positive where left is nearer.

    ``h = g/‖e‖``: no cancellation between two distances, and exactly 0 for equal candidates. NaN for a reference of
    zero features without an anchor, or 0 with a ``least_norm`` above 0 in the place of its ``‖e‖``.
    """
    check_constants(anchor)
    if isinstance(z, Tensor) and isinstance(z0, Tensor) and isinstance(z1, Tensor):
        if (dtype := z.dtype) in HALF:  # of the result alone
            return margin(z.float(), z0.float(), z1.float(), anchor=anchor, least_norm=least_norm).to(dtype)
        scale = binary_scale(z, anchor)
        features, constant = scaled(z, anchor, scale)
        norm = scaled_norm(features, constant if anchor else None)
        left, right = project(z0, anchor), project(z1, anchor)
    else:
        _, (e, e0, e1) = anchored(anchor, z, z0, z1)
        scale, (features, constant), norm, left, right = e.scale, e.scaled, e.scaled_norm, e0.unit, e1.unit
    # Both in units of the reference's own size, so that neither leaves the range of numbers.
    return along((features, constant), left, right) / norm.clamp(min=torch.full_like(scale, least_norm) / scale)


def signed_reference_radius(
    z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0
) -> Tensor:
    """Signed distance of the reference to the decision boundary over ``L``, ``(N,)``: positive prefers left.

    Its absolute value is :func:`reference_radius`; fine-tuning maximises it on the side of the votes.

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([3.0, 4.0], [1.0, 0.0], [0.0, 1.0]))
        >>> print(f"{signed_reference_radius(z, z0, z1).item():.4f}")  # (3, 4) is nearer to the right one
        -0.7071
    """
    check_constants(anchor, lipschitz)
    g, slope = linear_margin(z, z0, z1, anchor=anchor)
    return _ratio(g, lipschitz * slope)


def reference_radius(
    z: Features, z0: Features, z1: Features, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Exact radius ``|g|/(L‖w‖)`` within which a perturbed *reference* keeps its answer, ``(N,)``, at least 0.

    It is the distance of ``z`` to the decision hyperplane, so no larger radius follows from ``z`` and ``L``. For
    ``anchor ≥ 1`` it is never below :func:`published_radius`, but for the last digits, which are rounded down here.

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([3.0, 4.0], [1.0, 0.0], [0.0, 1.0]))
        >>> print(f"{reference_radius(z, z0, z1).item():.4f}")  # how far (3, 4) is from the diagonal
        0.7071
        >>> print(f"{reference_radius(z, z0, z1, lipschitz=2.0).item():.4f}")  # where the encoder may stretch by two
        0.3536
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, (e, e0, e1) = anchored(anchor, z, z0, z1)
    plain = e.plain and e0.plain and e1.plain
    slope = _length(e0.unit[0] - e1.unit[0], plain)
    # In units of the reference's own size, of which the radius is a multiple, so that no product leaves the range.
    error = torch.full_like(e.scale, feature_error) / e.scale
    features, constant = e.scaled
    norm = _length(torch.cat([features, constant.unsqueeze(-1)], -1), plain)
    norm0, norm1 = e0.norm - feature_error, e1.norm - feature_error
    # A unit vector turns by at most η/‖e‖ when e moves by η; ‖e‖ itself is known to η only, hence the subtraction.
    beta = feature_error / norm0 + feature_error / norm1 + rounding_error(e.z)
    slack = error * slope + (norm + error) * beta
    known = (norm > error) & (norm0 > 0) & (norm1 > 0)
    g = torch.where(known, along(e.scaled, e0.unit, e1.unit).abs() - slack, 0.0).clamp(min=0)
    return round_down(over_bound(_ratio(g, slope + beta) * e.scale, lipschitz), dtype)


def candidate_radii(
    z: Features, z0: Features, z1: Features, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Radii within which a perturbed *left* or a perturbed *right* image keeps the answer, ``(N,)`` each.

    ``‖e_i‖·sin(min(|θ_1 − θ_0|, π/2))/L``: exact for ``anchor = 0``, a lower bound above.

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([1.0, 0.0], [1.0, 1.0], [0.0, 1.0]))
        >>> left, right = candidate_radii(z, z0, z1, anchor=0.0)  # at 45° and at 90° from the reference
        >>> print(f"{left.item():.4f} {right.item():.4f}")  # sin 45° times the norm of each
        1.0000 0.7071
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, (e, e0, e1) = anchored(anchor, z, z0, z1)
    rounding = rounding_error(e.z)
    norm, norm0, norm1 = (bounded_norm(t, anchor) for t in (e, e0, e1))
    gap = _gap(e.unit, e0.unit, e1.unit) - rounding
    turn, turn0, turn1 = (rotation(n, feature_error * (1 + rounding)) for n in (norm, norm0, norm1))
    radii = []
    for moving, still in ((norm0, turn1), (norm1, turn0)):
        free = (gap - 2 * turn - still).clamp(min=0, max=math.pi / 2)
        reach = moving * torch.sin(free) * (1 - rounding) - feature_error
        radii.append(round_down(over_bound(reach.clamp(min=0), lipschitz), dtype))
    return radii[0], radii[1]


def published_radius(z: Features, z0: Features, z1: Features, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """Radius as published with LipSim, ``|⟨p, p0 − p1⟩|/(L‖p0 − p1‖)``, ``(N,)``: for comparison only.

    Not sound for ``anchor = 0`` where ``‖z‖ < 1``: it overclaims there by ``1/‖z‖`` (Ghazanfari et al. 2024, §3).

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([3.0, 4.0], [1.0, 0.0], [0.0, 1.0]))
        >>> print(f"{published_radius(z, z0, z1).item():.4f} {reference_radius(z, z0, z1).item():.4f}")
        0.1387 0.7071
    """
    check_constants(anchor, lipschitz)
    unit, left, right = (t.unit if isinstance(t, Anchored) else project(t, anchor) for t in (z, z0, z1))
    slope = torch.hypot(anchored_norm(left[0] - right[0], 0.0), left[1] - right[1])
    return _ratio(along(unit, left, right).abs(), lipschitz * slope)


def _length(vector: Tensor, plain: bool) -> Tensor:
    """Norm ``(N,)``; of vectors of any size that float64 can hold, if they are not said to be plain."""
    return torch.linalg.vector_norm(vector, dim=-1) if plain else anchored_norm(vector, 0.0)


def _gap(unit: Parts, left: Parts, right: Parts) -> Tensor:
    """How much nearer, as an angle, one candidate is than the other, ``(N,)``."""
    return (unit_angle(unit, right) - unit_angle(unit, left)).abs()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0, with zero gradient, where it is not finite."""
    valid = (denominator > 0) & torch.isfinite(denominator) & torch.isfinite(numerator)
    return torch.where(valid, numerator, 0.0) / torch.where(valid, denominator, 1.0)
