"""`lipsim feature-sets`: training sets of the features that one model uses, and what classifiers learn from them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lipsim.analysis.classifiers import Recipe
from lipsim.analysis.feature_set_scores import LabelledImages, score_rows, score_sets
from lipsim.analysis.feature_sets import (
    KINDS,
    MANIFEST,
    FeatureSet,
    FeatureSetRecipe,
    check_feature_set,
    make_feature_set,
)
from lipsim.analysis.models import NAMES, Model, load_model
from lipsim.analysis.small_networks import ARCHITECTURES, small_network
from lipsim.cli.parser import UsageError, budget, natural_int, output_folder, positive_int
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.data.transforms import Preprocess
from lipsim.results.formats import write_table
from lipsim.results.tables import Row, print_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_json
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

EXAMPLES = (
    "lipsim feature-sets photos/ --kind robust --model photos --output sets",
    "lipsim feature-sets photos/ --output sets --held-out others/ --epochs 5",
)
# Defaults of options of one of the two jobs, so that the other can refuse them where they are given.
_MAKING: Mapping[str, Any] = {
    "step_size": 0.1,
    "batch_size": 128,
    "accelerator": "auto",
    "devices": 1,
    "num_nodes": 1,
}
_SCORING: Mapping[str, Any] = {
    "architecture": "resnet",
    "width": 16,
    "epochs": 20,
    "seeds": 3,
    "robust_eps": 0.25,
    "attack_steps": 50,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim feature-sets` takes."""
    parser.description = (
        "The sets of Ilyas et al. (2019) from a folder IMAGES/CLASS/IMAGE: robust and nonrobust (D_R, D_NR) have the "
        "features of each image in a model, from another start; random and deterministic (D_rand, D_det) are "
        "adversarial examples under the label of their target. They are written as OUTPUT/KIND/CLASS/NAME.png, which "
        "torchvision's ImageFolder reads. An image costs 1,000 forward and backward passes of the model, 100 towards a "
        "class: for 50,000 images and a network that trains on 5,000 a second, three hours, or 20 minutes. Killed, the "
        "same command continues; torchrun and srun work as for training. --held-out trains small classifiers on the "
        "images and on every set in OUTPUT, instead of making any, and prints the table clean / robust: 3 trainings a "
        "set, minutes for some thousand images of 32 pixels on one core."
    )
    parser.add_argument("images", type=user_path, metavar="IMAGES", help="folder of the originals, CLASS/IMAGE")
    parser.add_argument("--output", type=output_folder, required=True, help="folder of the sets")
    making = parser.add_argument_group("making sets")
    making.add_argument("--kind", nargs="+", choices=KINDS, default=[], help="which to make")
    making.add_argument("--model", help=NAMES)
    making.add_argument("--weights", type=user_path, help="file of the state of the model; default: random weights")
    making.add_argument("--num-classes", type=positive_int, help="logits of a network of torchvision or timm")
    making.add_argument("--image-size", type=positive_int, help="side of the images; default: the model's usual one")
    making.add_argument(
        "--layer",
        help="features to match: the name of a module, 'input of NAME', or output (default: what a metric answers, and "
        "what the last linear layer of a classifier reads)",
    )
    making.add_argument("--start", choices=("image", "noise"), help="of matching features (image)")
    making.add_argument("--steps", type=positive_int, help="gradient steps (1000 for features, 100 towards a class)")
    making.add_argument("--step-size", type=budget, help=f"ℓ2 length of a step ({_MAKING['step_size']})")
    making.add_argument("--eps", type=budget, help=f"ℓ2 budget towards a class ({FeatureSetRecipe.eps})")
    making.add_argument(
        "--shorten", action="store_true", help="match by steps that do not go too far; closer than published"
    )
    making.add_argument("--batch-size", type=positive_int, help=f"images at once ({_MAKING['batch_size']})")
    making.add_argument("--accelerator", help=f"cpu, cuda, … ({_MAKING['accelerator']})")
    making.add_argument("--devices", type=positive_int, help=f"processes on each machine ({_MAKING['devices']})")
    making.add_argument("--num-nodes", type=positive_int, help=f"machines ({_MAKING['num_nodes']})")
    scoring = parser.add_argument_group("training on sets")
    scoring.add_argument("--held-out", type=user_path, help="folder of other originals, CLASS/IMAGE, to score on")
    scoring.add_argument(
        "--architecture", choices=list(ARCHITECTURES), help=f"of the classifiers ({_SCORING['architecture']})"
    )
    scoring.add_argument("--width", type=positive_int, help=f"their channels at first ({_SCORING['width']})")
    scoring.add_argument("--epochs", type=positive_int, help=f"of each training ({_SCORING['epochs']})")
    scoring.add_argument("--seeds", type=positive_int, help=f"trainings on each set ({_SCORING['seeds']})")
    scoring.add_argument("--robust-eps", type=budget, help=f"ℓ2 budget of APGD ({_SCORING['robust_eps']})")
    scoring.add_argument("--attack-steps", type=positive_int, help=f"of APGD ({_SCORING['attack_steps']})")
    parser.add_argument("--seed", type=natural_int, default=0, help="of starts, classes, random weights (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    making = bool(options.kind or options.model)
    if making == (options.held_out is not None):
        raise UsageError("expected either --kind and --model, to make sets, or --held-out, to train on those made")
    if not making:
        making_alone = ["eps", "steps", "start", "layer", "shorten", "weights", "num_classes", "image_size", *_MAKING]
        _refuse(options, making_alone, "training on sets, which has --robust-eps and --attack-steps")
    else:
        if not (options.kind and options.model):
            raise UsageError("expected both --kind and --model, to make sets")
        _refuse(options, list(_SCORING), "making sets; --held-out trains on those made")
    for name, default in {**_MAKING, **_SCORING}.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return _make(options) if making else _score(options)


def _make(options: argparse.Namespace) -> int:
    from lipsim.evaluation.processes import ProcessFailed, processes  # Lightning, seconds to import

    recipes = [
        FeatureSetRecipe(
            kind=kind,
            start=options.start or FeatureSetRecipe.start,
            steps=options.steps,
            step_size=options.step_size,
            eps=FeatureSetRecipe.eps if options.eps is None else options.eps,
            shorten=options.shorten,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        for kind in dict.fromkeys(options.kind)
    ]
    _refuse_without_part(options, {recipe.matches_features for recipe in recipes})
    model = load_model(options.model, options.weights, options.image_size, options.seed, options.num_classes)
    fabric = processes(options.accelerator, options.devices, options.num_nodes)
    fabric.launch()
    made: list[FeatureSet] = []
    try:
        with Progress("feature sets", enabled=fabric.is_global_zero) as progress:
            layers = {recipe.kind: options.layer if recipe.matches_features else None for recipe in recipes}
            for recipe in recipes[1:]:  # not after hours with the first
                layer = layers[recipe.kind]
                check_feature_set(options.images, options.output, model, recipe, layer=layer, fabric=fabric)
            for recipe in recipes:

                def say(message: str, kind: str = recipe.kind) -> None:
                    progress(f"{kind}: {message}")

                layer = layers[recipe.kind]
                made.append(
                    make_feature_set(options.images, options.output, model, recipe, layer=layer, fabric=fabric, say=say)
                )
    except ProcessFailed:  # which one has said why
        return 1
    if not fabric.is_global_zero:
        return 0
    if options.json:
        print(json.dumps([{**asdict(part), "folder": str(part.folder)} for part in made], indent=1))
        return 0
    for part in made:
        print(_sentence(part, model))
    return 0


def _refuse_without_part(options: argparse.Namespace, matching: set[bool]) -> None:
    """Refuse options that none of the sets has a use for, as another set was meant.

    Args:
        options: what was given.
        matching: whether sets match features; both where some do.
    """
    towards_class, of_features = ["eps"], ["start", "layer", "shorten"]
    useless = towards_class if matching == {True} else of_features if matching == {False} else []
    _refuse(options, useless, f"sets of the kind {' or '.join(options.kind)}")


def _refuse(options: argparse.Namespace, useless: Sequence[str], where: str) -> None:
    """Refuse options that are given and have no part in something, in words."""
    given = [f"--{name.replace('_', '-')}" for name in useless if _is_given(getattr(options, name))]
    if given:
        raise UsageError(f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no part in {where}")


def _is_given(value: Any) -> bool:
    return value is not None and value is not False  # 0 is a budget


def _sentence(made: FeatureSet, model: Model) -> str:
    start = f"{made.folder} has {made.images} images, {made.written} of them made now; "
    means = made.means
    if "norm" in means:
        return start + (
            f"{model.name} names {means['right']:.1%} of the originals right, and takes {means['after']:.1%} of what "
            f"was found for its target, {means['stored']:.1%} in 8 bits, whose changes have a mean ℓ2 length of "
            f"{means['norm']:.3f}"
        )
    return start + (
        f"relative distance of features to the originals' {means['before']:.3g} at the start, {means['after']:.3g} at "
        f"the end, {means['stored']:.3g} in 8 bits"
    )


def _check_originals(options: argparse.Namespace, manifests: Sequence[Mapping[str, Any]]) -> None:
    """Refuse held-out images that are trained on, and originals that the sets were not made from."""
    images, held_out = options.images.resolve(), options.held_out.resolve()
    if images == held_out or images in held_out.parents or held_out in images.parents:
        raise UsageError(
            f"classifiers train on {options.images}, and --held-out {options.held_out} is of the same images"
        )
    files = LabelledFolder(options.images, Preprocess(manifests[0]["image_size"])).fingerprint()
    if others := [manifest["kind"] for manifest in manifests if manifest["files"] != files]:
        raise LipsimError(
            f"the sets {', '.join(others)} in {options.output} were made from other images than {options.images}"
        )


def _score(options: argparse.Namespace) -> int:
    folders = [options.output / kind for kind in KINDS if (options.output / kind / MANIFEST).is_file()]
    if not folders:
        raise FileNotFoundError(f"no feature sets in {options.output}; make some with --kind and --model")
    manifests = [json.loads((folder / MANIFEST).read_text(encoding="utf-8")) for folder in folders]
    classes = manifests[0]["classes"]
    shapes = {(part["image_size"], part["resize"]) for part in manifests}
    if len(shapes) > 1 or any(part["classes"] != classes for part in manifests):
        raise LipsimError(f"expected sets of one size and of the same classes in {options.output}, got {shapes}")
    ((image_size, resize),) = shapes
    _check_originals(options, manifests)
    with Progress("feature sets") as progress:
        progress("reading images")

        def read(folder: Path) -> LabelledImages:
            source = LabelledFolder(folder, Preprocess(image_size, resize), classes)
            return source.all_8bit(), source.labels

        held_out = read(options.held_out)
        sets = {"originals": read(options.images)}
        for folder, manifest in zip(folders, manifests, strict=True):
            sets[folder.name] = read(folder)
            if len(sets[folder.name][0]) < manifest["images"]:
                raise LipsimError(
                    f"{folder} has {len(sets[folder.name][0])} of {manifest['images']} images; give the command that "
                    "makes it again, which continues"
                )
        scores = score_sets(
            sets,
            held_out,
            lambda seed: small_network(
                options.architecture, len(classes), image_size=image_size, width=options.width, seed=seed
            ),
            Recipe(epochs=options.epochs, batch_size=64),
            seeds=range(options.seed, options.seed + options.seeds),
            eps=options.robust_eps,
            steps=options.attack_steps,
            say=progress,
        )
    rows: list[Row] = score_rows(scores, options.robust_eps)
    title = f"Small {options.architecture} trained on each set, on held-out originals, in %"
    content = [asdict(score) for score in scores]
    write_table(options.output, "scores", title, rows)
    write_json(options.output / "scores.json", {"eps": options.robust_eps, "scores": content})
    if options.json:
        print(json.dumps(content, indent=1))
        return 0
    print_table(Console(), rows, title)
    print(f"the table as .md, .tex, .csv and .json is in {options.output}/")
    return 0
