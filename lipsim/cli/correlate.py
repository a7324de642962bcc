"""`lipsim correlate`: how well metrics agree with the opinion scores of a table of image pairs."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from rich.console import Console

from lipsim.cli.parser import add_columns, add_running, budget, named_file, output_folder
from lipsim.data.sets.pairs import PairTable
from lipsim.evaluation.correlation import Moves, correlate, correlation_rows
from lipsim.metric import load
from lipsim.metric.distance import Distance
from lipsim.metric.distances import BASELINES, check_names
from lipsim.metric.files import DEFAULT
from lipsim.results.formats import remove_table, write_table
from lipsim.results.tables import print_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_text
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EPS = (36 / 255, 72 / 255, 108 / 255)
EXAMPLES = (
    "lipsim correlate scores.csv",
    "lipsim correlate scores.csv --metric ours=runs/m.safetensors --baselines --eps 0.1",
    "lipsim correlate tid.csv --columns mos=MOS reference=ref --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim correlate` takes."""
    parser.description = (
        "SRCC, KRCC and PLCC of metrics with opinion scores (positive: larger distances where people see more of a "
        "difference), and the certified interval of each: what it is within, however the images change by up to ε. "
        "The table is a CSV file with the columns reference, distorted, and mos (high: similar) or dmos (high: "
        "different); its paths are relative to its folder. Each distinct image is embedded once: seconds for a "
        "thousand images of 64 pixels."
    )
    parser.add_argument("table", type=user_path, help="the CSV file")
    parser.add_argument(
        "--metric",
        nargs="+",
        type=named_file,
        default=[named_file(DEFAULT)],
        metavar="NAME=FILE",
        help=f"exported metrics, or names of bundled ones ({DEFAULT})",
    )
    parser.add_argument("--baselines", action="store_true", help="pixel l2, SSIM and MS-SSIM as well")
    parser.add_argument(
        "--eps", nargs="*", type=budget, help="ℓ2 budgets, in the pixels that a metric sees (36/255 72/255 108/255)"
    )
    parser.add_argument(
        "--moves",
        choices=get_args(Moves),
        default="distorted",
        help="which image of each pair may change by ε (%(default)s)",
    )
    add_columns(parser, "dmos=distortion")
    add_running(parser, "images", "metrics run")
    parser.add_argument("--output", type=output_folder, help="folder for correlations.json and the tables")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    names = [name for name, _ in options.metric]
    check_names(names, BASELINES if options.baselines else ())
    table = PairTable.read(options.table, dict(options.columns))
    with Progress("correlating") as progress:
        progress("loading the metrics")
        loaded = {name: load(file).to(options.device) for name, file in options.metric}
        if options.eps and not any(metric.has_bound for metric in loaded.values()):
            raise LipsimError(f"{', '.join(names)} has no Lipschitz bound, nothing can be certified; leave --eps out")
        metrics: dict[str, Distance] = {**loaded, **(BASELINES if options.baselines else {})}
        found = correlate(
            metrics,
            table,
            eps=EPS if options.eps is None else sorted(options.eps),
            moves=options.moves,
            batch_size=options.batch_size,
            progress=progress,
        )
    tables = correlation_rows(found)
    content = {
        "table": str(options.table),
        "pairs": len(table),
        "images": len(table.images),
        "scores": table.kind,
        "moves": options.moves,
        "metrics": {name: one.facts() for name, one in found.items()},
    }
    text = json.dumps(content, indent=1)
    if options.output is not None:
        if (options.output / "correlations.json").is_file() and len(tables) < 2:  # of metrics with a bound, before
            remove_table(options.output, "certified")
        for name, (title, rows) in zip(("correlations", "certified"), tables.items(), strict=False):
            write_table(options.output, name, title, rows)
        write_text(options.output / "correlations.json", text + "\n")
    if options.json:
        print(text)
        return 0
    for title, rows in tables.items():
        print_table(Console(), rows, title)
    if options.output is not None:
        print(f"correlations.json and the tables as .md, .tex and .csv are in {options.output}/")
    return 0
