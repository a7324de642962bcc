"""`lipsim calibrate`: choose the threshold of `lipsim same` on labelled pairs."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console

from lipsim.cli.parser import (
    add_columns,
    add_metric_argument,
    add_output,
    add_running,
    budget,
    load_metric,
    metric_file,
    natural_int,
    positive_int,
    share,
)
from lipsim.data.sets.labelled import DIFFERENT_PER_SAME, LabelledPairs
from lipsim.evaluation.thresholds import EPS, calibrate
from lipsim.metric.files import write_threshold
from lipsim.results.tables import print_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import print_csv

EXAMPLES = (
    "lipsim calibrate pairs.csv --far 0.01 --output calibrated.safetensors",
    "lipsim calibrate originals/ compressed/ --far 1/1000 --output calibrated.safetensors",
    "lipsim calibrate pairs.csv --attack-pairs 0 --eps 0.25 0.5 --csv",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim calibrate` takes."""
    parser.description = (
        "Choose the largest threshold at which at most a share --far of the different pairs counts as the same, and "
        "write the metric with it. Pairs are a CSV file with the columns left, right and same (1 or 0), paths relative "
        "to its folder, or two folders: images of one name are the same, and pairs across names are drawn. Shows how "
        "many pairs are answered right: of themselves, provably for every change of the left image up to ε, and after "
        "attacks within ε. Each image is embedded once; 100 attacked pairs take the bundled metric a minute. "
        "Exit status 1 where an attack breaks a certificate."
    )
    parser.add_argument("pairs", nargs="+", type=user_path, help="a CSV file, or two folders")
    add_metric_argument(parser, option=True)
    parser.add_argument("--far", type=share, default=0.01, help="false-accept rate, as 0.01 or 1/1000 (%(default)s)")
    parser.add_argument(
        "--output", type=metric_file, metavar="OUTPUT.safetensors", help="the metric with its threshold"
    )
    parser.add_argument("--eps", nargs="+", type=budget, default=EPS, help="ℓ2 budgets (36/255 72/255 108/255 1)")
    parser.add_argument(
        "--attack-pairs", type=natural_int, default=50, help="how many pairs of each kind are attacked (%(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, default=50, help="of each attack (%(default)s)")
    parser.add_argument(
        "--different",
        type=positive_int,
        help=f"of two folders: how many different pairs to draw ({DIFFERENT_PER_SAME} for each of the same)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of draws and attacks (%(default)s)")
    add_columns(parser, "same=is_match")
    add_running(parser, "images")
    add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    data = _data(options)
    if data.skipped:
        print(data.skipped, file=sys.stderr)
    if data.alone:
        print(f"without a partner, in no pair: {', '.join(map(str, data.alone))}", file=sys.stderr)
    with Progress("calibrating") as progress:
        progress("loading the metric")
        metric = load_metric(options).to(options.device)
        found = calibrate(
            metric,
            data,
            far=options.far,
            eps=options.eps,
            attack_pairs=options.attack_pairs,
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            progress=progress,
        )
    if options.output is not None:
        write_threshold(options.metric, options.output, found.threshold, metric)
    rows = found.rows()
    if options.json:
        print(
            json.dumps({**found.facts(), "output": None if options.output is None else str(options.output)}, indent=1)
        )
    elif options.csv:
        print_csv(list(rows[0]), [list(row.values()) for row in rows])
    else:
        print(found.summary())
        print_table(Console(), rows, "Right answers in %, for every change of the left image up to ε")
        print(
            f"written {options.output}" if options.output else "nothing written; --output keeps it in a metric's file"
        )
    if found.violations:
        print(f"FAILED: attacks broke {found.violations} pairs within their certified radius", file=sys.stderr)
    return int(found.violations > 0)


def _data(options: argparse.Namespace) -> LabelledPairs:
    if len(options.pairs) == 1:
        if options.different is not None:
            raise LipsimError("a CSV file says itself which pairs are different; leave --different out")
        return LabelledPairs.read(options.pairs[0], dict(options.columns))
    if len(options.pairs) != 2 or options.columns:
        raise LipsimError(f"expected a CSV file or two folders, got {len(options.pairs)} paths")
    return LabelledPairs.from_folders(*options.pairs, different=options.different, seed=options.seed)
