"""The ``lipsim`` command: the functions of this package for one image or one model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lipsim import export, lower_bounds, verify
from lipsim.audit import LipschitzReport
from lipsim.data import BuiltinTriplets
from lipsim.data.transforms import read_image
from lipsim.errors import OneLineParser, one_line_errors
from lipsim.metric import PerceptualMetric


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lipsim``."""
    parser = OneLineParser(prog="lipsim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_verify(commands)
    with one_line_errors():
        options = parser.parse_args(args)
        sys.exit(options.run(options))


def _add_audit(commands: Any) -> None:
    parser = commands.add_parser(
        "audit",
        help="bound a metric's Lipschitz constant, layer by layer",
        description="Bound the Lipschitz constant of an exported metric, layer by layer, in float64 and rounded up; "
        "next to it what each layer reaches on sample images, the largest growth that an attack finds, and the error "
        "of the forward pass in the dtype of the weights. Exit status 1 where a lower bound exceeds an upper one, or "
        "the total exceeds --require.",
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    parser.add_argument("--images", type=Path, help="folder of sample images; default: built-in ones")
    parser.add_argument("--samples", type=int, default=4, help="how many images to look at (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the attack (%(default)s)")
    parser.add_argument("--require", type=float, help="fail where the bound is above this, such as 1.00001")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    if options.samples < 1:
        raise ValueError(f"expected --samples of at least 1, got {options.samples}")
    metric = export.load(options.checkpoint)
    report = metric.audit()
    images = _sample_images(options.images, options.samples, metric).to(next(metric.parameters()).dtype)
    reached = lower_bounds.layer_norms(metric.encoder, images, [layer.name for layer in report.layers])
    attack = lower_bounds.attack_lipschitz(metric.encoder, images, options.steps)
    error = lower_bounds.feature_error(metric.encoder, images)
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
    rows.append(f"forward error at most {error:.3g} in feature units, on {samples} images against float64")
    return "\n".join(rows)


def _sample_images(folder: Path | None, count: int, metric: PerceptualMetric) -> Tensor:
    if folder is None:
        images = BuiltinTriplets("test", count, image_size=metric.image_size).images[:, 0]
        return images.float() / 255
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)[:count]
    if not files:
        raise FileNotFoundError(f"no images in {folder} ({', '.join(IMG_EXTENSIONS)})")
    return torch.stack([metric.preprocess(read_image(file)) for file in files])


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="attack every certificate of a metric",
        description="Attack every kind of certificate of an exported metric in float64, without and with the box "
        "[0, 1], and the Lipschitz bound it stands on. Faults planted in the metric, and radii that are 2 % too large "
        "on a linear encoder, have to be caught in the same run. Exit status 1 where a certificate breaks or a "
        "planted fault is missed.",
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    parser.add_argument("--data", choices=("builtin", "material"), default="builtin", help="triplets (%(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the Material data")
    parser.add_argument("--samples", type=int, default=4, help="how many triplets (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the attack from each start (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images attacked at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of triplets, starts and controls (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    for name in ("samples", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
    metric = export.load(options.checkpoint)
    triplets = verify.sample_triplets(options.data, options.samples, metric.image_size, options.root, options.seed)
    progress = None
    if sys.stderr.isatty():

        def progress(part: str) -> None:
            print(f"\r\033[K{part} …", end="", file=sys.stderr, flush=True)

    result = verify.verify(
        metric,
        triplets,
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=progress,
    )
    if progress is not None:
        print("\r\033[K", end="", file=sys.stderr)
    if options.json:
        print(json.dumps(result.facts(), indent=1))
    else:
        print(result)
        print("\n".join(f"FAILED: {line}" for line in result.failures) or "sound: every certificate held")
    return int(bool(result.failures))
