"""`lipsim rank`: images by their distance from one."""

from __future__ import annotations

import argparse
import json
import sys

from lipsim.cli.distance import tell_broken
from lipsim.cli.parser import add_metric_argument, add_output, add_running, budget, load_metric, positive_int
from lipsim.data.sets.matching import pair_files
from lipsim.metric.comparisons import rank_files
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import print_csv, text_table

EXAMPLES = (
    "lipsim rank x.png photos/",
    "lipsim rank x.png photos/ --top 5 --eps 0.25",
    "lipsim rank x.png a.png b.png 'more/*.jpg' --csv",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim rank` takes."""
    parser.description = (
        "The images of a folder, of patterns, or as they are named, the most alike first. --eps adds what each is "
        "within, proven, for every change of the reference up to ε. Files that cannot be read are listed on stderr "
        "and left out, with exit status 1. Each image is read and embedded once: some 500 of 160 pixels a second with "
        "the bundled metric on one core."
    )
    parser.add_argument("reference", type=user_path, help="an image file")
    parser.add_argument("images", nargs="+", help="a folder, images, or patterns in quotes")
    add_metric_argument(parser, option=True)
    parser.add_argument("--top", type=positive_int, help="only the nearest so many")
    parser.add_argument("--eps", type=budget, help="ℓ2 budget in the pixels that the metric sees, as 0.5 or 36/255")
    add_running(parser, "images")
    add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.reference.is_dir():
        raise LipsimError(f"expected an image file as the reference, got the folder {options.reference}")
    pairs = pair_files(options.reference, options.images)
    if pairs.skipped:
        print(pairs.skipped, file=sys.stderr)
    with Progress("ranking") as progress:
        progress("loading the metric")
        metric = load_metric(options).to(options.device)
        ranked = rank_files(
            metric,
            options.reference,
            [file for _, file in pairs.pairs],
            eps=options.eps,
            batch_size=options.batch_size,
            advance=progress.counter(len(pairs), "images"),
        )
    if not ranked.distances:
        raise LipsimError("; ".join(list(ranked.broken.values())[:3]))
    tell_broken(ranked)
    rows = [
        {"rank": rank, "file": str(one.right), **{k: v for k, v in one.facts().items() if k not in ("left", "right")}}
        for rank, one in enumerate(ranked.distances[: options.top], start=1)
    ]
    if options.json:
        content = {
            "reference": str(options.reference),
            "metric": str(options.metric),
            **({} if options.eps is None else {"eps": options.eps}),
            "ranking": rows,
            "images": len(ranked.distances),
            "left_out": {str(file): why for file, why in ranked.broken.items()},
        }
        print(json.dumps(content, indent=1))
    elif options.csv:
        print_csv(list(rows[0]), [list(row.values()) for row in rows])
    else:
        cells = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        print(text_table(list(rows[0]), cells))
    return int(bool(ranked.broken))
