"""What is proved of measured level sets where the encoder has a Lipschitz bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.analysis.level_sets import LevelSets
from lipsim.certificates import (
    answer_radius,
    certify_segments,
    certify_triangles,
    closest_approach,
)
from lipsim.certificates.level_sets import SignedRadius
from lipsim.layers.base import evaluation_mode
from lipsim.metric import PerceptualMetric
from lipsim.results.tables import Row
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision

_BATCH = 64  # images that are embedded at once, as in lipsim.certificates.level_sets


@dataclass(frozen=True)
class CertifiedLevelSets:
    """What is proved of S sources with T outcomes and P = T(T − 1)/2 triangles; float64.

    Attributes:
        segment: ``(S, T)``, share of the straight way from source to outcome that is proved to be in the level set.
        star: ``(S,)`` bool, all T of them are proved: a certified star.
        area: ``(S, P)``, share of the triangle of the source and two outcomes that is proved to be inside.
        area_at_most: ``(S, P)``, one minus the share that is proved to be outside.
        achieved: ``(S, T)``, ℓ2 distance of the outcome to its target.
        bound: ``(S, T)``, what that is at least for any point of the level set; 0 where the target is inside itself.
    """

    segment: Tensor
    star: Tensor
    area: Tensor
    area_at_most: Tensor
    achieved: Tensor
    bound: Tensor


def certify_level_sets(
    signed_radius: SignedRadius,
    images: Tensor,
    found: LevelSets,
    *,
    most: int = 200,
    divisions: int = 10,
    depth: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> CertifiedLevelSets:
    """Prove what can be proved of the outcomes of :func:`lipsim.analysis.level_sets.measure_level_sets`.

    Args:
        signed_radius: of points ``(M, …)`` of sources that are given as rows ``(M,)`` of ``images``; positive in the
            level set, see :mod:`lipsim.certificates.level_sets` and :func:`answer_radius_of`.
        images: ``(N, 3, H, W)``, as they were measured.
        found: with the outcomes kept.
        most: points evaluated on a straight way at most.
        divisions: of the sides of triangles.
        depth: how often an undecided cell of a triangle is cut into four.
        say: hears how far it is.

    Raises:
        ValueError: the outcomes were not kept.
    """
    if not found.outcomes.numel():
        raise LipsimError("expected level sets with their outcomes; measure them with keep_outcomes=True")
    rows, (count, targets) = found.index, found.target.shape
    source = images[rows]

    def of_sources(x: Tensor, samples: Tensor) -> Tensor:
        parts = zip(x.split(_BATCH), rows.to(samples.device)[samples].split(_BATCH), strict=True)
        return torch.cat([signed_radius(*part) for part in parts])

    everyone = torch.arange(count, device=images.device)
    segment, achieved, bound = (torch.empty(count, targets, dtype=torch.float64) for _ in range(3))
    proved = torch.empty(count, targets, dtype=torch.bool)
    for k in range(targets):
        say(f"straight ways {k + 1} of {targets}")
        outcome, target = found.outcomes[:, k].to(images), images[found.target[:, k]]
        certificate = certify_segments(of_sources, source, outcome, most=most)
        segment[:, k], proved[:, k] = certificate.share.cpu(), certificate.proved.cpu()
        near = closest_approach(outcome, target, of_sources(outcome, everyone), of_sources(target, everyone))
        achieved[:, k], bound[:, k] = near.achieved.cpu(), near.level_bound.cpu()
    pairs = [(i, j) for j in range(targets) for i in range(j)]
    area, area_at_most = (torch.empty(count, len(pairs), dtype=torch.float64) for _ in range(2))
    for number, (i, j) in enumerate(pairs):
        say(f"triangle {number + 1} of {len(pairs)}")
        corners = torch.stack([source, found.outcomes[:, i].to(images), found.outcomes[:, j].to(images)], 1)
        lower, upper = certify_triangles(of_sources, corners, divisions=divisions, depth=depth).area
        area[:, number], area_at_most[:, number] = lower.cpu(), upper.cpu()
    return CertifiedLevelSets(segment, proved.all(1), area, area_at_most, achieved, bound.clamp(min=0))


def answer_radius_of(metric: PerceptualMetric, reference: Tensor, left: Tensor, right: Tensor) -> SignedRadius:
    """The signed radius of points in the place of the references, for the metric's own answers to these triplets.

    Args:
        metric: with a Lipschitz bound.
        reference: ``(N, 3, H, W)``.
        left: the same.
        right: the same.

    Raises:
        ValueError: half precision, or images that the metric refuses.
    """

    def embed(x: Tensor) -> Tensor:
        with torch.no_grad(), full_precision(), evaluation_mode(metric.encoder):
            z = metric.embed(x)
        metric.check_precision(z)
        return z

    z0, z1 = (torch.cat([embed(part) for part in images.split(_BATCH)]) for images in (left, right))
    triplets = zip(*(images.split(_BATCH) for images in (reference, left, right)), strict=True)
    prefers_left = torch.cat([metric.certify(*triplet).prefers_left for triplet in triplets])
    options = metric.certificate_options

    def signed_radius(x: Tensor, rows: Tensor) -> Tensor:
        return answer_radius(embed(x), z0[rows], z1[rows], prefers_left[rows], **options)

    return signed_radius


def certified_rows(found: Mapping[str, CertifiedLevelSets]) -> list[Row]:
    """What is proved of some models, means over all; the bound among targets that are outside the level set."""
    rows: list[Row] = []
    for name, sets in found.items():
        outside = sets.bound > 0
        near = (sets.achieved / sets.bound)[outside]
        rows.append(
            {
                "model": name,
                "stars proved": f"{float(sets.star.double().mean()):.2f}",
                "straight ways proved": f"{float(sets.segment.mean()):.3f}",
                "triangles proved inside": f"{float(sets.area.mean()):.3f}" if sets.area.numel() else "",
                "not proved outside": f"{float(sets.area_at_most.mean()):.3f}" if sets.area.numel() else "",
                "targets outside": f"{float(outside.double().mean()):.2f}",
                "achieved / bound": f"{float(near.quantile(0.5)):.1f}" if len(near) else "",
            }
        )
    return rows
