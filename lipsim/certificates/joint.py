"""The radius within which all three images of a triplet may move; notation as in :mod:`lipsim.certificates`.

Candidates turn by at most ``α0`` and ``α1``, away from a reference or towards it. So its answer stays where
``θ1 − θ0 > c`` with ``c = α0 + α1``: where its angles to ``p0`` and to ``−p1`` add up to less than ``π − c``. This is
an elliptical cone with these two as foci and the axes ``p0 − p1``, ``p0 + p1`` and all that is orthogonal to both. With
``S = sin²(c/2)``, ``T = sin²(θ01/2)`` of the angle between the candidates, and the parts ``m``, ``u``, ``n`` of the
reference ``p`` along the axes, ``p`` is in it if

    ``B(S) > 0`` and ``m > 0``, where ``B(v) = m²/v − u²/(1 − v) − n²/(T − v)`` for ``0 < v < T``.

A reference that turns by ``α < π/2`` passes within ``sin α`` of ``p``, and all that is so near is in the cone if one
``v`` in ``(S, T)`` has ``(v − S)·B(v) > sin² α``: where ``B_y(S) ≤ 0``, ``‖y − p‖² ≥ ‖y − p‖² + (v − S)·B_y(S)``, of
which the right side is least, in each coordinate, at ``(v − S)·B(v)``, and there is such a ``y`` on the way to any that
is outside. With the best ``v`` that ``y`` is on the boundary and both sides are equal. Hence the radius: the largest
``ε`` with

    ``S(ε) + sin² α(ε)/B(v) < v``  for some ``v``.

Without an anchor it is exact for three features and more: just beyond it three vectors of them, each within the budget,
change the answer. Of two features, or with an anchor, vectors cannot turn everywhere, and it is a lower bound.

The best ``v`` has ``sin α = B/√(−B')`` and ``S = v + B/B'``, which is one equation for it, solved by bisection. Any
other ``v`` gives a sound radius as well, so only the inequality is rounded to the safe side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lipsim.certificates.geometry import Anchored, along, anchored_norm, rotation, stacked_rotation
from lipsim.certificates.numbers import check_constants
from lipsim.certificates.rounding import (
    EPS,
    Features,
    anchored,
    bounded_norm,
    over_bound,
    round_down,
    rounding_error,
)

# Of the search for v, and of that for the radius.
_BISECTIONS = 50
_BISECTIONS_FLOAT32 = 30
# More than rounding takes from a bound once its parts are what they are, relative to the part that is positive.
_LOST = 16 * EPS


def joint_radius(
    z: Features, z0: Features, z1: Features, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius of a common budget: all three images may move by less than it, each, and the answer stays, ``(N,)``.

    Exact for ``anchor = 0`` and three features or more, else a lower bound; in float64, rounded down. Its gradient is
    that of the equation that it solves (implicit differentiation).

    Args:
        z: features ``(N, D)`` of the references.
        z0: of the left images.
        z1: of the right images.
        anchor: constant coordinate beside them.
        lipschitz: bound of the encoder.
        feature_error: that the radius covers.

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
        >>> print(f"{joint_radius(z, z0, z1, anchor=0.0).item():.4f}")  # in a plane four turns fill 90°: sin 22.5°
        0.3827
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, features = anchored(anchor, z, z0, z1)
    radius = _of_features(features, dtype, rounding_error(features[0].z))
    return round_down(over_bound((radius - feature_error).clamp(min=0), lipschitz), dtype)


def signed_joint_radius(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float = 1.0, lipschitz: float = 1.0) -> Tensor:
    """:func:`joint_radius` with the sign of the margin, ``(N,)``: positive prefers left. What a loss can push.

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]))
        >>> print(f"{signed_joint_radius(z, z0, z1, anchor=0.0).item():.4f}")
        -0.3827
    """
    check_constants(anchor, lipschitz)
    dtype, features = anchored(anchor, z, z0, z1)
    sign = torch.sign(along(*(e.unit for e in features)).detach())
    radius = over_bound(_of_features(features, dtype), lipschitz).clamp(max=torch.finfo(dtype).max)
    return (sign * radius).to(dtype)


def joint_budget(
    units: tuple[Tensor, Tensor, Tensor],
    norms: Tensor,
    *,
    tiles: int = 1,
    rounding: float = 0.0,
    bisections: int = _BISECTIONS,
) -> Tensor:
    """How far the features of all three images may move, each, ``(N,)`` float64.

    Args:
        units: unit vectors ``(N, D)`` of reference, left and right.
        norms: their lengths, ``(3, N)``; of unit vectors stacked from those of tiles, that of the shortest.
        tiles: how many, of the same weight. A change of an image turns their stack most where it is all in one.
        rounding: more than float64 has lost in the unit vectors and their products; 0: nothing is rounded down.
        bisections: of each of two searches.

    The budget of one tile has a gradient.
    """
    with torch.no_grad():
        cone = _Cone.of(units, norms, rounding)
        share = _best_share(cone, tiles, bisections)
        radius = _radius_at(cone, share, tiles, bisections, rounding)
    if tiles > 1 or not any(tensor.requires_grad for tensor in (*units, norms)):
        return radius
    # Where nothing is solved, or candidates are hardly apart, quotients have no gradients that are numbers.
    known = (radius > 0) & (cone.opening * share > 1e-290)
    solved = _Cone.of(tuple(unit[known] for unit in torch.broadcast_tensors(*units)), norms[:, known], rounding)
    return radius.masked_scatter(known, radius[known] + _implicit(solved, share[known], radius[known]))


def _of_features(e: tuple[Anchored, ...], dtype: torch.dtype, rounding: float = 0.0) -> Tensor:
    """:func:`joint_budget` of anchored features, with the digits of ``dtype``."""
    p, p0, p1 = (torch.cat([t.unit[0], t.unit[1].unsqueeze(-1)], -1) for t in e)
    norms = torch.stack(torch.broadcast_tensors(*(bounded_norm(t, t.anchor) for t in e)))
    bisections = _BISECTIONS if dtype == torch.float64 else _BISECTIONS_FLOAT32
    return joint_budget((p, p0, p1), norms, rounding=rounding, bisections=bisections)


class _Cone(NamedTuple):
    """References in the axes of their cones.

    Attributes:
        ahead: ``m²``, ``(N,)``.
        across: ``u²``.
        aside: ``n²``.
        opening: ``T``.
        norms: of reference, left and right, ``(3, N)``.
    """

    ahead: Tensor
    across: Tensor
    aside: Tensor
    opening: Tensor
    norms: Tensor

    @classmethod
    def of(cls, units: tuple[Tensor, ...], norms: Tensor, rounding: float) -> _Cone:
        """With ``m`` and ``T`` rounded down and ``n`` up, and ``u`` what is left, which makes the bound smaller."""
        p, p0, p1 = units
        (ahead, length), (across, height) = _direction(p0 - p1), _direction(p0 + p1)
        side = (p * across).sum(-1)
        # Without half of the other axis p is as short as it is near to the candidates, and so is what rounding takes.
        off = p - torch.copysign(torch.full_like(side, 0.5), side).unsqueeze(-1) * (p0 + p1)
        forward = (off * ahead).sum(-1)
        slack = rounding * (1 + anchored_norm(off, 0.0) / length)
        m = (forward.abs() - slack).clamp(min=0) / (1 + rounding / length)
        u = (side.abs() - rounding / height).clamp(min=0) / (1 + rounding / height)
        # No multiples of the axes leave less than n. Where an axis is hardly known, Pythagoras says more.
        rest = p - forward.unsqueeze(-1) * ahead - side.unsqueeze(-1) * across
        n = anchored_norm(rest, 0.0) + rounding * (1 + forward.abs() / length + side.abs() / height)
        aside = torch.minimum(n.square(), (1 - m.square() - u.square() + 4 * EPS).clamp(min=0))
        left = (1 - m.square() - aside + 4 * EPS).clamp(min=0)
        opening = ((length - rounding).clamp(min=0, max=2) / 2).square().expand_as(m)
        return cls(m.square(), left, aside, opening, norms)

    def bound(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``T·B(v)`` at ``v = share·T``, how fast it falls with the share, and ``T·m²/v``."""
        # The first may be the small difference of a rounded product, off by an EPS; shares are what they are.
        other, left = (1 - self.opening * share - 2 * EPS).clamp(min=1e-300), 1 - share
        ahead, across, aside = self.ahead / share, self.opening * self.across / other, self.aside / left
        return ahead - across - aside, ahead / share + self.opening * across / other + aside / left, ahead

    def root(self) -> Tensor:
        """The share at which ``B`` is 0, in [0, 1]: the smaller root of a quadratic equation."""
        across = self.opening * self.across
        total = self.ahead * (1 + self.opening) + self.aside + across
        # The root of the discriminant, as one of two squares.
        width = torch.hypot(self.ahead * (1 - self.opening) + self.aside - across, 2 * (across * self.aside).sqrt())
        return (2 * self.ahead / (total + width)).clamp(max=1)

    def turned(self, radius: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
        """``sin α`` and ``S`` of images that move by at most ``radius``; 1 where they turn farther than such a sine."""
        # One kernel for the three, not three: this runs often, on few numbers.
        turn, left, right = stacked_rotation(self.norms, radius, tiles).unbind(0)
        sine = torch.sin(turn.clamp(max=math.pi / 2))
        return sine, torch.sin((left + right).clamp(max=math.pi) / 2).square()


def _direction(axis: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vector along an axis, and the length of this; 0 and 1 for one without a length."""
    length = anchored_norm(axis, 0.0)
    length = torch.where(length > 0, length, 1.0)
    return axis / length.unsqueeze(-1), length


def _moved(norm: Tensor, sine: Tensor, tiles: int) -> Tensor:
    """The radius at which :func:`stacked_rotation` has a given sine, up to π/2; at most the norm."""
    if tiles == 1:
        return norm * sine
    half = torch.sin(torch.asin(sine.clamp(max=1)) / 2) * math.sqrt(tiles)
    return norm * torch.sin(2 * torch.asin(half.clamp(max=math.sqrt(0.5))))


def _best_share(cone: _Cone, tiles: int, bisections: int) -> Tensor:
    """The ``v/T``, ``(N,)``, with which the radius is largest, or nearly so."""
    root = cone.root()
    low, high = torch.full_like(root, 2.0**-bisections), torch.ones_like(root)
    for _ in range(bisections):
        middle = (low + high) / 2
        share = root * middle
        bound, slope, ahead = cone.bound(share)
        turned = cone.turned(_moved(cone.norms[0], bound / slope.sqrt(), tiles), tiles)[1]
        # Nearer to the root nothing is left of the digits of the bound.
        beyond = (bound <= 4 * _LOST * ahead) | (share - bound / slope > turned / cone.opening)
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return root * low


def _radius_at(cone: _Cone, share: Tensor, tiles: int, bisections: int, rounding: float) -> Tensor:
    """The largest radius, ``(N,)``, that the inequality holds for at a given ``v/T``; 0 where it holds for none."""
    bound, _, ahead = cone.bound(share)
    bound = bound - _LOST * ahead
    quarter = (2 * torch.asin((cone.opening * share).clamp(max=1).sqrt())).clamp(max=math.pi / 2)
    low, high = torch.zeros_like(bound), _moved(cone.norms[0], (bound * share).clamp(min=0).sqrt(), tiles)
    high = torch.minimum(high, _moved(cone.norms[1:].amin(0), torch.sin(quarter), tiles))
    for _ in range(bisections):
        middle = (low + high) / 2
        sine, turned = cone.turned(middle * (1 + rounding), tiles)
        # Eight roundings on the way here.
        holds = turned / cone.opening + sine.square() / bound < share * (1 - 8 * EPS)
        low, high = torch.where(holds & (bound > 0), middle, low), torch.where(holds, high, middle)
    return low


def _implicit(cone: _Cone, share: Tensor, radius: Tensor) -> Tensor:
    """Zeros with the gradient of the radius, for one tile.

    That of the share of ``T`` that is best is 0: the radius is largest there, or, where nothing is beside the plane of
    the candidates, all of ``T`` is best.
    """
    with torch.no_grad():
        # At the smallest norm the arcsine is vertical.
        radius = torch.minimum(radius, (1 - 1e-6) * cone.norms.amin(0))
    v = cone.opening * share
    bound = cone.ahead / v - cone.across / (1 - v) - cone.aside / (cone.opening * (1 - share))
    sine, turned = cone.turned(radius, 1)
    excess = turned + sine.square() / bound - v
    with torch.no_grad():
        norm, candidates = cone.norms[0], cone.norms[1:]
        turn = rotation(candidates, radius).sum(0)
        slopes = (candidates - radius).rsqrt() * (candidates + radius).rsqrt()
        slope = torch.sin(turn) / 2 * slopes.sum(0) + 2 * (radius / norm) / norm / bound
    return (excess.detach() - excess) / slope
