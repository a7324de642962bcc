"""Anchor, projection, angles and distances of feature vectors: pure functions, differentiable, any float dtype.

Features ``z = f(x)`` have shape ``(N, D)``; two arguments broadcast against each other. The *anchor* ``κ ≥ 0`` is a
constant coordinate appended to the features, ``e = (z, κ)``. With ``κ = 1`` every ``e`` lies outside the open unit
ball, where ``e/‖e‖`` is the projection onto that ball and therefore 1-Lipschitz; with ``κ = 0`` it only normalises.
"""

from __future__ import annotations

import torch
from torch import Tensor


def anchored_norm(z: Tensor, anchor: float = 1.0) -> Tensor:
    """Norm ``‖(z, κ)‖`` of the anchored features, ``(N,)``."""
    scale = binary_scale(z, anchor)
    z, constant = scaled(z, anchor, scale)
    return scale * _scaled_norm(z, constant if anchor else None)


def project(z: Tensor, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vector ``p = (z, κ)/‖(z, κ)‖`` as its feature part ``(N, D)`` and its anchor part ``(N,)``.

    Zero features without an anchor have no direction: both parts are 0 there.
    """
    scale = binary_scale(z, anchor)
    z, constant = scaled(z, anchor, scale)
    norm = _scaled_norm(z, constant if anchor else None)
    inverse = torch.where(norm > 0, norm, torch.ones_like(norm)).reciprocal()
    return z * inverse.unsqueeze(-1), constant * inverse


@torch.no_grad()
def binary_scale(z: Tensor, anchor: float = 0.0) -> Tensor:
    """Power of two just below the largest entry of ``(z, κ)``, ``(N,)``; 1 where that is 0 or not finite.

    Divided by it, no square overflows, and none vanishes that counts; the division is exact.
    """
    largest = z.abs().amax(-1) if z.shape[-1] else z.new_zeros(z.shape[:-1])
    largest = torch.maximum(largest, torch.full_like(largest, anchor))
    mantissa, _ = torch.frexp(largest)
    scale = largest / (2 * mantissa)
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


def scaled(z: Tensor, anchor: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of ``(z, κ)`` over a scale, ``(N, D)`` and ``(N,)``."""
    # Between tensors: torch divides a number by a tensor as its reciprocal, which overflows for the smallest scales.
    return z / scale.unsqueeze(-1), torch.full_like(scale, anchor) / scale


def _scaled_norm(z: Tensor, constant: Tensor | None) -> Tensor:
    """Norm of ``z`` and a constant; without the latter its gradient at 0 is 0 and not NaN."""
    return torch.linalg.vector_norm(z, dim=-1) if constant is None else torch.sqrt(z.square().sum(-1) + constant**2)


def cosine_distance(z: Tensor, y: Tensor, anchor: float = 1.0) -> Tensor:
    """Cosine distance ``d = 1 − ⟨p(z), p(y)⟩`` in [0, 2], ``(N,)``.

    Computed as ``‖p − q‖²/2``, which keeps its digits between near-duplicates and is exactly 0 for equal features.
    Features without a direction (see :func:`project`) are at distance 1 from everything.
    """
    (p, p_anchor), (q, q_anchor) = project(z, anchor), project(y, anchor)
    distance = (((p - q).square().sum(-1) + (p_anchor - q_anchor).square()) / 2).clamp(max=2)
    if anchor:
        return distance
    undefined = (anchored_norm(z, anchor) == 0) | (anchored_norm(y, anchor) == 0)
    return torch.where(undefined, torch.ones_like(distance), distance)


def angle(z: Tensor, y: Tensor, anchor: float = 1.0) -> Tensor:
    """Angle between the anchored features in [0, π], ``(N,)``: ``2·atan2(‖p − q‖, ‖p + q‖)``.

    arccos of the cosine would lose all digits at small angles (Kahan 2006).
    """
    (p, p_anchor), (q, q_anchor) = project(z, anchor), project(y, anchor)
    difference = (p - q).square().sum(-1) + (p_anchor - q_anchor).square()
    total = (p + q).square().sum(-1) + (p_anchor + q_anchor).square()
    return 2 * torch.atan2(_root(difference), _root(total))


def _root(square: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 and not infinite; NaN stays NaN."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def rotation(norm: Tensor, radius: Tensor | float) -> Tensor:
    """Largest angle ``α`` by which a vector of the given norm can turn when it moves by at most ``radius``.

    ``arcsin(radius/norm)`` while the ball of that radius leaves out the origin, and π from there on.
    """
    ratio = radius / norm
    inside = ratio < 1
    return torch.where(inside, torch.asin(torch.where(inside, ratio, torch.zeros_like(ratio))), torch.pi)
