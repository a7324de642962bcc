"""Robust and non-robust features: a 1-Lipschitz student against a standard network, and what architectures learn.

    python benchmarks/feature_sets.py --images ../shared/data/cifar10-train.tar.gz --output runs/feature-sets

Takes a subset of an archive or folder CLASS/IMAGE of small images, trains a standard classifier and a 1-Lipschitz
student with a linear head on it, makes D_R of the student and D_NR, D_rand and D_det of the classifier, and prints

- how closely their images have what they should, with what each cost (processor time of one thread);
- clean and robust accuracy of small classifiers trained on each, mean ± standard deviation over seeds;
- for several architectures, the accuracy that each set of the classifier gives, beside the share of attacks on the
  classifier that transfer.

The defaults (1,500 images, 1,000 held out, 150 steps for features where 1,000 were published) cost some 15 minutes of
one core. Killed, the same command continues with the sets where it was.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.analysis.classifiers import Recipe, accuracy, robust_accuracy, train_classifier
from lipsim.analysis.feature_set_scores import (
    Build,
    LabelledImages,
    plot_susceptibility,
    score_rows,
    score_sets,
    susceptibility,
    susceptibility_rows,
    transfer_correlation,
)
from lipsim.analysis.feature_sets import FeatureSetRecipe, Kind, make_feature_set
from lipsim.analysis.models import Model, Normalized
from lipsim.analysis.small_networks import ARCHITECTURES, small_network
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.data.transforms import Preprocess
from lipsim.layers import OrthogonalLinear, freeze
from lipsim.results.formats import markdown_table, write_table
from lipsim.results.tables import Row
from lipsim.students import OrthogonalShiftNetwork
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

SIDE = 32
# Rate, margin taken off the logit of the right class, and temperature. Of six tried on 500 other images, margins of 0.3
# with temperatures of 8 and 20 left the student less robust than the standard network.
STUDENT = (3e-3, 1.0, 2.0)
SOURCE_SEED = 100  # no other network starts from it
Say = Callable[[str], None]
NAMES: dict[Kind, str] = {"robust": "D_R", "nonrobust": "D_NR", "random": "D_rand", "deterministic": "D_det"}


def unpack(images: Path, folder: Path, train: int, held_out: int) -> None:
    """The first images of each class into ``train/``, the last into ``held-out/``, by the order of their names.

    Raises:
        ValueError: a class has fewer, none would be held out, or the folder has other numbers of them.
    """
    asked = {"train": train, "held-out": held_out}
    if folder.is_dir():
        for part, count in asked.items():
            _check_count(folder / part, count)
        return
    half = folder.with_name(folder.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    if images.is_dir():
        unpacked = images
    else:
        unpacked = half / "all"
        with tarfile.open(images) as archive:
            archive.extractall(unpacked, filter="data")
    files = sorted(path for path in unpacked.rglob("*") if path.is_file())
    classes = sorted({path.parent.name for path in files})
    for label in classes:
        own = [path for path in files if path.parent.name == label]
        first, last = (count // len(classes) for count in asked.values())
        if not (0 < first and 0 < last and first + last <= len(own)):
            raise LipsimError(
                f"expected at least one image of each of {len(classes)} classes to train on and one held out, together "
                f"no more than the {len(own)} of {label}, got {first} and {last}"
            )
        parts = {"train": own[:first], "held-out": own[len(own) - last :]}
        for part, paths in parts.items():
            (half / "parts" / part / label).mkdir(parents=True)
            for path in paths:
                shutil.copy(path, half / "parts" / part / label / path.name)
    (half / "parts").rename(folder)
    shutil.rmtree(half)


def _check_count(folder: Path, asked: int) -> None:
    classes = [path for path in folder.iterdir() if path.is_dir()]
    found = sum(path.is_file() for path in folder.rglob("*"))
    if found != asked // len(classes) * len(classes):
        raise LipsimError(f"{folder} has {found} images of another run, expected {asked}; name another --output")


def train_student(images: Tensor, labels: Tensor, classes: int, epochs: int, seed: int) -> nn.Sequential:
    """A 1-Lipschitz encoder and an orthonormal head, trained with cross-entropy on logits less a margin."""
    torch.manual_seed(seed)
    encoder = OrthogonalShiftNetwork(SIDE, 128, linear_depth=1)
    network = nn.Sequential(encoder, OrthogonalLinear(128, classes))
    rate, margin, temperature = STUDENT
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * max(0.0, 1 - step / steps)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            x = images[rows].float() / 255
            flip = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
            logits = network(x) - margin * F.one_hot(labels[rows], classes)
            loss = F.cross_entropy(temperature * logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    freeze(network.requires_grad_(False))
    return network


def certified(network: nn.Module, held_out: LabelledImages, eps: float) -> float:
    """Share of images with a logit margin of more than √2·eps: rows of the head are orthonormal."""
    images, labels = held_out
    with torch.no_grad():
        logits = network(images.float() / 255)
    own = logits.gather(1, labels.unsqueeze(1))
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1, keepdim=True)
    return float((own - others > 2**0.5 * eps).double().mean())


def show(output: Path, name: str, title: str, rows: Sequence[Row]) -> None:
    """Print a table, and write it to the output folder."""
    write_table(output, name, title, rows)
    print(f"\n{title}:\n\n{markdown_table(rows)}", flush=True)


def two_models(
    originals: LabelledImages, held_out: LabelledImages, classes: int, recipe: Recipe, say: Say
) -> tuple[dict[str, nn.Module], list[Row]]:
    """The standard network and the student, and how they do on held-out images."""
    networks: dict[str, nn.Module] = {}
    rows: list[Row] = []
    for name in ("standard resnet", "1-Lipschitz student"):
        start = time.process_time()
        say(f"training the {name}")
        if name == "standard resnet":
            network: nn.Module = small_network("resnet", classes, image_size=SIDE, seed=SOURCE_SEED)
            train_classifier(network, *originals, recipe, seed=SOURCE_SEED)
            proved = ""
        else:
            network = train_student(*originals, classes, recipe.epochs, SOURCE_SEED)
            proved = " / ".join(f"{100 * certified(network, held_out, eps):.1f}" for eps in (0.25, 0.5))
        seconds = time.process_time() - start
        networks[name] = network
        robust = {eps: robust_accuracy(network, *held_out, eps=eps, say=say) for eps in (0.25, 0.5)}
        rows.append(
            {
                "model": name,
                "clean": f"{100 * accuracy(network, *held_out):.1f}",
                **{f"robust, ℓ2 {eps:g}": f"{100 * share:.1f}" for eps, share in robust.items()},
                "certified, the same": proved,
                "seconds": f"{seconds:.0f}",
            }
        )
    return networks, rows


def make_sets(
    source: LabelledFolder, output: Path, networks: dict[str, nn.Module], steps: int, target_steps: int, say: Say
) -> tuple[dict[str, LabelledImages], list[Row]]:
    """D_R of the student and the others of the standard network, and how close each came."""
    student, standard = networks["1-Lipschitz student"], networks["standard resnet"]
    assert isinstance(student, nn.Sequential) and isinstance(standard, Normalized)
    sets: dict[str, LabelledImages] = {}
    rows: list[Row] = []
    for kind, name in NAMES.items():
        recipe = FeatureSetRecipe(kind, steps=steps if kind in ("robust", "nonrobust") else target_steps)
        model = Model("standard resnet", standard.network, standard, SIDE)
        if kind == "robust":
            model = Model("1-Lipschitz student", student[0], student[0], SIDE)
        start = time.process_time()

        def tell(text: str, name: str = name) -> None:
            say(f"{name}, {text}")

        made = make_feature_set(source.folder, output, model, recipe, say=tell)
        seconds = time.process_time() - start
        folder = LabelledFolder(made.folder, source.preprocess, source.classes)
        sets[name] = folder.all_8bit(), folder.labels
        before = made.means["before"] if recipe.matches_features else made.means["right"]
        rows.append(
            {
                "set": name,
                "steps": str(recipe.num_steps),
                "before": f"{before:.3f}",
                "after": f"{made.means['after']:.3f}",
                "in 8 bits": f"{made.means['stored']:.3f}",
                "ℓ2 of the change": f"{made.means['norm']:.3f}" if "norm" in made.means else "",
                "ms an image": f"{1000 * seconds / made.written:.0f}" if made.written else "",
            }
        )
    return sets, rows


def main(args: Sequence[str] | None = None) -> None:
    """Everything, in order; tables go to the output folder too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, required=True, help="archive or folder of CLASS/IMAGE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1500, help="images in all (%(default)s)")
    parser.add_argument("--held-out", type=int, default=1000, help="images in all (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="for features; published 1,000 (%(default)s)")
    parser.add_argument("--target-steps", type=int, default=100, help="towards classes (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of the table clean / robust (%(default)s)")
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    output: Path = options.output
    unpack(options.images, output / "images", options.train, options.held_out)
    source = LabelledFolder(output / "images/train", Preprocess(SIDE))
    originals = source.all_8bit(), source.labels
    test = LabelledFolder(output / "images/held-out", source.preprocess, source.classes)
    held_out = test.all_8bit(), test.labels
    recipe = Recipe(epochs=options.epochs, batch_size=64)

    def builder(architecture: str) -> Build:
        return lambda seed: small_network(architecture, len(source.classes), image_size=SIDE, seed=seed)

    with Progress("feature sets") as say:
        networks, rows = two_models(originals, held_out, len(source.classes), recipe, say)
        show(output, "models", "The two models, on held-out images, in %", rows)
        sets, rows = make_sets(source, output / "sets", networks, options.steps, options.target_steps, say)
        show(output, "sets", "Relative distance of features, or share of right answers, then of targets reached", rows)
        scores = score_sets(
            {"original images": originals, **sets}, held_out, builder("resnet"), recipe,
            seeds=range(options.seeds), steps=25, say=say,
        )  # fmt: skip
        show(output, "scores", "Small ResNets trained on each set, in %", score_rows(scores, 0.25))
        if options.architectures:
            others = {name: images for name, images in sets.items() if name != "D_R"}
            builders = {name: builder(name) for name in options.architectures}
            standard = networks["standard resnet"]
            found = susceptibility(standard, builders, originals, others, held_out, recipe, say=say)
            title = "What each set of the resnet teaches, beside the attacks on it that transfer, in %"
            show(output, "transfer", title, susceptibility_rows(found))
            plot_susceptibility(output / "transfer.png", found)
            if len(found) > 3:
                ranks = [
                    {"set": c.name, "networks": str(c.networks), "Spearman's ρ": f"{c.rho:.2f}", "p": f"{c.p:.2f}"}
                    for c in transfer_correlation(found)
                ]
                show(output, "ranks", "Rank correlation of transfer and accuracy", ranks)
    print(f"\n{time.process_time():.0f} s of processor time in all")


if __name__ == "__main__":
    main()
