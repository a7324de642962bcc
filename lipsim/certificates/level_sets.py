"""Segments and triangles of images on which an answer is proved to stay, and how near a level set can come to an image.

All of it follows from certified balls. Around a point whose *signed radius* is ``r > 0`` every point nearer than ``r``
has the answer too; where it is ``r < 0``, none nearer than ``−r`` has. With a level function ``g`` (positive where the
answer is) that changes by at most ``K`` per unit of distance, ``r = g/K``. Then

- a segment of length ``s`` between points of ``g₁`` and ``g₂`` keeps ``g ≥ (g₁ + g₂ − Ks)/2``: the two balls meet;
- a triangle keeps the answer where balls around its corners cover it;
- ``‖x − t‖ ≥ (g(x) − g(t))/K`` for ``x`` inside and ``t`` outside: their balls are disjoint.

Points in between are evaluated where the balls leave gaps, until the balls cover, a point outside is found, or a limit
is reached. Radii are ℓ2 distances in the space of the encoder's input, rounded outward like all others here, and cover
that the images that are evaluated are rounded to their dtype and not quite on the segment. Nothing of the kind bounds
the extent of a level set from above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.certificates.decisions import reference_radius
from lipsim.certificates.distances import threshold_angle, threshold_radius
from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import Anchored, along, project, unit_angle
from lipsim.certificates.numbers import check_count
from lipsim.certificates.rounding import EPS

SignedRadius = Callable[[Tensor, Tensor], Tensor]
"""Points ``(M, …)`` and the sample ``(M,)`` that each belongs to, to signed radii ``(M,)``."""
_BATCH = 64  # points at a time
_SHORTEST = 1e-12  # of a segment: no shorter gap is looked into


def answer_radius(
    z: Tensor,
    z0: Tensor,
    z1: Tensor,
    prefers_left: Tensor,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> Tensor:
    """Signed radius ``g/(L‖w‖)`` of references for the answer of a triplet, ``(N,)``; exact, and 0 on a tie.

    Args:
        z: features ``(N, D)`` of the references.
        z0: of the left images.
        z1: of the right images.
        prefers_left: ``(N,)`` bool, the answer whose level set is meant.
        anchor: constant coordinate beside the features.
        lipschitz: bound of the encoder.
        feature_error: that the radii cover.

    Example:
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([3.0, 4.0], [1.0, 0.0], [0.0, 1.0]))
        >>> print(f"{answer_radius(z, z0, z1, torch.tensor([True])).item():.4f}")  # it is on the side of the right one
        -0.7071
    """
    e, e0, e1 = (Anchored(features.double(), anchor) for features in (z, z0, z1))
    radius = reference_radius(e, e0, e1, anchor=anchor, lipschitz=lipschitz, feature_error=feature_error)
    # Of the scaled features, as the radius: the margin itself may overflow, and then has no sign.
    return torch.where((along(e.scaled, e0.unit, e1.unit) > 0) == prefers_left, radius, -radius)


def same_radius(
    z: Tensor,
    y: Tensor,
    threshold: float,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> Tensor:
    """Signed radius of images for "the same", ``d(x, y) ≤ threshold``, ``(N,)``.

    With ``p = p(y)``, ``e = (f(x), κ)`` and ``c = 1 − τ`` the condition ``1 − ⟨e, p⟩/‖e‖ ≤ τ`` reads
    ``⟨e, p⟩ ≥ c‖e‖``. Against a fixed direction that would be a half-space as for triplets; against ``‖e‖`` it is the
    circular cone of half angle ``θ_τ = arccos c`` around ``p``. For ``c > 0`` the cone is the intersection of the
    half-spaces ``⟨e, b_u⟩ ≥ 0`` with normals ``b_u = sin θ_τ p − cos θ_τ u``, one for each unit vector ``u ⊥ p``, and
    the one that counts has ``u`` along the part of ``e`` across ``p``: ``g = ⟨e, b_u⟩ = ‖e‖ sin(θ_τ − θ)``, with
    ``‖b_u‖ = 1``. That is the signed distance to the surface of the cone (``±‖e‖`` more than a right angle off, where
    the tip is nearest; for ``c < 0`` the complement is the cone), which changes by at most 1 per unit of ``e`` as every
    signed distance does, hence ``K = L``. It is exact for ``κ = 0``, a lower bound above, where ``e`` cannot move along
    the anchor. Its size is :func:`lipsim.certificates.threshold_radius`.

    Args:
        z: features ``(N, D)`` of the images that move.
        y: of those that they are compared with.
        threshold: ``τ``, the largest distance that is still the same.
        anchor: constant coordinate beside the features.
        lipschitz: bound of the encoder.
        feature_error: that the radii cover.

    Raises:
        ValueError: the threshold is outside [0, 2].

    Example:
        >>> z, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> print(f"{same_radius(z, y, 0.5, anchor=0.0).item():.4f}")  # 30° outside the cone
        -0.5000
    """
    z, y = z.double(), y.double()
    options = {"anchor": anchor, "lipschitz": lipschitz, "feature_error": feature_error}
    radius = threshold_radius(z, y, threshold, **options)
    # By angles, as the radius: distances near 2 lose the digits that tell on which side of the threshold they are.
    inside = unit_angle(project(z, anchor), project(y, anchor)) <= threshold_angle(threshold)
    return torch.where(inside, radius, -radius)


@dataclass(frozen=True)
class SegmentCertificate:
    """Whether N segments stay in a level set.

    Attributes:
        radius: ``(N,)``, every point of the segment has at least this radius; 0 where the segment is not proved.
        proved: ``(N,)`` bool, the whole segment is in the level set.
        leaves: ``(N,)`` bool, a point of it was found outside; neither: undecided within the limit.
        share: ``(N,)``, the share of its length that is proved inside.
        evaluations: ``(N,)`` int64, points that were evaluated.
    """

    radius: Tensor
    proved: Tensor
    leaves: Tensor
    share: Tensor
    evaluations: Tensor


@torch.no_grad()
def certify_segments(
    signed_radius: SignedRadius, source: Tensor, end: Tensor, *, points: int = 2, most: int = 1_000
) -> SegmentCertificate:
    """Prove that the segments from ``source`` to ``end`` stay in a level set.

    Args:
        signed_radius: of points ``(M, …)`` of the samples ``(M,)``, counted in the segments given here.
        source: images ``(N, …)``.
        end: images ``(N, …)``.
        points: evaluated on each segment at first, both ends among them, at least 2.
        most: points evaluated on a segment at most. As long as it is undecided, the middle of every gap that the balls
            leave is evaluated, so that gaps are at most half as long each time.

    Raises:
        ValueError: numbers out of range, or ends unlike the sources.
    """
    check_count("points", points, 2)
    check_count("most", most, points)
    if source.shape != end.shape:
        raise LipsimError(f"expected ends like the sources {tuple(source.shape)}, got {tuple(end.shape)}")
    length = distance_above(source, end)
    corners = torch.stack([source, end], 1)
    count = len(source)
    place = torch.linspace(0, 1, points, dtype=torch.float64, device=source.device)
    rows = torch.arange(count, device=source.device)

    def evaluate(rows: Tensor, place: Tensor) -> Tensor:
        return radii_between(signed_radius, corners, rows, torch.stack([1 - place, place], 1))

    radii = evaluate(rows.repeat_interleave(points), place.repeat(count)).view(count, points)
    evaluations = torch.full_like(rows, points)
    leaves = (radii < 0).any(1)
    # Pieces between neighbours: the segment, and place and radius of both ends.
    piece_rows = rows.repeat_interleave(points - 1)
    piece = torch.stack([place[:-1].repeat(count), place[1:].repeat(count)], 1)
    piece_radii = torch.stack([radii[:, :-1].flatten(), radii[:, 1:].flatten()], 1)
    while True:
        open_ = (_piece_margin(piece, piece_radii, length[piece_rows]) <= 0) & ~leaves[piece_rows]
        open_ &= piece[:, 1] - piece[:, 0] > _SHORTEST
        wanted = torch.zeros_like(rows).index_add_(0, piece_rows, open_.long())
        again = (open_ & (evaluations + wanted <= most)[piece_rows]).nonzero().flatten()
        if not len(again):
            break
        gap, of = piece[again], piece_rows[again]
        reach = piece_radii[again].clamp(min=0) / length[of].clamp(min=1e-300).unsqueeze(1)
        middle = ((gap[:, 0] + reach[:, 0] + gap[:, 1] - reach[:, 1]) / 2).clamp(gap[:, 0], gap[:, 1])
        found = evaluate(of, middle)
        evaluations.index_add_(0, of, torch.ones_like(of))
        leaves[of[found < 0]] = True
        kept = torch.ones_like(piece_rows, dtype=torch.bool)
        kept[again] = False
        halves = (
            (torch.stack([gap[:, 0], middle], 1), torch.stack([piece_radii[again, 0], found], 1)),
            (torch.stack([middle, gap[:, 1]], 1), torch.stack([found, piece_radii[again, 1]], 1)),
        )
        piece_rows = torch.cat([piece_rows[kept], of, of])
        piece = torch.cat([piece[kept], *(places for places, _ in halves)])
        piece_radii = torch.cat([piece_radii[kept], *(found for _, found in halves)])
    margins = _piece_margin(piece, piece_radii, length[piece_rows])
    least = torch.full_like(length, torch.inf).scatter_reduce(0, piece_rows, margins, "amin")
    # What a ball reaches of each piece, from both ends.
    width = piece[:, 1] - piece[:, 0]
    inside = (piece_radii.clamp(min=0) / length[piece_rows].clamp(min=1e-300).unsqueeze(1)).sum(1)
    share = torch.zeros_like(length).index_add_(0, piece_rows, torch.minimum(inside, width))
    proved = (least > 0) & ~leaves
    return SegmentCertificate(
        torch.where(proved, least, 0.0), proved, leaves, torch.where(proved, 1.0, share.clamp(max=1)), evaluations
    )


@dataclass(frozen=True)
class StarCertificate:
    """Whether N level sets hold all segments from a source to K outcomes.

    Attributes:
        proved: ``(N,)`` bool, all K segments are proved.
        segments: the certificate of the ``N·K`` segments, those of the first source first.
    """

    proved: Tensor
    segments: SegmentCertificate


def certify_stars(
    signed_radius: SignedRadius, source: Tensor, outcomes: Tensor, *, points: int = 2, most: int = 1_000
) -> StarCertificate:
    """Prove that the segments from each source ``(N, …)`` to its outcomes ``(N, K, …)`` stay in its level set.

    Without outcomes there is nothing to leave it by. ``signed_radius`` is asked by the sources, 0 to N − 1. Other
    arguments: :func:`certify_segments`.
    """
    count = outcomes.shape[1]

    def of_segment(points: Tensor, segments: Tensor) -> Tensor:
        return signed_radius(points, segments // count)

    sources = source.unsqueeze(1).expand_as(outcomes).flatten(0, 1)
    segments = certify_segments(of_segment, sources, outcomes.flatten(0, 1), points=points, most=most)
    return StarCertificate(segments.proved.view(len(outcomes), count).all(1), segments)


@dataclass(frozen=True)
class ClosestApproach:
    """How near N points of level sets are to their targets, and how near they can be; ℓ2, ``(N,)`` each.

    Attributes:
        achieved: ``‖x − t‖``.
        bound: what it is at least, ``(g(x) − g(t))/K``, from the points themselves; 0 where either is not decided.
        level_bound: what it is at least for *any* point of the level set, ``−g(t)/K``.
    """

    achieved: Tensor
    bound: Tensor
    level_bound: Tensor

    @property
    def ratio(self) -> Tensor:
        """``achieved / level_bound``, at least 1; infinite where nothing is bounded."""
        return torch.where(self.level_bound > 0, self.achieved / self.level_bound, torch.inf)


def closest_approach(x: Tensor, target: Tensor, radius: Tensor, target_radius: Tensor) -> ClosestApproach:
    """Compare the distance of points to their targets with what the certified balls of both leave.

    Args:
        x: images ``(N, …)`` of the level sets.
        target: images ``(N, …)``.
        radius: signed radii ``(N,)`` of ``x``.
        target_radius: of the targets.
    """
    free = (-target_radius.double()).clamp(min=0)
    here = radius.double()
    bound = torch.where((here > 0) & (free > 0), (here + free) * (1 - 4 * EPS), 0.0)
    return ClosestApproach(distance_above(x, target), bound, free)


def distance_above(a: Tensor, b: Tensor) -> Tensor:
    """ℓ2 distance of each sample, ``(N,)`` float64, rounded up."""
    difference = (a.double() - b.double()).flatten(1)
    # Sums of n squares are off by less than n roundings, and their root by half of that.
    above: Tensor = torch.linalg.vector_norm(difference, dim=1) * (1 + (difference.shape[1] + 8) * EPS)
    return above


def radii_between(signed_radius: SignedRadius, corners: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Signed radii ``(M,)`` of exact points ``Σ weights·corners[rows]``, from images rounded to their dtype."""
    found = []
    for some, share in zip(rows.split(_BATCH), weights.split(_BATCH), strict=True):
        ends = corners[some].double()
        share = share.view(*share.shape, *([1] * (ends.ndim - 2)))
        exact = (ends * share).sum(1)
        rounded = exact.to(corners.dtype)
        radius = signed_radius(rounded, some).double()
        # Where float64 computes the exact point it is off by a few roundings of its size.
        size = torch.linalg.vector_norm(ends.abs().sum(1).flatten(1), dim=1)
        off = distance_above(rounded, exact) + 8 * EPS * size
        found.append(radius.sign() * (radius.abs() * (1 - 4 * EPS) - off).clamp(min=0))
    return torch.cat(found) if found else weights.new_zeros(0)


def _piece_margin(piece: Tensor, radii: Tensor, length: Tensor) -> Tensor:
    """Least radius ``(M,)`` on pieces between places ``(M, 2)`` of segments, from the radii at both ends ``(M, 2)``."""
    # Places are sums of halves of numbers in [0, 1], off by few roundings.
    width = (piece[:, 1] - piece[:, 0] + 16 * EPS) * length
    return torch.minimum((radii.sum(1) - width) / 2 * (1 - 8 * EPS), radii.amin(1))
