"""What benchmarks/results.py measures of a row that answers under noise: smoothed scores, certificates and attacks."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from results_data import Triplets
from results_measures import ATTACKED, CERTIFIED, JOINT, held, share

from lipsim import certificates
from lipsim.attacks import SmoothedObjective, TwoAFCObjective, auto
from lipsim.attacks.objectives import UnendingObjective
from lipsim.certificates import SmoothedCertificate
from lipsim.metric import PerceptualMetric
from lipsim.metric.smoothed import Moving, SmoothedMetric
from lipsim.results import eps_label
from lipsim.results.schema import BenchmarkedSet, Scores
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress

_OTHER_DRAWS = 1 << 32  # the numbers of samples end before


def measure_smoothed(
    metric: PerceptualMetric,
    sigma: float,
    tests: Mapping[str, Triplets],
    seed: int,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, BenchmarkedSet]:
    """Scores of a row under noise on each test set without ties.

    Every image has its noise once, for all sets and triplets that it is in, and for changes of the reference alone as
    for joint ones. So sets over few images are measured whole, and of others the first ``--smoothed-triplets``.
    """
    smoothed = SmoothedMetric(metric, sigma, options.samples, options.selection, options.alpha, seed)
    found: dict[str, BenchmarkedSet] = {}
    for group in _over_the_same_images(tests, options.smoothed_triplets):
        first = next(iter(group.values()))
        ids = torch.cat([triplets.ids for triplets in group.values()])
        used, places = ids.unique(return_inverse=True)
        with Progress(f"noise on {', '.join(group)}") as progress:
            reference, joint = smoothed.certify_shared(
                first.floats(used, device),
                places,
                moving=("reference", "all"),
                index=used,
                advance=progress.counter(len(used) * (options.samples + options.selection), "passes"),
            )
        start = 0
        for name, triplets in group.items():
            rows = slice(start, start := start + len(triplets.ids))
            parts = (_part(certificate, rows) for certificate in (reference, joint))
            found[name] = _scores(smoothed, triplets, *parts, device, options)
    return found


def _over_the_same_images(tests: Mapping[str, Triplets], most: int) -> list[dict[str, Triplets]]:
    """Sets over the same images together: whole, if that is no more images than so many triplets of their own have."""
    groups: dict[int, dict[str, Triplets]] = {}
    for name, triplets in tests.items():
        groups.setdefault(triplets.images.data_ptr(), {})[name] = triplets
    found = []
    for group in groups.values():
        few = len(torch.cat([triplets.ids for triplets in group.values()]).unique()) <= 3 * most
        found.append(group if few else {name: t.select(slice(most)) for name, t in group.items()})
    return found


def _part(certificate: SmoothedCertificate, rows: slice) -> SmoothedCertificate:
    return SmoothedCertificate(**{name: value[rows].cpu() for name, value in vars(certificate).items()})


def _scores(
    smoothed: SmoothedMetric,
    triplets: Triplets,
    reference: SmoothedCertificate,
    joint: SmoothedCertificate,
    device: torch.device,
    options: argparse.Namespace,
) -> BenchmarkedSet:
    agree, everywhere = _chosen(reference, triplets), _chosen(joint, triplets)
    attacked, violations = _attacked(smoothed, "reference", triplets, device, options)
    attacked_jointly, violations_jointly = _attacked(smoothed, "all", triplets, device, options)
    return {
        "num_triplets": len(triplets.ids),
        "num_attacked": min(options.smoothed_attacked, len(triplets.ids)),
        "natural": share(agree),
        "certified": held(agree, reference.radius, CERTIFIED),
        "published": {},
        "joint": {},  # the candidates have no noise
        "attacked": attacked,
        "abstained": share(reference.abstained),
        "pixels": _pixels(triplets, reference.radius),
        "violations": violations + violations_jointly,
        "jointly_smoothed": {
            "natural": share(everywhere),
            "certified": held(everywhere, joint.single_radius, CERTIFIED),
            "joint": held(everywhere, joint.radius, JOINT),
            "attacked": attacked_jointly,
            "abstained": share(joint.abstained),
            "pixels": _pixels(triplets, joint.single_radius),
        },
    }


def _pixels(triplets: Triplets, radius: Tensor) -> float:
    """The median certified number of pixels of the reference."""
    images = triplets.floats(triplets.ids[:, 0], torch.device("cpu"))
    parts = zip(images.split(256), radius.split(256), strict=True)
    return float(torch.cat([certificates.certified_pixels(*part) for part in parts]).double().median())


def _chosen(found: SmoothedCertificate, triplets: Triplets) -> Tensor:
    """Where a smoothed answer is that of the votes."""
    return ~found.abstained & (found.prefers_left == (triplets.right_vote < 0.5))


def _attacked(
    smoothed: SmoothedMetric, noisy: Moving, triplets: Triplets, device: torch.device, options: argparse.Namespace
) -> tuple[Scores, int]:
    """What an attack on the reference leaves of answers with noise on it, or on all images, and violations.

    The answers have fewer draws than those that are certified, before and after. The largest budget comes first: what
    stands there is not attacked with less. An answer that abstains after an attack is lost; one that is the other one,
    surely, within the radius is a violation.
    """
    count = min(options.smoothed_attacked, len(triplets.ids))
    if not count:
        return {}, 0
    triplets = triplets.select(slice(count))
    sampling = {"samples": options.attack_samples, "selection": options.selection, "alpha": options.alpha}
    smoothed = SmoothedMetric(smoothed.metric, smoothed.sigma, **sampling, seed=smoothed.seed, moving=noisy)
    images = [triplets.floats(column, device) for column in triplets.ids.unbind(1)]
    clean = smoothed.certify(*images, index=torch.arange(count)).to("cpu")
    agree, radius, violations = _chosen(clean, triplets), clean.single_radius, 0
    broken = torch.where(agree, math.inf, 0.0).double()
    for rows in agree.nonzero().flatten().split(max(1, options.attack_batch // options.attack_draws)):
        attack = SmoothedAttack(smoothed, [part[rows] for part in images], clean.prefers_left[rows], rows, options)
        going = torch.arange(len(rows))
        for budget in reversed(ATTACKED):
            if options.attack_beyond_radius:
                going = going[radius[rows[going]] < budget]
            if not len(going):
                break
            lost, turned, length = attack(budget, going)
            violations += int((turned & (length < radius[rows[going]])).sum())
            going = going[lost]
            broken[rows[going]] = budget
    return {eps_label(e): share(broken > e) for e in ATTACKED}, violations


class SmoothedAttack:
    """APGD and Square on the soft votes of noisy copies, with all of their steps, and the answer where they end.

    What a few draws only just break, others do not: so no attack stops early, and the answer has draws of its own. The
    reference moves, whether it alone has noise or all images do.

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
        sigma, draws, seed = smoothed.sigma, options.attack_draws, smoothed.seed
        with full_precision():
            metric, answers = smoothed.metric.frozen_copy(), left.to(images[0].device)
            if smoothed.moving == "all":
                self.votes = SmoothedObjective.of_triplets(
                    metric, *images, sigma, draws, chosen_left=answers, seed=seed, index=index
                )
            else:
                plain = TwoAFCObjective(metric, *images, chosen_left=answers)
                self.votes = SmoothedObjective(plain, images[0], sigma, draws, seed=seed, index=index)

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
