"""`lipsim traverse`: walk from one image towards another while an answer stays."""

from __future__ import annotations

import argparse
import json

import torch

from lipsim.analysis.models import NAMES, load_model
from lipsim.analysis.traversal import Level, answer_level, confidence_level, names_a_metric, same_level, traverse
from lipsim.cli.parser import budget, natural_int, output_folder, positive_int
from lipsim.data.transforms import Preprocess, load_image
from lipsim.metric import load
from lipsim.metric.files import DEFAULT
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim traverse x.png y.png",
    "lipsim traverse x.png y.png --threshold 0.1 --steps 100 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim traverse` takes."""
    parser.description = (
        "Level set traversal (Balasubramanian et al. 2023): change SOURCE towards TARGET while the model's answer "
        "stays. Of a classifier, its confidence in the class of SOURCE; of a metric, that the distance to SOURCE is at "
        "most --threshold, or with --than that SOURCE is nearer than a third image. Writes the path (strip.png), the "
        "triangle of 66 points (triangle.png, with the cells that are proved where the metric has a Lipschitz bound), "
        "the straight line (curve.png) and the exact tensors. Costs a forward and a backward pass a step, and up to "
        "2,000 forward passes for the proofs: seconds for the bundled metric, a minute for EfficientNet-Lite0."
    )
    parser.add_argument("source", type=user_path, metavar="SOURCE", help="image file where the walk starts")
    parser.add_argument("target", type=user_path, metavar="TARGET", help="image file that it goes towards")
    parser.add_argument("--model", default=DEFAULT, help=f"{NAMES} (%(default)s)")
    parser.add_argument("--weights", type=user_path, help="file of a classifier's state; default: random weights")
    parser.add_argument("--image-size", type=positive_int, help="side of a classifier's images")
    parser.add_argument("--drop", type=budget, help="confidence that a classifier may lose (0.2)")
    parser.add_argument("--threshold", type=budget, help="distance up to which a metric says the same (0.05)")
    parser.add_argument(
        "--than", type=user_path, metavar="IMAGE", help="a metric's answer: nearer to SOURCE than to it"
    )
    parser.add_argument(
        "--second", type=user_path, metavar="IMAGE", help="a second target; its outcome is a corner of the triangle"
    )
    parser.add_argument(
        "--rule", choices=("newton", "published"), default="newton", help="how steps are made (%(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, default=400, help="at most (%(default)s)")
    parser.add_argument("--step-size", type=budget, default=0.01, help="share of the way of a step (%(default)s)")
    parser.add_argument("--correction", type=budget, default=0.002, help="of the published rule (%(default)s)")
    parser.add_argument("--depth", type=natural_int, default=2, help="cuts of undecided cells (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random start, and of random weights (%(default)s)")
    parser.add_argument("--output", type=output_folder, default="traversed", help="folder to write (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    is_metric = names_a_metric(options.model)
    for name, given, fits in (
        ("--weights", options.weights, not is_metric),
        ("--image-size", options.image_size, not is_metric),
        ("--drop", options.drop, not is_metric),
        ("--threshold", options.threshold, is_metric and options.than is None),
        ("--than", options.than, is_metric),
    ):
        if given is not None and not fits:
            kind = "a metric" if is_metric else "a classifier"
            raise LipsimError(f"{name} says nothing about the level set of {kind} here; leave it out")
    with Progress("traversing") as progress, full_precision():
        progress("loading the model")
        if is_metric:
            metric = load(options.model)
            preprocess, dtype = metric.preprocess, metric.dtype
        else:
            model = load_model(options.model, options.weights, options.image_size, options.seed)
            preprocess, dtype = Preprocess(model.image_size, model.resize, model.framing), torch.float32
        files = {"source": options.source, "target": options.target, "second": options.second, "than": options.than}
        images = {name: load_image(path, preprocess).to(dtype) for name, path in files.items() if path is not None}
        level: Level
        if not is_metric:
            level = confidence_level(model.module, images["source"], 0.2 if options.drop is None else options.drop)
        elif options.than is None:
            level = same_level(metric, images["source"], 0.05 if options.threshold is None else options.threshold)
        else:
            level = answer_level(metric, images["source"], images["than"])
        walk = traverse(
            level,
            images["source"],
            images["target"],
            second=images.get("second"),
            steps=options.steps,
            step_size=options.step_size,
            correction=options.correction,
            newton=options.rule == "newton",
            seed=options.seed,
            depth=options.depth,
            say=progress,
        )
    walk.save(options.output)
    if options.json:
        print(json.dumps(walk.facts(), indent=1))
        return 0
    print(walk)
    print(f"strip.png, triangle.png, curve.png and walk.safetensors are in {options.output}/")
    return 0
