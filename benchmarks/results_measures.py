"""What benchmarks/results.py measures of a row that answers by itself: scores, certificates, attacks."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from results_data import Task, Triplets
from results_rows import Trained

from lipsim import certificates
from lipsim.attacks import TwoAFCObjective, auto
from lipsim.certificates import TwoAFCCertificate
from lipsim.evaluation.scores import agrees
from lipsim.metric import PerceptualMetric
from lipsim.metric.distance import Distance, has_features
from lipsim.metric.distances import pixel_l2, pixel_l2_certificate
from lipsim.results import eps_label
from lipsim.results.schema import BenchmarkedSet, Scores
from lipsim.utils.precision import full_precision

CERTIFIED = (36 / 255, 72 / 255, 108 / 255, 1.0, 2.0, 3.0)  # 255, 510 and 765 over 255
JOINT = (36 / 255, 1.0)
ATTACKED = (36 / 255, 1.0, 3.0)


def declare(metric: PerceptualMetric, task: Task, device: torch.device) -> None:
    """Audit once, and search once for the error of the features: nothing changes from here on."""
    metric.lipschitz = metric.lipschitz
    if metric.lipschitz < math.inf:
        some = [triplets.floats(triplets.ids[:8, 0], device) for triplets in task.tests.values()]
        metric.feature_error = metric.measure_feature_error(torch.cat(some), thorough=False)


def measure(
    trained: Trained, triplets: Triplets, seed: int, device: torch.device, options: argparse.Namespace
) -> BenchmarkedSet:
    """Scores of a row on triplets without ties."""
    metric = trained.metric
    known: TwoAFCCertificate | None
    published: Tensor | None = None
    if has_features(metric):
        margin, certificate, published = _certified(metric, triplets, device)
        known = certificate if metric.lipschitz < math.inf else None
    else:
        margin, known = _plain(metric, triplets, device)
    agree = agrees(margin, triplets.right_vote)
    attacked, violations, count = _attacked(metric, triplets, agree, known, seed, device, options)
    return {
        "num_triplets": len(triplets.ids),
        "num_attacked": count,
        "natural": share(agree),
        "certified": {} if known is None else held(agree, known.radius, CERTIFIED),
        "published": held(agree, published, CERTIFIED) if trained.published and published is not None else {},
        "joint": {} if known is None else held(agree, known.joint_radius, JOINT),
        "attacked": attacked,
        "abstained": None,
        "pixels": None if known is None else float(known.pixels.double().median()),
        "violations": violations,
    }


def share(rows: Tensor) -> float | None:
    """The part of N rows that are true; None of none."""
    return float(rows.double().mean()) if len(rows) else None


def held(agree: Tensor, radius: Tensor, eps: Iterable[float]) -> Scores:
    """The part of right answers with a radius beyond each budget."""
    return {eps_label(e): share(agree & (radius > e)) for e in eps}


@torch.no_grad()
def _certified(
    metric: PerceptualMetric, triplets: Triplets, device: torch.device
) -> tuple[Tensor, TwoAFCCertificate, Tensor]:
    """Margins, certificates and published radii on the CPU; each distinct image is embedded once."""
    used, places = triplets.ids.unique(return_inverse=True)
    with full_precision():
        z = torch.cat([metric.embed(triplets.floats(rows, device)) for rows in used.split(128)])
    margins, found, published = [], [], []
    for rows in places.to(device).split(256):
        reference = triplets.floats(used[rows[:, 0].cpu()], device)
        features = [z[column] for column in rows.unbind(1)]
        margins.append(metric.margin(*features).cpu())
        found.append(metric.certify_features(reference, *features).to("cpu"))
        e, e0, e1 = (f.double() for f in features)
        radius = certificates.published_radius(e, e0, e1, anchor=metric.anchor, lipschitz=metric.lipschitz)
        published.append(radius.cpu())
    return torch.cat(margins), _joined(found), torch.cat(published)


@torch.no_grad()
def _plain(distance: Distance, triplets: Triplets, device: torch.device) -> tuple[Tensor, TwoAFCCertificate | None]:
    """Margins of a distance without features; pixel ℓ2 is its own certificate."""
    margins, found = [], []
    for rows in triplets.ids.split(128):
        reference, left, right = (triplets.floats(column, device) for column in rows.unbind(1))
        margins.append((distance(reference, right) - distance(reference, left)).cpu())
        if distance is pixel_l2:
            found.append(pixel_l2_certificate(reference, left, right).to("cpu"))
    return torch.cat(margins), _joined(found) if found else None


def _joined(found: Sequence[TwoAFCCertificate]) -> TwoAFCCertificate:
    return TwoAFCCertificate(*(torch.cat(parts) for parts in zip(*(vars(c).values() for c in found), strict=True)))


def _attacked(
    metric: Distance,
    triplets: Triplets,
    agree: Tensor,
    certificate: TwoAFCCertificate | None,
    seed: int,
    device: torch.device,
    options: argparse.Namespace,
) -> tuple[Scores, int, int]:
    """Scores that the suite leaves on the first triplets, answers flipped within their radius, how many were tried."""
    count = min(options.attacked_triplets, len(triplets.ids))
    if not count:
        return {}, 0, 0
    answer = metric.frozen_copy() if has_features(metric) else metric
    broken = torch.where(agree[:count], math.inf, 0.0).double()  # wrong answers are broken as they are
    violations = 0
    radius = certificate.radius if certificate is not None and options.attack_beyond_radius else None
    for eps, tried in _tried(agree[:count], radius):
        for rows in tried.split(options.attack_batch):
            reference, left, right = (triplets.floats(column, device) for column in triplets.ids[rows].unbind(1))
            with full_precision():
                objective = TwoAFCObjective(answer, reference, left, right)
                found = auto(
                    objective,
                    reference,
                    eps=eps,
                    steps=options.attack_steps,
                    queries=options.queries,
                    seed=seed,
                    index=rows,
                )
            broken[rows] = found.broken_at.cpu()
            if certificate is not None:
                length = (found.x_adv - reference).flatten(1).double().norm(dim=1).cpu()
                flipped = torch.isfinite(found.broken_at.cpu()) & (found.broken_at.cpu() > 0)
                violations += int((flipped & (length < certificate.radius[rows])).sum())
    return {eps_label(e): share(broken > e) for e in ATTACKED}, violations, count


def _tried(agree: Tensor, radius: Tensor | None) -> Iterator[tuple[tuple[float, ...], Tensor]]:
    """Budgets, and the rows of right answers that are attacked with them: all, or those beyond each one's radius."""
    held = torch.zeros(len(agree), dtype=torch.long)
    if radius is not None:
        held = (radius[: len(agree), None] > torch.tensor(ATTACKED, dtype=torch.float64)).sum(1)
    for first in range(len(ATTACKED)):
        rows = (agree & (held == first)).nonzero().flatten()
        if len(rows):
            yield ATTACKED[first:], rows


def passes(trained: Trained, options: argparse.Namespace) -> float | None:
    """Images embedded for a certified answer; None where nothing is certified, or nothing is embedded."""
    if trained.smoothed:
        return float(options.samples + options.selection + 2)
    return 3.0 if has_features(trained.metric) and trained.metric.lipschitz < math.inf else None
