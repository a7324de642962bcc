"""`lipsim export`: write a metric for other programs and runtimes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lipsim.cli.parser import UsageError, add_metric_argument, add_output, file_in_place_of, load_metric
from lipsim.metric import load, save
from lipsim.metric.export_check import GraphCheck, check_metric, check_onnx, check_torch
from lipsim.metric.folded import folded_copy, notes_on_folding
from lipsim.metric.graphs import GRAPHS
from lipsim.metric.onnx import export_onnx
from lipsim.metric.torch_export import export_torch
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

FORMATS = ("safetensors", "onnx", "torch")
EXAMPLES = (
    "lipsim export photos --output photos-folded.safetensors",
    "lipsim export runs/mine/metric.safetensors --format onnx --output mine-onnx --check",
    "lipsim export photos --format torch --graphs distance --output photos-torch",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim export` takes."""
    parser.description = (
        "Write a metric with its derived weights folded into plain ones. safetensors: one file, which lipsim.load "
        "reads without deriving a weight. onnx and torch: a folder with a graph each for the distance of two images, "
        "the embedding of one, and the certified radius of a reference, for any number of images as the metric's "
        "preprocess makes them; onnxruntime and torch alone run them, and nothing checks there that values are in "
        "[0, 1]. Takes seconds for the bundled metrics. Exit status 1 where --check finds a difference."
    )
    add_metric_argument(parser, kinds="a .safetensors file, a .ckpt of training, or the name of a bundled metric")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="(%(default)s)")
    parser.add_argument(
        "--output", type=user_path, help="file.safetensors, or folder (NAME-folded.safetensors, NAME-onnx, NAME-torch)"
    )
    parser.add_argument("--graphs", nargs="+", choices=list(GRAPHS), help="of onnx and torch (all that there are)")
    parser.add_argument(
        "--double",
        action="store_true",
        help="programs of torch compute in float64 inside: twice the time, the results of exact arithmetic",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run what was written on constant, random and smooth images beside the metric, in onnxruntime for onnx: "
        "seconds",
    )
    add_output(parser, rows=False)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    is_one_file = options.format == "safetensors"
    name = Path(options.metric).stem
    output: Path = options.output or Path(f"{name}-folded.safetensors" if is_one_file else f"{name}-{options.format}")
    if is_one_file and (output.suffix != ".safetensors" or output.is_dir()):
        raise UsageError(f"expected an output file ending in .safetensors, got {output}")
    if not is_one_file and (taken := file_in_place_of(output)) is not None:
        raise UsageError(f"the format {options.format} is written to a folder, got {output}, and {taken} is a file")
    if is_one_file and options.graphs:
        raise UsageError("--graphs are of the formats onnx and torch; safetensors holds the metric itself")
    if options.double and options.format != "torch":
        raise UsageError("--double is of the format torch: onnxruntime has no convolutions in float64")
    checks: list[GraphCheck] = []
    with Progress("exporting") as progress:
        progress("loading and auditing the metric")
        metric = load_metric(options)
        progress(f"writing {output}")
        if is_one_file:
            files = {"metric": save(folded_copy(metric), output, notes_on_folding(metric))}
        else:
            graphs = tuple(options.graphs) if options.graphs else None
            if options.format == "onnx":
                written = export_onnx(metric, output, graphs)
            else:
                written = export_torch(metric, output, graphs, double=options.double)
            files = dict(written)  # type: ignore[arg-type]
        if options.check:
            progress("comparing with the metric")
            if is_one_file:
                checks = check_metric(metric, load(output))
            else:
                checks = (check_onnx if options.format == "onnx" else check_torch)(metric, written)
    if options.json:
        facts = {"format": options.format, "files": {graph: str(path) for graph, path in files.items()}}
        print(json.dumps({**facts, "checks": [check.facts() for check in checks]}, indent=1))
    else:
        print("\n".join([*(str(path) for path in files.values()), *map(str, checks)]))
    return int(not all(check.passed for check in checks))
