"""`lipsim collide`: an image that a model cannot tell from another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lipsim.analysis.attacked_collision import attacked_collision, describe_attack
from lipsim.analysis.collision_files import collision_facts, describe, save_collision
from lipsim.analysis.collisions import OUTPUT, Collision, directions, find_collision, in_precision, layer_table
from lipsim.analysis.models import NAMES, load_model
from lipsim.attacks.projections import Norm
from lipsim.cli.parser import UsageError, budget, output_folder, positive_int, refuse_wide_linf
from lipsim.data.transforms import Preprocess, load_image
from lipsim.metric import load
from lipsim.metric.files import DEFAULT
from lipsim.results.formats import remove_table, write_table
from lipsim.results.tables import print_table
from lipsim.utils.files import write_json
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
EXAMPLES = (
    "lipsim collide x.png --target y.png",
    "lipsim collide x.png --model timm/deit_tiny_patch16_224 --eps 1 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim collide` takes."""
    parser.description = (
        "Change an image as far as it goes while a model answers alike: exactly, in the kernel of the model's first "
        "linear operator (seconds for a ViT), or at a deeper layer, by Gauss-Newton: each of --steps takes up to "
        "some hundred passes through the network up to there, the first up to some thousand. On one core all 60 take "
        "a quarter of a minute for the bundled metric; on DeiT-Tiny the first takes 17 seconds behind the first block, "
        "five minutes at the output. Writes the image, the pattern, the colliding image and the difference as "
        "pictures, and exact tensors: rounding to 8 bits ends a collision."
    )
    parser.add_argument("image", type=user_path, metavar="IMAGE", help="an image file")
    parser.add_argument("--target", type=user_path, metavar="IMAGE", help="to become like; default: noise")
    parser.add_argument("--model", default=DEFAULT, help=f"{NAMES} (%(default)s)")
    parser.add_argument(
        "--layer",
        help=f"path of a module whose output stays, or {OUTPUT} for that of the whole model; default: the kernel of "
        "the first linear operator",
    )
    parser.add_argument("--weights", type=user_path, help="file of the model's state; default: random weights")
    parser.add_argument("--image-size", type=positive_int, help="side of the image; default: the model's")
    parser.add_argument("--steps", type=positive_int, default=60, help="of Gauss-Newton (%(default)s)")
    parser.add_argument("--eps", type=budget, help="ℓ2 budget in [0, 1] pixels; default: as far as the box allows")
    parser.add_argument(
        "--attack",
        type=budget,
        metavar="EPS",
        help="flip a classifier's answer by PGD within this budget first, and add what is left of it in the kernel of "
        "the first linear operator",
    )
    parser.add_argument("--norm", choices=("2", "inf"), default="2", help="of the budget of --attack (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float64", help="precision (%(default)s)")
    parser.add_argument(
        "--layer-table",
        action="store_true",
        help="the differences of all layers, for collisions in float32 and in float64: twice the time again",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and noise (%(default)s)")
    parser.add_argument("--output", type=output_folder, default="collision", help="folder to write (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    dtype = _DTYPES[options.dtype]
    if options.attack is not None and (options.layer or options.layer_table or options.eps is not None):
        raise UsageError(
            "--attack has a budget of its own and moves in the first operator: leave out --layer, "
            "--layer-table and --eps"
        )
    if options.attack is not None and options.norm == "inf":
        refuse_wide_linf([options.attack])
    with Progress("colliding") as progress:
        progress(f"loading {options.model}")
        model = load_model(options.model, options.weights, options.image_size, options.seed)
        model = in_precision(model, dtype)
        # A metric answers with distances; weights of another one are in the encoder alone.
        is_metric = model.network is model.module and "/" not in options.model and ":" not in options.model
        if options.attack is not None and (is_metric or options.model.endswith(".safetensors")):
            raise UsageError(
                f"--attack flips the answer of a classifier, and {options.model} is a metric; lipsim attack "
                "attacks metrics"
            )
        metric = load(options.model).to(dtype) if is_metric or options.model.endswith(".safetensors") else None
        if metric is not None:
            metric.encoder.load_state_dict(model.network.state_dict())
        preprocess = Preprocess(model.image_size, model.resize, model.framing)
        x = load_image(options.image, preprocess).to(dtype)[None]
        target = None if options.target is None else load_image(options.target, preprocess).to(dtype)[None]
        direction = directions(x, target, options.seed)
        common: dict[str, Any] = {"layer": options.layer, "steps": options.steps, "say": progress}
        attack: dict[str, Any] | None = None
        if options.attack is None:
            collision = find_collision(model, x, direction, eps=options.eps, **common)
        else:
            progress("attacking")
            norm: Norm = 2 if options.norm == "2" else "inf"
            collision, attack = attacked_collision(
                model, x, direction, eps=options.attack, norm=norm, seed=options.seed
            )
        facts = collision_facts(model, collision, target, metric)
        if attack is not None:
            facts["attack"] = attack
        _save(options.output, collision, facts, target)
        rows = layer_table(model, x, direction, eps=options.eps, **common) if options.layer_table else []
    if rows:
        facts["layers"] = rows
        write_table(options.output, "layers", f"Largest differences of the layers of {model.name}", rows)
        write_json(options.output / "collision.json", facts)
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(describe(facts))
    if "attack" in facts:
        print(describe_attack(facts["attack"]))
    if rows:
        print_table(Console(), rows, "Largest differences")
    print(f"pictures, exact tensors and collision.json are in {options.output}/")
    return 0


def _save(folder: Path, collision: Collision, facts: dict[str, Any], target: Tensor | None) -> None:
    """Everything but the table of layers, which takes its time and can fail, so that this is there before."""
    if (folder / "collision.json").is_file():  # an earlier collision, which may have been of other layers
        remove_table(folder, "layers")
    save_collision(folder, collision, facts, target)
    write_json(folder / "collision.json", facts)
