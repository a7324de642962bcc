"""`lipsim audit`: bound a metric's Lipschitz constant, layer by layer."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lipsim.audit import LipschitzReport, lower_bounds
from lipsim.audit.arithmetic import largest_feature_error
from lipsim.data import BuiltinTriplets
from lipsim.data.sets.folder import list_images
from lipsim.data.transforms import load_image
from lipsim.metric import PerceptualMetric, load
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim audit` takes."""
    parser.description = (
        "Bound the Lipschitz constant of an exported metric, layer by layer, in float64 and rounded up; "
        "next to it what each layer reaches on sample images, the largest growth that an attack finds, and the error "
        "of the forward pass in the dtype of the weights. Seconds for the bundled metric; the time grows with "
        "--samples and --steps. Exit status 1 where a lower bound exceeds an upper one, or the total exceeds "
        "--require."
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    parser.add_argument("--images", type=user_path, help="folder of sample images; default: built-in ones")
    parser.add_argument("--samples", type=int, default=4, help="how many images to look at (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the attack (%(default)s)")
    parser.add_argument("--require", type=float, help="fail where the bound is above this, such as 1.00001")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.samples < 1:
        raise LipsimError(f"expected --samples of at least 1, got {options.samples}")
    with Progress("auditing") as progress:
        progress("bounding each layer")
        metric = load(options.checkpoint)
        report = metric.audit()
        images = _sample_images(options.images, options.samples, metric).to(next(metric.parameters()).dtype)
        progress("what each layer reaches")
        reached = lower_bounds.layer_norms(metric.encoder, images, [layer.name for layer in report.layers])
        progress("attacking the bound")
        attack = lower_bounds.attack_lipschitz(metric.encoder, images, options.steps)
        progress("error of the forward pass")
        error = largest_feature_error(metric.encoder, metric.image_size, images, thorough=False)
    # Negated, so that NaN fails.
    broken = [
        f"{layer.kind} at '{layer.name}' reaches {reached[layer.name]:.9g}, above its bound {layer.bound:.9g}"
        for layer in report.layers
        if not reached[layer.name] <= layer.bound * (1 + 1e-9)
    ]
    if not attack <= report.total * (1 + 1e-9):
        broken.append(f"an attack reaches {attack:.9g}, above the bound {report.total:.9g} of the whole")
    if options.require is not None and not report.total <= options.require:
        broken.append(f"the bound {report.total:.9g} is above {options.require:.9g}")
    if options.json:
        layers = [{**asdict(layer), "reached": reached[layer.name]} for layer in report.layers]
        facts = {"lipschitz": report.total, "lower_bound": attack, "feature_error": error, "samples": len(images)}
        print(json.dumps({**facts, "layers": layers, "failures": broken}, indent=1))
    else:
        print(_table(report, reached, attack, error, len(images)))
        print("\n".join(f"FAILED: {line}" for line in broken) or "sound: nothing exceeds its bound")
    return int(bool(broken))


def _table(report: LipschitzReport, reached: dict[str, float], attack: float, error: float, samples: int) -> str:
    rows = [f"{'bound':<14}{'reached':<14}{'used':<8}{'layer':<20}name"]
    for layer in report.layers:
        value = reached[layer.name]
        used = f"{100 * value / layer.bound:.1f} %" if layer.bound else ""
        rows.append(f"{layer.bound:<14.9g}{value:<14.9g}{used:<8}{layer.kind:<20}{layer.name}")
    used = f"{100 * attack / report.total:.1f} %" if report.total else ""
    rows.append(f"{report.total:<14.9g}{attack:<14.9g}{used:<8}the whole network; every radius divides by the bound")
    rows.append(
        f"forward error up to {error:.3g} in feature units, found on constant images and on these {samples}, "
        "against float64"
    )
    return "\n".join(rows)


def _sample_images(folder: Path | None, count: int, metric: PerceptualMetric) -> Tensor:
    if folder is None:
        images = BuiltinTriplets("test", count, image_size=metric.image_size).images[:, 0]
        return images.float() / 255
    listed = list_images(folder)
    if listed.skipped:
        print(f"passed over in {folder}: {listed.skipped}", file=sys.stderr)
    files = [folder / os.fsdecode(bytes(name)) for name in listed.names[:count]]
    return torch.stack([load_image(file, metric.preprocess) for file in files])
