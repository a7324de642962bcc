"""`lipsim same`: whether two images are the same, and how far that answer cannot change."""

from __future__ import annotations

import argparse
import json

from lipsim.cli.parser import add_metric_argument, add_output, budget, load_metric
from lipsim.metric.comparisons import same_files, threshold_of
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim same x.png y.png --metric calibrated.safetensors",
    "lipsim same x.png y.png --threshold 0.1 --json",
    "lipsim same x.png y.png --metric calibrated.safetensors && echo the same",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim same` takes."""
    parser.description = (
        "Prints same where the distance is at most the threshold, else different, and the ℓ2 radius within which a "
        "change of either image provably leaves the answer as it is. The threshold is in the metric's file, where "
        "`lipsim calibrate` writes it. The bundled metric takes a fifth of a second besides loading torch. Exit status "
        "0: the same, 1: different, 2: an error."
    )
    parser.add_argument("left", type=user_path, help="an image file")
    parser.add_argument("right", type=user_path, help="another")
    add_metric_argument(parser, option=True)
    parser.add_argument("--threshold", type=budget, help="the largest distance of the same, instead of the file's")
    add_output(parser, rows=False)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("comparing") as progress:
        progress("loading the metric")
        metric = load_metric(options)
        threshold = threshold_of(metric, options.threshold)
        progress("auditing the metric, and searching for rounding errors")
        certificate = same_files(metric, options.left, options.right, threshold)
    print(json.dumps(certificate.facts(), indent=1) if options.json else certificate)
    return int(not certificate.same)
