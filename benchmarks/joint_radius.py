"""The exact joint radius beside the sum of four turns that it replaced, on triplets of built-in images or photographs.

    python benchmarks/joint_radius.py [--checkpoint photos] [--photos FOLDER] [--triplets 3000] [--rounds 5]

The baseline is the largest budget with ``2α(e, ε) + α(e0, ε) + α(e1, ε) < |θ1 − θ0|``, which counts a reference as
turning from one candidate as fast as to the other. Columns: the ratio of the radii, certified scores of all triplets
in % by both, and what computing the radius from features takes, in turns, as a ratio; median of the rounds. Photographs
are an image folder of train/CLASS/ and val/CLASS/. A minute for 3,000 triplets of a core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lipsim
from lipsim import certificates
from lipsim.certificates.geometry import anchored_norm, angle, rotation
from lipsim.cli.parser import OneLineParser, one_line_errors, positive_int
from lipsim.data import Triplet
from lipsim.datamodules import BuiltinData, PhotoData
from lipsim.evaluation.scores import agrees
from lipsim.results import eps_label
from lipsim.results.formats import markdown_table
from lipsim.results.tables import Row, percent
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress

EPS = (36 / 255, 0.5, 1.0)


def four_turns(z: Tensor, z0: Tensor, z1: Tensor, *, anchor: float, lipschitz: float, feature_error: float) -> Tensor:
    """The joint radius by norms and two angles alone, ``(N,)``, of features in float64."""
    norms = torch.stack([anchored_norm(t, anchor) for t in (z, z0, z1)])
    gap = (angle(z, z1, anchor) - angle(z, z0, anchor)).abs()
    low, high = torch.zeros_like(gap), norms.amin(0)
    for _ in range(60):
        middle = (low + high) / 2
        reference, left, right = rotation(norms, middle).unbind(0)
        holds = 2 * reference + left + right < gap
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return (low - feature_error).clamp(min=0) / lipschitz


def compared(loader: DataLoader[Triplet], name: str, metric: lipsim.PerceptualMetric, rounds: int) -> Row:
    """A row of the table."""
    votes, features = [], []
    with torch.no_grad(), full_precision():
        for batch in loader:
            votes.append(batch.right_vote)
            features.append([metric.embed(images).double() for images in batch.images()])
    z, z0, z1 = (torch.cat(parts) for parts in zip(*features, strict=True))
    right = agrees(metric.margin(z, z0, z1), torch.cat(votes))
    functions: list[Callable[..., Tensor]] = [four_turns, certificates.joint_radius]
    radii, seconds = [f(z, z0, z1, **metric.certificate_options) for f in functions], []
    for _ in range(rounds):
        starts = []
        for function in functions:
            start = time.perf_counter()
            for parts in features:
                function(*parts, **metric.certificate_options)
            starts.append(time.perf_counter() - start)
        seconds.append(starts[1] / starts[0])
    ratio = (radii[1] / radii[0])[radii[0] > 0]
    quantiles = ratio.quantile(torch.tensor([0.01, 0.5, 0.99], dtype=ratio.dtype)).tolist()
    row: Row = {"triplets": f"{name}, {len(z)}", "ratio (1 %, median, 99 %)": " / ".join(f"{q:.2f}" for q in quantiles)}
    for eps in EPS:
        both = [percent(float((right & (radius > eps)).double().mean())) for radius in radii]
        row[eps_label(eps)] = " → ".join(both)
    return {**row, "time": f"{statistics.median(seconds):.2f}"}


def main() -> None:
    """Print the table."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="photos", help="metric (%(default)s)")
    parser.add_argument("--photos", type=user_path, help="image folder with val/CLASS/IMAGE, in place of built-in data")
    parser.add_argument("--triplets", type=positive_int, default=3000, help="of each set (%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=500, help="triplets at a time (%(default)s)")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--rounds", type=positive_int, default=5)
    with one_line_errors():
        run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Every set."""
    torch.set_num_threads(options.threads)
    metric = lipsim.load(options.checkpoint)
    settings = {"image_size": metric.image_size, "batch_size": options.batch, "num_test": options.triplets}
    data = PhotoData(options.photos, **settings) if options.photos else BuiltinData(**settings)
    data.setup("test")
    with Progress("joint radius", sys.stderr) as progress:
        table = []
        for name, loader in zip(data.test_sets, data.test_dataloader(), strict=True):
            progress(name)
            table.append(compared(loader, name, metric, options.rounds))
    print(markdown_table(table))


if __name__ == "__main__":
    main()
