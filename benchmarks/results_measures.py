"""What benchmarks/results.py measures of a row: scores, certificates, attacks, smoothing."""

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
from lipsim.attacks import SmoothedObjective, TwoAFCObjective, auto
from lipsim.attacks.objectives import UnendingObjective
from lipsim.certificates import SmoothedCertificate, TwoAFCCertificate
from lipsim.evaluation.scores import agrees
from lipsim.metric import PerceptualMetric
from lipsim.metric.distance import Distance, has_features
from lipsim.metric.distances import pixel_l2, pixel_l2_certificate
from lipsim.metric.smoothed import SmoothedMetric
from lipsim.results import eps_label
from lipsim.results.schema import BenchmarkedSet, Scores
from lipsim.utils.precision import full_precision

CERTIFIED = (36 / 255, 72 / 255, 108 / 255, 1.0, 2.0, 3.0)  # 255, 510 and 765 over 255
JOINT = (36 / 255, 1.0)
ATTACKED = (36 / 255, 1.0, 3.0)
_OTHER_DRAWS = 1 << 32  # the numbers of samples end before


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
    if trained.smoothed:
        assert has_features(metric)
        return _smoothed(metric, trained.smoothed, triplets, seed, device, options)
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
        "natural": _share(agree),
        "certified": {} if known is None else _held(agree, known.radius, CERTIFIED),
        "published": _held(agree, published, CERTIFIED) if trained.published and published is not None else {},
        "joint": {} if known is None else _held(agree, known.joint_radius, JOINT),
        "attacked": attacked,
        "abstained": None,
        "pixels": None if known is None else float(known.pixels.double().median()),
        "violations": violations,
    }


def _share(rows: Tensor) -> float | None:
    return float(rows.double().mean()) if len(rows) else None


def _held(agree: Tensor, radius: Tensor, eps: Iterable[float]) -> Scores:
    return {eps_label(e): _share(agree & (radius > e)) for e in eps}


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
    return {eps_label(e): _share(broken > e) for e in ATTACKED}, violations, count


def _tried(agree: Tensor, radius: Tensor | None) -> Iterator[tuple[tuple[float, ...], Tensor]]:
    """Budgets, and the rows of right answers that are attacked with them: all, or those beyond each one's radius."""
    held = torch.zeros(len(agree), dtype=torch.long)
    if radius is not None:
        held = (radius[: len(agree), None] > torch.tensor(ATTACKED, dtype=torch.float64)).sum(1)
    for first in range(len(ATTACKED)):
        rows = (agree & (held == first)).nonzero().flatten()
        if len(rows):
            yield ATTACKED[first:], rows


def _smoothed(
    metric: PerceptualMetric,
    sigma: float,
    triplets: Triplets,
    seed: int,
    device: torch.device,
    options: argparse.Namespace,
) -> BenchmarkedSet:
    triplets = triplets.select(slice(options.smoothed_triplets))
    smoothed = SmoothedMetric(metric, sigma, options.samples, options.selection, options.alpha, seed)
    images = [triplets.floats(column, device) for column in triplets.ids.unbind(1)]
    found = smoothed.certify(*images, index=torch.arange(len(triplets.ids))).to("cpu")
    agree = _chosen(found, triplets)
    attacked, violations, count = _smoothed_attacked(metric, sigma, triplets, seed, device, options)
    return {
        "num_triplets": len(triplets.ids),
        "num_attacked": count,
        "natural": _share(agree),
        "certified": _held(agree, found.radius, CERTIFIED),
        "published": {},
        "joint": {},
        "attacked": attacked,
        "abstained": _share(found.abstained),
        "pixels": float(
            certificates.certified_pixels(triplets.floats(triplets.ids[:, 0], device).cpu(), found.radius)
            .double()
            .median()
        ),
        "violations": violations,
    }


def _chosen(found: SmoothedCertificate, triplets: Triplets) -> Tensor:
    """Where a smoothed answer is that of the votes."""
    return ~found.abstained & (found.prefers_left == (triplets.right_vote < 0.5))


def _smoothed_attacked(
    metric: PerceptualMetric,
    sigma: float,
    triplets: Triplets,
    seed: int,
    device: torch.device,
    options: argparse.Namespace,
) -> tuple[Scores, int, int]:
    """:func:`_attacked` for smoothed answers, of fewer draws than those that are certified, before and after.

    The largest budget comes first: what stands there is not attacked with less. An answer that abstains after an attack
    is lost; one that is the other one, surely, within the radius is a violation.
    """
    count = min(options.smoothed_attacked, len(triplets.ids))
    if not count:
        return {}, 0, 0
    triplets = triplets.select(slice(count))
    smoothed = SmoothedMetric(metric, sigma, options.attack_samples, options.selection, options.alpha, seed)
    images = [triplets.floats(column, device) for column in triplets.ids.unbind(1)]
    clean = smoothed.certify(*images, index=torch.arange(count)).to("cpu")
    agree, violations = _chosen(clean, triplets), 0
    broken = torch.where(agree, math.inf, 0.0).double()
    for rows in agree.nonzero().flatten().split(max(1, options.attack_batch // options.attack_draws)):
        attack = SmoothedAttack(smoothed, [part[rows] for part in images], clean.prefers_left[rows], rows, options)
        going = torch.arange(len(rows))
        for budget in reversed(ATTACKED):
            if options.attack_beyond_radius:
                going = going[clean.radius[rows[going]] < budget]
            if not len(going):
                break
            lost, turned, length = attack(budget, going)
            violations += int((turned & (length < clean.radius[rows[going]])).sum())
            going = going[lost]
            broken[rows[going]] = budget
    return {eps_label(e): _share(broken > e) for e in ATTACKED}, violations, count


class SmoothedAttack:
    """APGD and Square on the soft votes of noisy copies, with all of their steps, and the answer where they end.

    What a few draws only just break, others do not: so no attack stops early, and the answer has draws of its own.

    Args:
        smoothed: the metric under noise.
        images: of N triplets.
        left: ``(N,)`` bool, their smoothed answers.
        index: ``(N,)``, their numbers.
        options: of the attacks.
    """

    def __init__(
        self, smoothed: SmoothedMetric, images: list[Tensor], left: Tensor, index: Tensor, options: argparse.Namespace
    ) -> None:
        self.smoothed, self.images, self.left, self.index, self.options = smoothed, images, left, index, options
        with full_precision():
            plain = TwoAFCObjective(smoothed.metric.frozen_copy(), *images, chosen_left=left.to(images[0].device))
            draws, seed = options.attack_draws, smoothed.seed
            self.votes = SmoothedObjective(plain, images[0], smoothed.sigma, draws, seed=seed, index=index)

    def __call__(self, eps: float, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether answers are lost, whether they are the other one, ``(rows,)`` bool, and how far images moved."""
        there = rows.to(self.images[0].device)
        x, *candidates = (part[there] for part in self.images)
        with full_precision():
            moved = auto(
                UnendingObjective(self.votes.select(there)),
                x,
                eps=eps,
                attacks=("apgd", "square"),
                steps=self.options.attack_steps,
                queries=self.options.queries,
                seed=self.smoothed.seed,
                index=self.index[rows],
            ).x_adv
        found = self.smoothed.certify(moved, *candidates, index=_OTHER_DRAWS + self.index[rows]).to("cpu")
        turned = ~found.abstained & (found.prefers_left != self.left[rows])
        return found.abstained | turned, turned, (moved - x).flatten(1).double().norm(dim=1).cpu()


def passes(trained: Trained, options: argparse.Namespace) -> float | None:
    """Images embedded for a certified answer; None where nothing is certified, or nothing is embedded."""
    if trained.smoothed:
        return float(options.samples + options.selection + 2)
    return 3.0 if has_features(trained.metric) and trained.metric.lipschitz < math.inf else None
