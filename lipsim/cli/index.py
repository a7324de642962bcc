"""`lipsim index`: embed the images of a folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lipsim.cli.parser import add_metric_argument, add_output, add_running, load_metric, metric_file
from lipsim.metric.files import resolve
from lipsim.metric.index import ImageIndex
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

OUTPUT = Path("index.safetensors")
EXAMPLES = ("lipsim index photos/", "lipsim index photos/ --metric own.safetensors --output photos.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim index` takes."""
    parser.description = (
        "Embed the images under a folder, at any depth, for `lipsim search`. Where the index is there already it is "
        "brought up to date: only new and changed images are embedded, and what is gone is dropped. Cut short, the "
        "same command continues. It remembers its metric and how images come to it. Files that cannot be read are "
        "listed on stderr and left out, with exit status 1. The bundled metric reads and embeds some 500 images of 160 "
        "pixels a second on one core."
    )
    parser.add_argument("folder", type=user_path, help="folder of images")
    add_metric_argument(parser, option=True)
    parser.add_argument("--output", type=metric_file, default=OUTPUT, help="the index (%(default)s)")
    add_running(parser, "images")
    add_output(parser, rows=False)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    source = resolve(options.metric)
    # A bundled metric by its name, which is another file after the next installation.
    named = str(options.metric) if source != user_path(options.metric) else str(source.absolute())
    unfinished = options.output.with_name(f"{options.output.name}.unfinished")
    with Progress("indexing") as progress:
        progress("loading the metric")
        metric = load_metric(options).to(options.device)
        index = ImageIndex.load(options.output, metric) if options.output.is_file() else ImageIndex(metric)
        changes = index.update(options.folder, batch_size=options.batch_size, unfinished=unfinished, progress=progress)
    for name, reason in changes.skipped.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if changes.passed_over:
        print(f"passed over: {changes.passed_over}", file=sys.stderr)
    index.save(options.output, metric=named, unfinished=unfinished)
    if options.json:
        facts = {
            "index": str(options.output),
            "metric": named,
            "framing": metric.preprocess.framing,
            "images": len(index),
            "kept": changes.kept,
            "embedded": changes.embedded,
            "removed": changes.removed,
            "left_out": changes.skipped,
        }
        print(json.dumps(facts, indent=1))
    else:
        print(
            f"{options.output}: {len(index)} images ({changes.embedded} embedded, {changes.kept} kept, "
            f"{changes.removed} removed, {len(changes.skipped)} left out)"
        )
    return int(bool(changes.skipped))
