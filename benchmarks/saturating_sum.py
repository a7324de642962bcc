"""The tables of docs/sums.md: two metrics, and their sum in which the second saturates, on photographs and materials.

    python benchmarks/saturating_sum.py --photos FOLDER --material FOLDER [--pairs scores.csv]
        [--first photos] [--second scattering] [--weights 4 8 16] [--scales 0.03] [--triplets 10000] [--attacked 200]
        [--output runs/saturating_sum.md]

Photographs are an image folder of train/CLASS/ and val/CLASS/, of which the validation images make triplets; Material
is a clone of its repository, whose untied training votes are scored; pairs have opinion scores. Majority scores in %,
natural and certified where the reference moves (and, "joint", all three images). Attacks run on the sum with the first
weight and scale: the suite at the radii's own scale, and how many of its answers are turned inside their radius.

10,000 triplets of each kind take six minutes of a core; attacks of 200 besides three minutes a set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
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
from lipsim.results.formats import markdown_table
from lipsim.results.tables import Row, percent
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


def scores(votes: Tensor, found: TwoAFCCertificate) -> dict[str, float]:
    """Natural and certified majority scores of one batch, summed."""
    right = agrees(found.margin, votes)
    at = {f"{255 * e:.0f}/255" if e < 1 else f"{e:g}": float((right & (found.radius > e)).sum()) for e in EPS}
    joint = {
        f"joint {255 * e:.0f}/255" if e < 1 else f"joint {e:g}": float((right & (found.joint_radius > e)).sum())
        for e in JOINT
    }
    return {"natural": float(right.sum()), **at, **joint}


def row(batches: list[Batch], certificates: Iterator[TwoAFCCertificate]) -> Row:
    """Scores in % of what certifies each batch."""
    total: dict[str, float] = {}
    count = 0
    for batch, found in zip(batches, certificates, strict=True):
        for name, value in scores(batch.votes, found).items():
            total[name] = total.get(name, 0.0) + value
        count += len(batch.rows)
    return {name: percent(value / count) for name, value in total.items()}


def attacked(metric: SaturatingSum, batches: list[Batch], count: int) -> str:
    """What the suite leaves of some triplets at each budget, and whether it turns an answer inside its radius."""
    part = batches[0].triplet(count)
    images = (part.reference, part.left, part.right)
    found = metric.certify(*images)
    right = agrees(found.margin, part.right_vote)
    result = auto(TwoAFCObjective(metric, *images), part.reference, eps=list(ATTACKED), steps=10, queries=20)
    left = [percent(float((right & ~(result.broken_at <= eps)).double().mean())) for eps in ATTACKED]
    certified = [percent(float((right & (found.radius > eps)).double().mean())) for eps in ATTACKED]
    inside = int((result.broken_at <= found.radius).sum())
    nearest = float((result.broken_at / found.radius).min())
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
    sums = {
        f"λ = {weight:g}, τ = {scale:g}": SaturatingSum(*metrics, weight, scale)
        for weight in options.weights
        for scale in options.scales
    }
    named = dict(zip((Path(options.first).stem, Path(options.second).stem), (0, 1), strict=True))
    lines: list[str] = []
    with Progress("sums", sys.stderr) as progress:
        sets: dict[str, list[Batch]] = {}
        if options.photos:
            sets |= photographs(options.photos, options.triplets, metrics, progress)
        if options.material:
            sets["material"] = material(options.material, metrics)
        for name, batches in sets.items():
            rows: list[Row] = []
            for title, which in named.items():
                metric = metrics[which]
                alone = (
                    metric.certify_features(
                        b.images[b.rows[:, 0]], *(b.features[which][b.rows[:, k]] for k in range(3))
                    )
                    for b in batches
                )
                progress(f"{name}: {title}")
                rows.append({"metric": title, **row(batches, alone)})
            for title, metric in sums.items():
                progress(f"{name}: {title}")
                both = (
                    certify_sum(b.images[b.rows[:, 0]], *b.terms(metrics), weight=metric.weight, scale=metric.scale)
                    for b in batches
                )
                rows.append({"metric": title, **row(batches, both)})
            lines += [f"{name}, {sum(len(b.rows) for b in batches)} triplets", "", markdown_table(rows), ""]
            if options.attacked:
                progress(f"{name}: attacks")
                lines += [attacked(next(iter(sums.values())), batches, options.attacked), ""]
        if options.pairs:
            progress("pairs")
            distances = {**{title: metrics[which] for title, which in named.items()}, **sums}
            found = correlate(distances, PairTable.read(options.pairs))
            rows = [
                {"metric": name, "SRCC": f"{one.srcc:.3f}", "KRCC": f"{one.krcc:.3f}"} for name, one in found.items()
            ]
            lines += ["pairs", "", markdown_table(rows), ""]
    text = "\n".join(lines)
    print(text)
    if options.output:
        write_text(options.output, text)


if __name__ == "__main__":
    main()
