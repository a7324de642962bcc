"""`lipsim audit`: bound a metric's Lipschitz constant, layer by layer."""

from __future__ import annotations

import argparse
import json
import sys

from lipsim.audit import check
from lipsim.cli.parser import add_metric_argument, load_metric, positive_int
from lipsim.data import BuiltinTriplets
from lipsim.data.sets.folder import load_first_images
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim audit",
    "lipsim audit runs/m.safetensors --require 1.00001 --json",
    "lipsim audit quickstart --images photos/ --samples 16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim audit` takes."""
    parser.description = (
        "Bound the Lipschitz constant of an exported metric, layer by layer, in float64 and rounded up; "
        "next to it what each layer reaches on sample images, the largest growth that an attack finds, and the error "
        "of the forward pass in the dtype of the weights. The bundled metric takes ten seconds of "
        "processor time, which grow with --samples and --steps. Exit status 1 where a lower bound exceeds an upper "
        "one, or the total exceeds --require."
    )
    add_metric_argument(parser, framing=False)
    parser.add_argument("--images", type=user_path, help="folder of sample images; default: built-in ones")
    parser.add_argument("--samples", type=positive_int, default=4, help="how many images to look at (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=30, help="steps of the attack (%(default)s)")
    parser.add_argument("--require", type=float, help="fail where the bound is above this, such as 1.00001")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("auditing") as progress:
        progress("loading the metric")
        metric = load_metric(options)
        if options.images is None:
            images = BuiltinTriplets("test", options.samples, image_size=metric.image_size).images[:, 0].float() / 255
        else:
            images, skipped = load_first_images(options.images, options.samples, metric.preprocess)
            if skipped:
                print(f"passed over in {options.images}: {skipped}", file=sys.stderr)
        images = images.to(metric.dtype)
        verdict = check(metric.encoder, images, steps=options.steps, require=options.require, progress=progress)
    if options.json:
        print(json.dumps(verdict.facts(), indent=1))
    else:
        print(verdict)
        print("\n".join(f"FAILED: {line}" for line in verdict.failures) or "sound: nothing exceeds its bound")
    return int(not verdict.sound)
