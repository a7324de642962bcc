"""The ``lipsim`` command: the functions of this package for one image or one model."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from lipsim import attack_images, attack_tables, certificates, export, lower_bounds, teacher_commands, verify
from lipsim.arithmetic import largest_feature_error
from lipsim.audit import LipschitzReport
from lipsim.data import BuiltinTriplets
from lipsim.data.bit_depth import DeepImage
from lipsim.data.images import list_images
from lipsim.data.transforms import load_image, read_image
from lipsim.errors import OneLineParser, one_line_errors
from lipsim.metric import PerceptualMetric
from lipsim.paths import user_path
from lipsim.progress import Progress


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lipsim``."""
    parser = OneLineParser(prog="lipsim", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lipsim {importlib.metadata.version('lipsim')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_certify(commands)
    _add_verify(commands)
    attack_images.add_command(commands)
    attack_tables.add_command(commands)
    _add_report(commands)
    teacher_commands.add_commands(commands)
    with one_line_errors():
        options = parser.parse_args(args)
        sys.exit(options.run(options))


def _add_audit(commands: Any) -> None:
    parser = commands.add_parser(
        "audit",
        help="bound a metric's Lipschitz constant, layer by layer",
        description="Bound the Lipschitz constant of an exported metric, layer by layer, in float64 and rounded up; "
        "next to it what each layer reaches on sample images, the largest growth that an attack finds, and the error "
        "of the forward pass in the dtype of the weights. Seconds for the bundled metric; the time grows with "
        "--samples and --steps. Exit status 1 where a lower bound exceeds an upper one, or the total exceeds "
        "--require.",
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    parser.add_argument("--images", type=user_path, help="folder of sample images; default: built-in ones")
    parser.add_argument("--samples", type=int, default=4, help="how many images to look at (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the attack (%(default)s)")
    parser.add_argument("--require", type=float, help="fail where the bound is above this, such as 1.00001")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    if options.samples < 1:
        raise ValueError(f"expected --samples of at least 1, got {options.samples}")
    with Progress("auditing") as progress:
        progress("bounding each layer")
        metric = export.load(options.checkpoint)
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


def _add_certify(commands: Any) -> None:
    parser = commands.add_parser(
        "certify",
        help="certify the answer to one triplet of image files",
        description="Which of two images is more like a reference, and how far the answer cannot change: ℓ2 radii in "
        "the pixels that the metric sees and in those of each file, values in [0, 1]; the ℓ∞ radius of the reference; "
        "and how many of its pixels may take any colour.",
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    for name in ("reference", "left", "right"):
        parser.add_argument(name, type=user_path, help="an image file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_certify)


def _certify(options: argparse.Namespace) -> int:
    metric = export.load(options.checkpoint)
    if not math.isfinite(metric.lipschitz):
        raise ValueError(f"{options.checkpoint} has no Lipschitz bound, nothing about it can be certified")
    files = {name: getattr(options, name) for name in ("reference", "left", "right")}
    pictures = {name: read_image(file) for name, file in files.items()}
    dtype = next(metric.parameters()).dtype
    images = {name: load_image(file, metric.preprocess).to(dtype).unsqueeze(0) for name, file in files.items()}
    found = metric.certify(images["reference"], images["left"], images["right"])
    margin = float(found.margin)
    radii = {
        "reference": float(found.radius),
        "left": float(found.left_radius),
        "right": float(found.right_radius),
        "joint": float(found.joint_radius),
    }
    elements = images["reference"].numel()
    facts = {
        "answer": "tie" if margin == 0 else "left" if margin > 0 else "right",
        "margin": margin,
        "radius": radii,
        "original_radius": _original_radii(metric, pictures, radii),
        "linf_radius": float(certificates.linf_radius(found.radius, elements)),
        "pixels": int(found.pixels),
        "image_size": metric.image_size,
        "lipschitz": metric.lipschitz,
        "feature_error": metric.feature_error,
    }
    print(json.dumps(facts, indent=1) if options.json else _certificate(facts))
    return 0


def _original_radii(
    metric: PerceptualMetric, pictures: Mapping[str, Image.Image | DeepImage], radii: dict[str, float]
) -> dict[str, float] | None:
    """Radii in the pixels of the files; None where the way from there has no norm, as resizing in 8 bits rounds.

    A gray pixel becomes three equal channels, which is a factor of √3; palettes, transparency and other colour spaces
    are no map of a norm at all.
    """
    gray = {"1": 3**0.5, "L": 3**0.5, "I": 3**0.5, "I;16": 3**0.5}
    plain = all(p.mode in ("RGB", *gray) and not p.has_transparency_data for p in pictures.values())
    if metric.preprocess.resize != "float" or not plain:
        return None

    def original(radius: float, picture: Image.Image | DeepImage) -> float:
        # Its height and width in whichever order: the norm is symmetric in them.
        found = certificates.original_radius(radius, (picture.height, picture.width), metric.image_size)
        return found / (gray.get(picture.mode, 1.0) * (1 + 1e-12))

    return {
        name: original(radius, pictures[name])
        if name in pictures
        else min(original(radius, picture) for picture in pictures.values())
        for name, radius in radii.items()
    }


def _certificate(facts: dict[str, Any]) -> str:
    original = facts["original_radius"]
    size = facts["image_size"]
    none = "(none in the file's own pixels: resized in 8 bits, or not plain RGB or gray)"
    title = none if original is None else "R in the file's own pixels"
    rows = [
        f"answer: {facts['answer']} (margin {facts['margin']:.6g}, positive for left)",
        f"{'perturbed image':<18}{f'R at {size}×{size}':<16}{title}",
    ]
    for name, radius in facts["radius"].items():
        title = "all three, each" if name == "joint" else name
        rows.append(f"{title:<18}{radius:<16.6g}" + ("" if original is None else f"{original[name]:.6g}"))
    rows.append(f"ℓ∞ radius of the reference {facts['linf_radius']:.6g} = {255 * facts['linf_radius']:.4g}/255")
    rows.append(f"pixels of the reference that may take any colour: {facts['pixels']} of {size * size}")
    return "\n".join(rows)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="tables, curves and one HTML page from the results of several runs",
        description="Compare runs by their results.json: report.md, report.tex (booktabs), report.csv, curves as PDF "
        "and PNG, and report.html with the pictures of each run inside it.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="DIRECTORY or NAME=DIRECTORY of a run")
    parser.add_argument("--output", type=user_path, default=Path("report"), help="folder to write (%(default)s)")
    parser.add_argument(
        "--radius",
        nargs="+",
        default=["certified"],
        choices=("certified", "published", "joint"),
        help="rows of each run: the exact radius, LipSim's own, all three images moving (%(default)s)",
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from lipsim import report  # matplotlib, which no other command needs

    with Progress("writing the report"):
        runs = report.load_runs(options.runs)
        tables = report.write_report(runs, options.output, options.radius)
    report.print_tables(tables, Console())
    for line in report.warnings(runs):
        print(f"warning: {line}", file=sys.stderr)
    print(f"report.html, .md, .tex, .csv and curves are in {options.output}/")
    return 0


def _sample_images(folder: Path | None, count: int, metric: PerceptualMetric) -> Tensor:
    if folder is None:
        images = BuiltinTriplets("test", count, image_size=metric.image_size).images[:, 0]
        return images.float() / 255
    listed = list_images(folder)
    if listed.skipped:
        print(f"passed over in {folder}: {listed.skipped}", file=sys.stderr)
    files = [folder / os.fsdecode(bytes(name)) for name in listed.names[:count]]
    return torch.stack([load_image(file, metric.preprocess) for file in files])


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="attack every certificate of a metric",
        description="Attack every kind of certificate of an exported metric in float64, without and with the box "
        "[0, 1], and the Lipschitz bound it stands on. Faults planted in the metric, radii that are 2 % too large on a "
        "linear encoder, and certificates whose truth is known have to come out right in the same run. The bundled "
        "metric takes 2.5 minutes of processor time, nearly all of it gradients in float64; more with --samples and "
        "--steps. Exit status 1 where a certificate breaks or a planted fault is missed.",
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    parser.add_argument("--data", choices=verify.DATA, default="builtin", help="triplets (%(default)s)")
    parser.add_argument("--root", type=user_path, help="folder of the data")
    parser.add_argument("--samples", type=int, default=4, help="how many triplets (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the attack from each start (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images attacked at a time (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the processor; more pay off on large networks only (%(default)s)"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, or a GPU with float64 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of triplets, starts and controls (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_verify)


def _device(name: str) -> torch.device:
    try:
        torch.empty(1, dtype=torch.float64, device=name)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {name!r} ({str(error).splitlines()[0]})") from error
    return torch.device(name)


def _verify(options: argparse.Namespace) -> int:
    for name in ("samples", "steps", "batch_size", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
    metric = export.load(options.checkpoint)
    metric.to(options.device)
    triplets = verify.sample_triplets(
        options.data, options.samples, metric.image_size, options.root, options.seed, metric.preprocess.resize
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with Progress("verifying") as progress:
            result = verify.verify(
                metric,
                triplets,
                steps=options.steps,
                seed=options.seed,
                batch_size=options.batch_size,
                progress=progress,
            )
    finally:
        torch.set_num_threads(threads)
    if options.json:
        print(json.dumps(result.facts(), indent=1))
    else:
        print(result)
        print("\n".join(f"FAILED: {line}" for line in result.failures) or "sound: every certificate held")
    return int(bool(result.failures))
