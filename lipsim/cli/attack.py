"""`lipsim attack`: attack one pair or triplet of images."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from lipsim.attacks.images import GOALS, AttackedImages, attack_pair, attack_triplet
from lipsim.attacks.objectives import TARGETS
from lipsim.attacks.projections import NORMS, Norm
from lipsim.attacks.registry import ATTACKS
from lipsim.cli.parser import budget
from lipsim.data.transforms import load_image
from lipsim.metric import load
from lipsim.results import eps_label
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim attack` takes."""
    parser.description = (
        "Two files: change the first within a budget until the metric finds the two as different, or as "
        "alike, as it can. Three: reference, left and right; change one of them, or all, until the metric takes the "
        "other candidate, within the smallest of the budgets that suffices. Writes the images, the exact tensors and "
        "a picture with the change amplified. A triplet costs up to steps × (attacks + 5 of Square) passes through the "
        "metric for each budget that does not suffice: seconds for the bundled metric, minutes for a ViT on a CPU."
    )
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE", help="two or three image files")
    parser.add_argument(
        "--checkpoint", default="quickstart", help="a .safetensors file or a bundled name (%(default)s)"
    )
    parser.add_argument("--goal", choices=GOALS, default="different", help="of a pair (%(default)s)")
    parser.add_argument("--target", choices=TARGETS, default="reference", help="of a triplet (%(default)s)")
    parser.add_argument(
        "--norm", choices=[str(norm) for norm in NORMS], default="2", help="of the change (%(default)s)"
    )
    parser.add_argument("--eps", nargs="+", type=budget, help="budgets in [0, 1] pixels, as 0.5 or 8/255")
    parser.add_argument("--attacks", nargs="+", help=f"of a triplet, among {', '.join(ATTACKS)}")
    parser.add_argument("--steps", type=int, default=100, help="gradient steps of a run (%(default)s)")
    parser.add_argument("--restarts", type=int, default=1, help="of each attack (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--output", type=user_path, default=Path("attacked"), help="folder to write (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if len(options.images) not in (2, 3):
        raise LipsimError(f"expected two or three images, got {len(options.images)}")
    metric = load(options.checkpoint)
    dtype = next(metric.parameters()).dtype
    images = [load_image(path, metric.preprocess).to(dtype) for path in options.images]
    norm: Norm = {str(norm): norm for norm in NORMS}[options.norm]
    common: dict[str, Any] = {"norm": norm, "steps": options.steps, "restarts": options.restarts, "seed": options.seed}
    if len(images) == 2 and (options.attacks or (options.eps and len(options.eps) > 1)):
        raise LipsimError("a pair is attacked by APGD within one budget; --attacks and more budgets need a triplet")
    with Progress("attacking") as progress:
        if len(images) == 3:
            common |= {"target": options.target, "eps": options.eps, "attacks": options.attacks}
            found = attack_triplet(metric, *images, progress=progress, **common)
        else:
            found = attack_pair(metric, *images, goal=options.goal, eps=(options.eps or [None])[0], **common)
    found.save(options.output)
    if options.json:
        print(json.dumps(found.facts(), indent=1))
        return 0
    print(_summary(found))
    print(f"images, exact tensors and picture.png are in {options.output}/")
    return 0


def _summary(found: AttackedImages) -> str:
    sign = "∞" if found.norm == "inf" else found.norm
    head = f"{'distance':<20}{'before':<12}{'after':<12}in 8 bits"
    rows = [
        f"{f'd({pair})':<20}{found.before[pair]:<12.5g}{found.after[pair]:<12.5g}{found.rounded[pair]:.5g}"
        for pair in found.before
    ]
    if found.tie:
        last = "a tie: both candidates are at one distance, there is no answer to turn around, and nothing was attacked"
    elif math.isinf(found.eps) and found.no_gradient:
        last = "no gradient to attack with: only the attacks without gradients have tried, and they found nothing"
    elif math.isinf(found.eps):
        last = "the answer holds within every budget that was tried"
    elif len(found.before) == 1 and found.no_gradient:
        last = "no gradient to attack with: the distance after the attack says nothing about what an attack can reach"
    else:
        budget = eps_label(found.eps) if found.eps < 1 else f"{found.eps:g}"
        verb = "turned around" if len(found.before) == 2 else "changed"
        last = f"{verb} within ε = {budget} in ℓ{sign}; ‖δ‖₂ = {found.length:.5g}"
        if found.length == 0:
            last = f"nothing better than the images as they are was found within ε = {budget} in ℓ{sign}"
        if len(found.before) == 2 and _left_nearer(found.rounded) == _left_nearer(found.before):
            last += "; rounding to 8 bits undoes it, as images.safetensors does not"
    return "\n".join([head, *rows, last])


def _left_nearer(distances: dict[str, float]) -> bool:
    return distances["reference, left"] < distances["reference, right"]
