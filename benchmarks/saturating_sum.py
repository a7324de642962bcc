"""The tables of docs/sums.md: two metrics, and their sum in which the second saturates, on photographs and materials.

    python benchmarks/saturating_sum.py --photos FOLDER --material FOLDER [--pairs scores.csv]
        [--first photos] [--second scattering] [--weights 4 8 16] [--scales 0.03] [--triplets 10000] [--attacked 200]
        [--output runs/saturating_sum.md]

Photographs are an image folder of train/CLASS/ and val/CLASS/, of which the validation images make triplets; Material
is a clone of its repository, whose untied training votes are scored; pairs have opinion scores. Majority scores in %,
natural and certified where the reference moves (and, "joint", all three images). Attacks run on the sum with the first
weight and scale: what the suite leaves at each budget, and how many answers it turns inside their radius.

10,000 triplets of each kind take two minutes of a core; attacks of 200 besides five to ten a set.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import lipsim
from lipsim.attacks import TwoAFCObjective, auto
from lipsim.certificates import Term, TwoAFCCertificate, certify_sum
from lipsim.cli.parser import OneLineParser, natural_int, one_line_errors, positive_int
from lipsim.data import Triplet
from lipsim.data.sets.material import load_material_answers, load_material_images
from lipsim.data.sets.pairs import PairTable
from lipsim.datamodules import PhotoData
from lipsim.evaluation.correlation import correlate
from lipsim.evaluation.scores import agrees
from lipsim.metric import PerceptualMetric, SaturatingSum
from lipsim.results import eps_label
from lipsim.results.formats import markdown_table
from lipsim.results.tables import Row, number, percent
from lipsim.utils.files import write_text
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress

EPS = (36 / 255, 72 / 255, 108 / 255, 1.0)
ATTACKED = (*EPS, 2.0)
JOINT = (36 / 255, 1.0)
_BATCH = 500


@dataclass(frozen=True)
class Batch:
    """Triplets of some images, and the features of these by two metrics."""

    images: Tensor
    rows: Tensor  # (N, 3) into the images
    votes: Tensor
    features: tuple[Tensor, Tensor]

    def terms(self, metrics: tuple[PerceptualMetric, PerceptualMetric]) -> tuple[Term, Term]:
        """What certificates take."""
        first, second = (
            Term(*(z[self.rows[:, k]] for k in range(3)), **metric.certificate_options)
            for metric, z in zip(metrics, self.features, strict=True)
        )
        return first, second

    def triplet(self, count: int) -> Triplet:
        """The first of the triplets as images."""
        rows = self.rows[:count]
        x, x0, x1 = (self.images[rows[:, k]] for k in range(3))
        return Triplet(x, x0, x1, self.votes[:count], torch.arange(len(rows)))


@torch.no_grad()
def embedded(images: Tensor, rows: Tensor, votes: Tensor, metrics: tuple[PerceptualMetric, PerceptualMetric]) -> Batch:
    """A batch with its features, computed in full precision."""
    with full_precision():
        first, second = (torch.cat([metric.embed(part) for part in images.split(_BATCH)]) for metric in metrics)
    return Batch(images, rows, votes, (first, second))


def photographs(
    root: Path, count: int, metrics: tuple[PerceptualMetric, PerceptualMetric], progress: Progress
) -> dict[str, list[Batch]]:
    """Triplets of each kind of the validation images: semantic ones, and distortions."""
    data = PhotoData(root, image_size=metrics[0].image_size, batch_size=_BATCH, num_test=count)
    data.setup("test")
    found: dict[str, list[Batch]] = {}
    for name, loader in zip(data.test_sets, data.test_dataloader(), strict=True):
        advance, found[name] = progress.counter(count, f"{name} triplets"), []
        for batch in loader:
            images = torch.cat([batch.reference, batch.left, batch.right])
            rows = torch.arange(len(images)).view(3, -1).T
            found[name].append(embedded(images, rows, batch.right_vote, metrics))
            advance(len(rows))
    return found


def material(root: Path, metrics: tuple[PerceptualMetric, PerceptualMetric]) -> list[Batch]:
    """The untied votes of the training part, whose images are embedded once."""
    images, _ = load_material_images(root, metrics[0].preprocess)
    answers = load_material_answers(root)
    whole = embedded(images, answers.ids, answers.right_vote, metrics)
    return [replace(whole, rows=whole.rows[p], votes=whole.votes[p]) for p in torch.arange(len(whole.rows)).split(2000)]


def row(batches: list[Batch], certificates: Iterable[TwoAFCCertificate]) -> Row:
    """Natural and certified majority scores in % of what certifies each batch."""
    total: Counter[str] = Counter()
    for batch, found in zip(batches, certificates, strict=True):
        right = agrees(found.margin, batch.votes)
        total["natural"] += int(right.sum())
        for name, radius, budgets in (("", found.radius, EPS), ("joint ", found.joint_radius, JOINT)):
            for eps in budgets:
                total[f"{name}{eps_label(eps)}"] += int((right & (radius > eps)).sum())
    count = sum(len(batch.rows) for batch in batches)
    return {name: percent(value / count) for name, value in total.items()}


def rows(
    batches: list[Batch],
    metrics: tuple[PerceptualMetric, PerceptualMetric],
    names: tuple[str, str],
    sums: dict[str, SaturatingSum],
) -> list[Row]:
    """A row for each metric, and for each of their sums."""
    found: list[Row] = []
    for k, (name, metric) in enumerate(zip(names, metrics, strict=True)):
        alone = (
            metric.certify_features(batch.images[batch.rows[:, 0]], *(batch.features[k][ids] for ids in batch.rows.T))
            for batch in batches
        )
        found.append({"metric": name, **row(batches, alone)})
    for name, both in sums.items():
        certified = (
            certify_sum(batch.images[batch.rows[:, 0]], *batch.terms(metrics), weight=both.weight, scale=both.scale)
            for batch in batches
        )
        found.append({"metric": name, **row(batches, certified)})
    return found


def attacked(metric: SaturatingSum, batches: list[Batch], count: int) -> str:
    """What the suite leaves of some triplets at each budget, and whether it turns an answer inside its radius."""
    part = batches[0].triplet(count)
    images = (part.reference, part.left, part.right)
    found = metric.certify(*images)
    right = agrees(found.margin, part.right_vote)
    result = auto(TwoAFCObjective(metric, *images), part.reference, eps=list(ATTACKED), steps=10, queries=20)
    left = [percent(float((right & ~(result.broken_at <= eps)).double().mean())) for eps in ATTACKED]
    certified = [percent(float((right & (found.radius > eps)).double().mean())) for eps in ATTACKED]
    length = (result.x_adv - part.reference).flatten(1).double().norm(dim=1)
    turned = right & torch.isfinite(result.broken_at)
    inside = int((turned & (length < found.radius)).sum())
    nearest = float((length / found.radius)[turned].min()) if turned.any() else math.inf
    natural = percent(float(right.double().mean()))
    return (
        f"{len(part)} attacked: natural {natural}; left {' / '.join(left)}; certified {' / '.join(certified)} at "
        f"{', '.join(f'{eps:.3g}' for eps in ATTACKED)}; {inside} turned inside their radius, nearest {nearest:.2f}"
    )


def main() -> None:
    """Print the tables."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=user_path, help="image folder with val/CLASS/IMAGE")
    parser.add_argument("--material", type=user_path, help="clone of the Material repository")
    parser.add_argument("--pairs", type=user_path, help="CSV file of pairs with opinion scores")
    parser.add_argument("--first", default="photos", help="metric of what is far apart (%(default)s)")
    parser.add_argument("--second", default="scattering", help="metric of what is near (%(default)s)")
    parser.add_argument("--weights", type=float, nargs="+", default=[8.0])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.03])
    parser.add_argument("--triplets", type=positive_int, default=10_000, help="of photographs, each kind (%(default)s)")
    parser.add_argument("--attacked", type=natural_int, default=0, help="triplets of each set to attack (%(default)s)")
    parser.add_argument("--output", type=user_path, help="file for the tables")
    with one_line_errors():
        run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Every set that the options name."""
    metrics = (lipsim.load(options.first), lipsim.load(options.second))
    names = (Path(options.first).stem, Path(options.second).stem)
    sums = {
        f"λ = {weight:g}, τ = {scale:g}": SaturatingSum(*metrics, weight, scale)
        for weight in options.weights
        for scale in options.scales
    }
    pairs = PairTable.read(options.pairs) if options.pairs else None
    lines: list[str] = []

    def say(*paragraphs: str) -> None:
        lines.extend(paragraphs)
        print("\n\n".join(paragraphs), end="\n\n", flush=True)
        if options.output:
            write_text(options.output, "\n\n".join(lines) + "\n")

    with Progress("sums", sys.stderr) as progress:
        sets = photographs(options.photos, options.triplets, metrics, progress) if options.photos else {}
        if options.material:
            sets["material"] = material(options.material, metrics)
        for name, batches in sets.items():
            progress(f"{name}: certificates")
            table = markdown_table(rows(batches, metrics, names, sums))
            say(f"{name}, {sum(len(batch.rows) for batch in batches)} triplets", table)
            if options.attacked:
                progress(f"{name}: attacks")
                say(attacked(next(iter(sums.values())), batches, options.attacked))
        if pairs is not None:
            progress("pairs")
            found = correlate({**dict(zip(names, metrics, strict=True)), **sums}, pairs)
            agreement: list[Row] = [
                {"metric": name, "SRCC": number(one.srcc), "KRCC": number(one.krcc)} for name, one in found.items()
            ]
            say("pairs", markdown_table(agreement))


if __name__ == "__main__":
    main()
