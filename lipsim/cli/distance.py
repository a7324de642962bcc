"""`lipsim distance`: how alike images look to a metric."""

from __future__ import annotations

import argparse
import json
import sys

from lipsim.cli.parser import add_metric_argument, add_output, add_running, budget, load_metric
from lipsim.data.sets.matching import FilePairs, pair_files, read_pairs
from lipsim.metric.comparisons import Comparison, FileDistance, compare_files
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import print_csv, text_table

EXAMPLES = (
    "lipsim distance x.png y.png",
    "lipsim distance x.png y.png --eps 0.5 --json",
    "lipsim distance x.png 'shots/*.png'",
    "lipsim distance originals/ compressed/ --csv",
    "lipsim distance --pairs pairs.csv --metric quickstart",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim distance` takes."""
    parser.description = (
        "Distances from 0 (the same features) to 2. Two images: one number. One image and several, or a pattern or a "
        "folder of them: one with each. Two folders or patterns: images of the same name, endings aside, and the mean. "
        "--eps adds what each distance is within, proven, for every change of the first image up to ε. Files that "
        "cannot be read and files without a partner are listed on stderr and left out, with exit status 1. The bundled "
        "metric takes a fifth of a second besides loading torch, and reads and embeds some 500 images of 160 pixels a "
        "second on one core."
    )
    parser.add_argument("left", nargs="?", help="an image, a folder, or a pattern in quotes")
    parser.add_argument("right", nargs="*", help="the same; several beside one image")
    parser.add_argument("--pairs", type=user_path, help="instead: a CSV file with the columns left and right")
    add_metric_argument(parser, option=True)
    parser.add_argument("--eps", type=budget, help="ℓ2 budget in the pixels that the metric sees, as 0.5 or 36/255")
    add_running(parser, "pairs")
    add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    pairs = _pairs(options)
    alone = [str(file) for file in pairs.alone]
    if pairs.skipped:
        print(pairs.skipped, file=sys.stderr)
    for file in alone:
        print(f"without a partner: {file}", file=sys.stderr)
    with Progress("comparing") as progress:
        progress("loading the metric")
        metric = load_metric(options).to(options.device)
        compared = compare_files(
            metric,
            pairs.pairs,
            eps=options.eps,
            batch_size=options.batch_size,
            advance=progress.counter(len(pairs), "pairs"),
        )
    if not compared.distances:
        raise LipsimError("; ".join(list(compared.broken.values())[:3]))
    tell_broken(compared)
    # One number for two files, as they were given; everything else is a table, of one row too.
    if options.pairs is None and len(pairs) == 1 and pairs.names == (str(user_path(options.right[0])),):
        _print_one(compared.distances[0], options)
    else:
        names = [pairs.names[place] for place in compared.places]
        _print_many(compared, names, alone, options)
    return int(bool(compared.broken or alone))


def _pairs(options: argparse.Namespace) -> FilePairs:
    if options.pairs is not None:
        if options.left is not None:
            raise LipsimError("expected either images or --pairs, got both")
        return read_pairs(options.pairs)
    if options.left is None or not options.right:
        raise LipsimError("expected two images, folders or patterns, or --pairs FILE.csv; --help shows the options")
    return pair_files(options.left, options.right)


def tell_broken(compared: Comparison) -> None:
    """List files that could not be read on stderr."""
    for why in compared.broken.values():
        print(f"left out: {why}", file=sys.stderr)


def _print_one(found: FileDistance, options: argparse.Namespace) -> None:
    facts = found.facts()
    if options.json:
        print(json.dumps({**facts, "metric": str(options.metric), **_eps(options)}, indent=1))
    elif options.csv:
        print_csv(list(facts), [list(facts.values())])
    else:
        print(f"{found.distance:.6g}")
        if found.interval is not None:
            low, high = found.interval
            print(f"certified: {low:.6g} to {high:.6g} while {found.left} changes by up to {options.eps:.6g}")


def _print_many(compared: Comparison, names: list[str], alone: list[str], options: argparse.Namespace) -> None:
    rows = [one.facts() for one in compared.distances]
    if options.json:
        content = {
            "metric": str(options.metric),
            **_eps(options),
            "pairs": rows,
            "mean": compared.mean,
            "without_partner": alone,
            "left_out": {str(file): why for file, why in compared.broken.items()},
        }
        print(json.dumps(content, indent=1))
    elif options.csv:
        print_csv(list(rows[0]), [list(row.values()) for row in rows])
    else:
        numbers = [name for name in rows[0] if name not in ("left", "right")]
        cells = [[name, *(f"{row[n]:.6g}" for n in numbers)] for name, row in zip(names, rows, strict=True)]
        print(text_table(["pair" if options.pairs else "image", *numbers], cells))
        print(f"mean {compared.mean:.6g} of {len(rows)}")


def _eps(options: argparse.Namespace) -> dict[str, float]:
    return {} if options.eps is None else {"eps": options.eps}
