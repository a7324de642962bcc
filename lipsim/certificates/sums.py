"""Certificates of the sum of two distances of which the second saturates; notation as in :mod:`lipsim.certificates`.

``D(x, y) = d₁(x, y) + λ·(1 − exp(−d₂(x, y)/τ))`` with the cosine distances ``d₁`` and ``d₂`` of two encoders. Between
images that are far apart in the second one its part is nearly constant, so that the first decides; between those that
are near, the second one does (Welsch's function, a bounded loss of robust statistics). No features of a finite length
have this distance, so its certificates are of each part by itself:

- a distance lies between the sums of its parts' ends, as both grow with ``d₁`` and ``d₂``;
- the margin ``D(x, x1) − D(x, x0)`` is at least the sum of the least margins of the parts. That of a cosine distance,
  ``⟨p, p0 − p1⟩``, follows from how far each of the three vectors can turn (:meth:`Term.least_margin`). That of the
  second part is a function of its own two distances and their difference (:func:`_saturated_margin`).

A radius is the largest budget with which that sum is positive, by bisection; every budget with a positive sum is one.
Where all three images move and both parts say what the sum does, so is the smaller of their own joint radii.
"""

from __future__ import annotations

import math
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import along, anchored_norm, one_minus_cos, rotation, unit_angle
from lipsim.certificates.joint import joint_radius
from lipsim.certificates.numbers import check_constants, check_number
from lipsim.certificates.pixels import certified_pixels
from lipsim.certificates.rounding import EPS, Features, anchored, bounded_norm, round_down, round_up, rounding_error
from lipsim.certificates.triplets import TwoAFCCertificate

# Which of reference, left and right move in each of the four radii of a certificate.
_MOVING = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))
_BISECTIONS = 60
_TANGENTS = 3  # a fourth changed radii of photographs by less than 1e-5


class Term:
    """Features of N triplets by one encoder, and what can become of their distances when images move.

    Attributes, float64:
        norms: of the anchored features of reference, left and right, ``(3, N)``.
        angles: from the reference to left and right, ``(2, N)``.
        margin: ``⟨p, w⟩`` with ``w = p0 − p1``, ``(N,)``: positive where left is nearer.
        length: ``‖w‖``, ``(N,)``, and ``slope`` that of its feature part.

    Args:
        z: features ``(N, D)`` of the references.
        z0: of the left images.
        z1: of the right images.
        anchor: constant coordinate beside them.
        lipschitz: bound of the encoder.
        feature_error: that certificates cover.
    """

    def __init__(
        self,
        z: Features,
        z0: Features,
        z1: Features,
        *,
        anchor: float = 1.0,
        lipschitz: float = 1.0,
        feature_error: float = 0.0,
    ) -> None:
        check_constants(anchor, lipschitz, feature_error)
        self.options = {"anchor": anchor, "lipschitz": lipschitz, "feature_error": feature_error}
        self.dtype, (e, e0, e1) = anchored(anchor, z, z0, z1)
        self.rounding = rounding_error(e.z)
        self.norms = torch.stack([bounded_norm(vector, anchor) for vector in (e, e0, e1)])
        self.angles = torch.stack([unit_angle(e.unit, other.unit) for other in (e0, e1)])
        self.margin = along(e.unit, e0.unit, e1.unit)
        self.slope = anchored_norm(e0.unit[0] - e1.unit[0], 0.0)
        self.length = torch.hypot(self.slope, e0.unit[1] - e1.unit[1])
        self._features = e, e0, e1

    def swapped(self, rows: Tensor) -> Term:
        """The same triplets, with left and right exchanged in the rows that a mask ``(N,)`` says."""
        term = copy(self)
        term.norms = torch.cat([self.norms[:1], torch.where(rows, self.norms[1:].flip(0), self.norms[1:])])
        term.angles = torch.where(rows, self.angles.flip(0), self.angles)
        term.margin = torch.where(rows, -self.margin, self.margin)
        return term

    @cached_property
    def joint_radius(self) -> Tensor:
        """Radius ``(N,)`` within which all three images may move as far as the answer by this encoder alone goes."""
        e, e0, e1 = self._features
        return joint_radius(e, e0, e1, **self.options)

    @property
    def bounded(self) -> bool:
        """Whether the encoder has a bound at all."""
        return math.isfinite(self.options["lipschitz"])

    @property
    def reach(self) -> Tensor:
        """The budget ``(N,)`` with which all can turn anywhere; 0 where none ever turns, or all may at once."""
        largest, bound = self.norms.amax(0), self.options["lipschitz"]
        return largest / bound if bound > 0 else torch.zeros_like(largest)

    def turns(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """How far reference, left and right can move, and turn, with budgets ``(…, 3, N)``, in feature space."""
        bound, error = self.options["lipschitz"], self.options["feature_error"]
        moved = bound * eps if self.bounded else torch.where(eps > 0, math.inf, 0.0)
        moved = (moved + error) * (1 + self.rounding)
        return moved, rotation(self.norms, moved)

    def distances(self, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals of the distances to both candidates, ``(…, 2, N)``, after turns ``(…, 3, N)``."""
        turn = turns[..., :1, :] + turns[..., 1:, :] + self.rounding
        lower, upper = (self.angles - turn).clamp(min=0), (self.angles + turn).clamp(max=math.pi)
        return one_minus_cos(lower), one_minus_cos(upper)

    def least_margin(self, eps: Tensor) -> Tensor:
        """The least ``d(x, x1) − d(x, x0)`` with budgets ``(…, 3, N)``, ``(…, N)``: the largest of three bounds.

        - ``cos(θ0 + α + α0) − cos(θ1 − α − α1)``, of each angle by itself;
        - ``‖w‖·cos(φ + α)`` with the angle ``φ`` from ``p`` to ``w = p0 − p1``, less what the candidates' turns add at
          most, or have added where the reference is then (:meth:`_along`);
        - ``(g − s·‖w_z‖)/(‖e‖ ± s)``, of a reference that moves by ``s`` in feature space, where the anchor stays.
        """
        moved, turns = self.turns(eps)
        turn, others = turns[..., 0, :], turns[..., 1:, :]
        lower, upper = self.distances(turns)
        apart = lower[..., 1, :] - upper[..., 0, :]
        # |⟨p', p0' − p0⟩| ≤ ‖p0' − p0‖, and this is the chord of the turn.
        lost = 2 * torch.sin(others.clamp(max=math.pi) / 2).sum(-2)
        still = torch.zeros_like(others)
        direction = torch.fmax(self._along(turn, still, 1) - lost, self._along(turn, others, _TANGENTS))
        # In units of the reference's norm, so that no product leaves the range of float64; nothing is known of norm 0.
        norm = torch.where(self.norms[0] > 0, self.norms[0], math.nan)
        step = moved[..., 0, :] / norm
        linear = self.margin - step * self.slope
        nearest = torch.maximum(1 - step, self.options["anchor"] / norm)
        straight = torch.where(linear > 0, linear / (1 + step), linear / nearest) - lost
        # fmax passes over what is not a number.
        least = torch.fmax(apart, torch.fmax(direction, straight))
        return least - 4 * self.rounding

    def _along(self, turn: Tensor, others: Tensor, tangents: int) -> Tensor:
        """The least margin when the reference turns by ``α``, ``(…, N)``, and the candidates by ``(…, 2, N)``.

        Wherever ``p`` has turned to, at angles ``θ'`` from the candidates, these turn on to ``cos(θ0' + α0) − cos(θ1' −
        α1)``. That is convex in both cosines, and so above its tangent at those of any angles ``t``,

            ``A·cos θ0' − B·cos θ1' − sin α0/sin t0 − sin α1/sin t1``,  ``A = sin(t0 + α0)/sin t0``,
            ``B = sin(t1 − α1)/sin t1``.

        The first two terms are ``⟨p', v⟩`` with ``v = A·p0 − B·p1``, least at ``‖v‖·cos(φ + α)`` with the angle ``φ``
        from ``p`` to ``v``. A tangent is taken where the one before is least, the first at ``p``; without other turns
        all are the same. NaN where an angle could leave [0, π], so that this is no formula any more.
        """
        cosines, sines = torch.cos(self.angles), torch.sin(others)
        between = 1 - self.length.square() / 2
        at = self.angles.expand_as(torch.broadcast_tensors(others, self.angles)[0])
        least = torch.full_like(turn + self.margin, -math.inf)
        for _ in range(tangents):
            at = at.clamp(1e-4, math.pi - 1e-4)
            per = 1 / torch.sin(at)
            a, b = torch.sin(at[..., 0, :] + others[..., 0, :]), torch.sin(at[..., 1, :] - others[..., 1, :])
            a, b = a * per[..., 0, :], b * per[..., 1, :]
            ahead = a * self.margin + (a - b) * cosines[1]
            square = ((a - b).square() + a * b * self.length.square()).clamp(min=0)
            aside = (square - ahead.square()).clamp(min=0).sqrt() + (a.abs() + b.abs()) * math.sqrt(2 * self.rounding)
            around = (turn > math.pi / 2) | (ahead + square.sqrt() * torch.cos(turn) < 0)
            along = torch.where(around, -square.sqrt(), ahead * torch.cos(turn) - aside * torch.sin(turn))
            found = along - (sines * per).sum(-2) - 4 * self.rounding * per.sum(-2)
            least = torch.fmax(least, found)
            # Where this one is least; wherever that is, a tangent there is one.
            parts = torch.stack([a - b * between, a * between - b], -2) - ahead.unsqueeze(-2) * cosines
            share = (torch.sin(turn) / aside).unsqueeze(-2)
            at = torch.acos((torch.cos(turn).unsqueeze(-2) * cosines - share * parts).clamp(-1, 1)).nan_to_num(1.0)
        lower, upper = self.angles - turn.unsqueeze(-2), self.angles + turn.unsqueeze(-2)
        known = ((upper + others)[..., 0, :] <= math.pi) & ((lower - others)[..., 1, :] >= 0)
        known |= (others == 0).all(-2)
        return torch.where(known, least, math.nan)


def certify_sum(reference: Tensor, first: Term, second: Term, *, weight: float, scale: float) -> TwoAFCCertificate:
    """The certificate of N answers by ``D = d₁ + λ·(1 − exp(−d₂/τ))``, computed in float64.

    Its radii have the dtype of the features of the first term.

    Args:
        reference: images ``(N, 3, H, W)`` in [0, 1].
        first: features of the triplets by the encoder of ``d₁``.
        second: features of the same triplets by that of ``d₂``.
        weight: ``λ ≥ 0``.
        scale: ``τ > 0``.

    Raises:
        ValueError: a number out of range, or different numbers of triplets.

    Example:
        >>> import torch
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([3.0, 4.0], [1.0, 0.0], [0.0, 1.0]))
        >>> term = Term(z, z0, z1)
        >>> alone = certify_sum(torch.full((1, 3, 2, 2), 0.5), term, term, weight=0.0, scale=1.0)
        >>> print(bool(alone.prefers_left), f"{alone.radius.item():.4f}")  # as of the first one alone
        False 0.7071
        >>> both = certify_sum(torch.full((1, 3, 2, 2), 0.5), term, term, weight=1.0, scale=1.0)
        >>> print(bool(both.prefers_left), bool(both.radius > 0.6))
        False True
    """
    weight, scale = check_weight_and_scale(weight, scale)
    if not len(reference) == len(first.margin) == len(second.margin):
        raise LipsimError(
            f"expected the features of the {len(reference)} triplets by both encoders, got those of "
            f"{len(first.margin)} and {len(second.margin)}"
        )
    found = sum_margin(first, second, weight=weight, scale=scale)
    right = found < 0  # a margin that is no number certifies nothing, and neither does a tie
    first, second = first.swapped(right), second.swapped(right)
    moving = torch.tensor(_MOVING, dtype=torch.float64, device=found.device).unsqueeze(-1)
    # Between 0, the budget with which one of the encoders may answer anything, and that with which both may. These can
    # be so far apart that only halving their ratio finds a radius near the smaller one.
    low = found.new_zeros(len(_MOVING), *found.shape)
    most = torch.finfo(found.dtype).max / 4
    middle, high = (
        bound(first.reach, second.reach).clamp(max=most).expand_as(low) for bound in (torch.minimum, torch.maximum)
    )
    for _ in range(_BISECTIONS):
        holds = _least_sum(first, second, middle.unsqueeze(-2) * moving, weight, scale) > 0
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
        middle = torch.where(low > 0, low.sqrt() * high.sqrt(), high / 2)
    low[-1] = torch.maximum(low[-1], _agreed(first, second, weight))
    if not (first.bounded and second.bounded):
        low = torch.zeros_like(low)
    radii = round_down(torch.where(found.abs() > 0, low, 0.0), first.dtype)
    radius, left, other, joint = radii.unbind(0)
    return TwoAFCCertificate(
        prefers_left=found > 0,
        margin=found,
        radius=radius,
        left_radius=torch.where(right, other, left),
        right_radius=torch.where(right, left, other),
        joint_radius=joint,
        pixels=certified_pixels(reference, radius),
    )


def _agreed(first: Term, second: Term, weight: float) -> Tensor:
    """A joint radius of the sum, ``(N,)``: that of both parts where both have the nearer candidate nearer."""
    if not weight:
        return first.joint_radius
    agreed = (first.margin > 0) & (second.margin > 0)
    return torch.where(agreed, torch.minimum(first.joint_radius, second.joint_radius), 0.0)


def sum_margin(first: Term, second: Term, *, weight: float, scale: float) -> Tensor:
    """Margin ``D(x, x1) − D(x, x0)``, ``(N,)`` float64: positive where left is nearer, 0 for equal candidates."""
    nearer, other = torch.exp(-one_minus_cos(second.angles) / scale).unbind(0)
    saturated = nearer * -torch.expm1(-second.margin / scale)
    # Where one of the exponentials leaves the range of float64, from both distances.
    saturated = torch.where(torch.isfinite(saturated) & (nearer > 0), saturated, nearer - other)
    return first.margin + weight * saturated


def sum_interval(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, weight: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Interval ``(lower, upper)`` of ``D``, ``(N,)`` each, from intervals of ``d₁`` and ``d₂``, rounded outward.

    Example:
        >>> interval = torch.tensor([0.5]), torch.tensor([0.5])
        >>> lower, upper = sum_interval(interval, interval, weight=2.0, scale=0.5)
        >>> print(f"{lower.item():.4f} {upper.item():.4f}")  # 1/2 + 2·(1 − 1/e)
        1.7642 1.7642
    """
    weight, scale = check_weight_and_scale(weight, scale)
    lower, upper = (a.double() + weight * saturate(b.double(), scale) for a, b in zip(first, second, strict=True))
    return round_down(lower, first[0].dtype), round_up(upper, first[0].dtype)


def saturate(distance: Tensor, scale: float) -> Tensor:
    """``1 − exp(−d/τ)``, in the dtype and with the digits of small distances."""
    return -torch.expm1(-distance / scale)


def check_weight_and_scale(weight: float, scale: float) -> tuple[float, float]:
    """``λ ≥ 0`` and ``τ > 0``, as floats.

    Raises:
        ValueError: one is out of range.
    """
    return check_number("weight", weight), check_number("scale", scale, least=1e-6)


def _least_sum(first: Term, second: Term, eps: Tensor, weight: float, scale: float) -> Tensor:
    """A number that the margin stays above with budgets ``(…, 3, N)`` of reference, nearer and other candidate."""
    least = second.least_margin(eps)
    lower, upper = second.distances(second.turns(eps)[1])
    saturated = _saturated_margin(least, lower, upper, scale)
    # Distances are off by less than four times the rounding of their angles, exponents by that over τ.
    slack = weight * (4 * second.rounding / scale + 16 * EPS)
    return first.least_margin(eps) + weight * saturated - slack


def _saturated_margin(margin: Tensor, lower: Tensor, upper: Tensor, scale: float) -> Tensor:
    """The least ``exp(−d0/τ) − exp(−d1/τ)`` for distances ``(…, 2, N)`` in intervals and a margin ``d1 − d0``.

    The largest of three bounds: from the ends of the intervals; and from an end of one of them and the least margin, as
    the difference is ``exp(−d0/τ) − exp(−(d0 + m)/τ)``, which falls with ``d0`` where ``m`` is positive and rises where
    it is negative, and ``exp(−(d1 − m)/τ) − exp(−d1/τ)``, likewise.
    """
    (l0, l1), (u0, u1) = lower.unbind(-2), upper.unbind(-2)
    ends = torch.exp(-u0 / scale) - torch.exp(-l1 / scale)
    nearer, other = torch.where(margin > 0, u0, l0), torch.where(margin > 0, u1, l1)
    by_nearer = torch.exp(-nearer / scale) - torch.exp(-(nearer + margin) / scale)
    by_other = torch.exp(-(other - margin) / scale) - torch.exp(-other / scale)
    return torch.fmax(ends, torch.fmax(by_nearer, by_other))
