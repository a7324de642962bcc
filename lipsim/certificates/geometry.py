"""Anchor, projection, angles and distances of feature vectors: pure functions, differentiable, any float dtype.

Features ``z = f(x)`` have shape ``(N, D)``; two arguments broadcast against each other. The *anchor* ``κ ≥ 0`` is a
constant coordinate appended to the features, ``e = (z, κ)``. With ``κ = 1`` every ``e`` lies outside the open unit
ball, where ``e/‖e‖`` is the projection onto that ball and therefore 1-Lipschitz; with ``κ = 0`` it only normalises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF = frozenset({torch.float16, torch.bfloat16})
# Beside numbers that float32 holds, the square of an anchor in this range is one that float64 has all digits of.
_PLAIN_ANCHORS = 2.0**-300, 2.0**300


class Anchored:
    """Features in float64 with their anchor, ``e = (z, κ)``, projected once for all radii that are computed from them.

    Squares of what float32 holds stay in the range of float64, so features in float32 are not scaled. Those in float64
    are (:func:`binary_scale`), which changes no digit where it is not needed.

    Args:
        z: features ``(N, D)``.
        anchor: ``κ``.

    Attributes:
        z: features ``(N, D)``, float64.
        anchor: ``κ``.
        plain: whether no power or product of the features can leave the range of float64.
        scale: power of two ``(N,)`` that features and anchor are divided by; 1 where they are plain.
        scaled: both parts of ``e`` over the scale, ``(N, D)`` and ``(N,)``.
        scaled_norm: ``‖e‖`` over the scale, ``(N,)``.
        unit: both parts of ``p = e/‖e‖``, 0 for zero features without an anchor.
        norm: ``‖e‖``, ``(N,)``.
    """

    def __init__(self, z: Tensor, anchor: float = 1.0) -> None:
        least, most = _PLAIN_ANCHORS
        self.plain = z.dtype != torch.float64 and (anchor == 0 or least <= anchor <= most)
        self.z, self.anchor = z.double(), anchor
        if self.plain:
            self.scale = self.z.new_ones(self.z.shape[:-1])
            self.scaled = self.z, torch.full_like(self.scale, anchor)
        else:
            self.scale = binary_scale(self.z, anchor)
            self.scaled = scaled(self.z, anchor, self.scale)
        self.scaled_norm, self.unit = _norm_and_unit(*self.scaled, anchored=anchor > 0)
        self.norm = self.scale * self.scaled_norm


def anchored_norm(z: Tensor, anchor: float = 1.0) -> Tensor:
    """Norm ``‖(z, κ)‖`` of the anchored features, ``(N,)``."""
    scale = binary_scale(z, anchor)
    z, constant = scaled(z, anchor, scale)
    return scale * scaled_norm(z, constant if anchor else None)


def project(z: Tensor, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vector ``p = (z, κ)/‖(z, κ)‖`` as its feature part ``(N, D)`` and its anchor part ``(N,)``.

    Zero features without an anchor have no direction: both parts are 0 there.
    """
    scale = binary_scale(z, anchor)
    z, constant = scaled(z, anchor, scale)
    return _norm_and_unit(z, constant, anchored=anchor > 0)[1]


def _norm_and_unit(z: Tensor, constant: Tensor, anchored: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    norm = scaled_norm(z, constant if anchored else None)
    inverse = torch.where(norm > 0, norm, torch.ones_like(norm)).reciprocal()
    return norm, (z * inverse.unsqueeze(-1), constant * inverse)


def along(e: tuple[Tensor, Tensor | float], left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """``⟨e, p0 − p1⟩`` of vectors in two parts, ``(N,)``: positive where ``e`` points to the left candidate.

    The one formula of every margin: with ``e = (z, κ)`` it is the linear margin ``g``, with the unit vector ``p`` of
    the reference the margin ``h = d(x, x1) − d(x, x0)``. Exactly 0 for equal candidates.
    """
    (z, constant), (p0, s0), (p1, s1) = e, left, right
    return (z * (p0 - p1)).sum(-1) + constant * (s0 - s1)


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


def scaled_norm(z: Tensor, constant: Tensor | None) -> Tensor:
    """Norm of ``z`` and a constant; without the latter its derivatives at 0 are 0 and not NaN."""
    if constant is not None:
        return torch.sqrt(z.square().sum(-1) + constant**2)
    zero = (z == 0).all(-1)
    norm = torch.linalg.vector_norm(torch.where(zero.unsqueeze(-1), 1.0, z), dim=-1)
    return torch.where(zero, 0.0, norm)


def cosine_distance(z: Tensor, y: Tensor, anchor: float = 1.0) -> Tensor:
    """Cosine distance ``d = 1 − ⟨p(z), p(y)⟩`` in [0, 2], ``(N,)``.

    Computed as ``‖p − q‖²/2``, which keeps its digits between near-duplicates and is exactly 0 for equal features.
    Features without a direction (see :func:`project`) are at distance 1 from everything. Half precision is that of the
    result alone: the sum of as many squares as there are features would leave its range.

    Example:
        >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), anchor=0.0)
        tensor([1.])
    """
    if (dtype := torch.promote_types(z.dtype, y.dtype)) in HALF:
        return cosine_distance(z.float(), y.float(), anchor).to(dtype)
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
    return unit_angle(project(z, anchor), project(y, anchor))


def unit_angle(unit: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """:func:`angle` of two unit vectors in two parts, as :func:`project` gives them."""
    (p, p_anchor), (q, q_anchor) = unit, other
    difference = (p - q).square().sum(-1) + (p_anchor - q_anchor).square()
    total = (p + q).square().sum(-1) + (p_anchor + q_anchor).square()
    return 2 * torch.atan2(_root(difference), _root(total))


def one_minus_cos(theta: Tensor) -> Tensor:
    """``1 − cos θ``, the distance of two unit vectors at an angle, with the digits of small ones."""
    return 2 * torch.sin(theta / 2).square()


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


def stacked_rotation(norm: Tensor, radius: Tensor | float, tiles: int) -> Tensor:
    """:func:`rotation` of unit vectors stacked to one, ``(N,)``: at most as if the shortest alone had moved.

    Args:
        norm: of the shortest of the vectors.
        radius: by which they move, all together.
        tiles: how many vectors.
    """
    turn = rotation(norm, radius)
    if tiles == 1:
        return turn
    return torch.where(turn < torch.pi, 2 * torch.asin(torch.sin(turn / 2) / math.sqrt(tiles)), turn)
