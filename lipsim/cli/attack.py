"""`lipsim attack`: attack one pair or triplet of images."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lipsim.attacks.images import GOALS, Goal, attack_pair, attack_triplet
from lipsim.attacks.objectives import TARGETS, Target
from lipsim.attacks.projections import NORMS, Norm
from lipsim.attacks.registry import ATTACKS
from lipsim.cli.parser import add_metric_argument, budget, load_metric, output_folder, positive_int, refuse_wide_linf
from lipsim.data.transforms import load_image
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim attack x.png y.png --goal alike --eps 1",
    "lipsim attack reference.png left.png right.png --eps 0.5 1 2 --output attacked",
    "lipsim attack reference.png left.png right.png --norm inf --eps 4/255 8/255 --json",
)


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
    add_metric_argument(parser, option=True)
    parser.add_argument("--goal", choices=GOALS, help="of a pair (different)")
    parser.add_argument("--target", choices=TARGETS, help="of a triplet (reference)")
    parser.add_argument(
        "--norm", choices=[str(norm) for norm in NORMS], default="2", help="of the change (%(default)s)"
    )
    parser.add_argument("--eps", nargs="+", type=budget, help="budgets in [0, 1] pixels, as 0.5 or 8/255")
    parser.add_argument("--attacks", nargs="+", help=f"of a triplet, among {', '.join(ATTACKS)}")
    parser.add_argument("--steps", type=positive_int, default=100, help="gradient steps of a run (%(default)s)")
    parser.add_argument("--restarts", type=positive_int, default=1, help="of each attack (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--output", type=output_folder, default="attacked", help="folder to write (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if len(options.images) not in (2, 3):
        raise LipsimError(f"expected two or three images, got {len(options.images)}")
    eps, is_pair = options.eps, len(options.images) == 2
    if is_pair and (options.attacks or (eps and len(eps) > 1)):
        raise LipsimError("a pair is attacked by APGD within one budget; --attacks and more budgets need a triplet")
    if (options.target if is_pair else options.goal) is not None:
        raise LipsimError("--target is for a triplet, and two images are a pair" if is_pair else "--goal is for a pair")
    goal: Goal = options.goal or "different"
    target: Target = options.target or "reference"
    if options.norm == "inf":
        refuse_wide_linf(eps or [])
    norm: Norm = {str(norm): norm for norm in NORMS}[options.norm]
    common: dict[str, Any] = {"norm": norm, "steps": options.steps, "restarts": options.restarts, "seed": options.seed}
    with Progress("attacking") as progress:
        progress("loading the metric")
        metric = load_metric(options)
        images = [load_image(path, metric.preprocess).to(metric.dtype) for path in options.images]
        if is_pair:
            progress(f"apgd, {goal}")
            attacked = attack_pair(metric, *images, goal=goal, eps=eps[0] if eps else None, **common)
        else:
            common |= {"target": target, "eps": eps, "attacks": options.attacks}
            attacked = attack_triplet(metric, *images, progress=progress, **common)
    attacked.save(options.output)
    if options.json:
        print(json.dumps(attacked.facts(), indent=1))
        return 0
    print(attacked)
    print(f"images, exact tensors and picture.png are in {options.output}/")
    return 0
