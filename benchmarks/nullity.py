"""Nullity over width, of teachers and students, and against the ease of attack of small trained networks.

    python benchmarks/nullity.py widths [--output FOLDER]
    python benchmarks/nullity.py pairs [--teacher runs/quickstart/teacher/teacher.safetensors] [--output FOLDER]
    python benchmarks/nullity.py attacks --images FOLDER [--output FOLDER]

`widths`: a plain CNN and a ViT at several widths, random weights; a minute of one core. `pairs`: the quickstart's own
teacher (which `python scripts/train.py` writes) and the bundled student, both trained; the architectures of DreamSim
and of the students that are distilled from it, and published compact networks beside larger ones, all with random
weights, of which n and μ are exact; two minutes. `attacks`: 20 architectures (`small_classifiers.py`) are trained from
two seeds on images of FOLDER/CLASS/*, 32 × 32 (CIFAR-10), and attacked by minimal-norm ℓ2 attacks; ten minutes.

Everything is printed, and written to FOLDER as Markdown, LaTeX, CSV and pictures. One thread.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_classifiers import NETWORKS, build, cnn, vit
from torch import Tensor, nn

from lipsim.analysis.classifiers import Recipe, accuracy, train_classifier
from lipsim.analysis.models import load_model
from lipsim.analysis.nullity import Nullity, nullity
from lipsim.analysis.nullity_studies import (
    MEASURES,
    attack_correlation,
    comparison_rows,
    correlation_rows,
    plot_comparisons,
    plot_correlation,
    plot_widths,
    rank_correlation,
    teacher_against_student,
    width_rows,
    width_sweep,
)
from lipsim.attacks import ClassificationObjective, minimal_norm
from lipsim.results.formats import markdown_table, write_table
from lipsim.results.tables import Row
from lipsim.students import OrthogonalShiftNetwork, SLLNetwork
from lipsim.teachers.dreamsim import RANDOM, DreamSim
from lipsim.utils.progress import Progress

_WELL_TRAINED = 0.35  # accuracy; the ViTs are below it after so few images
# Nullity may only stand for the size of a network, which is ranked beside it.
_MEASURES = {**MEASURES, "parameters": lambda found: float(found.parameters)}

COMPACT = (  # larger and smaller networks of the same task: architectures alone
    ("torchvision/resnet50", "torchvision/resnet18"),
    ("torchvision/regnet_y_16gf", "timm/deit_tiny_patch16_224"),  # the teacher of the distilled DeiT has this form
    ("timm/vit_base_patch16_224", "timm/deit_tiny_patch16_224"),
    ("torchvision/resnet50", "torchvision/mobilenet_v3_small"),
)


def main() -> None:
    """Print the tables of one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("widths", "pairs", "attacks"))
    parser.add_argument("--output", type=Path, help="folder for tables and pictures")
    parser.add_argument("--teacher", default="runs/quickstart/teacher/teacher.safetensors")
    parser.add_argument("--images", type=Path, help="folder of classes of images")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="of small_classifiers.py")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--train", type=int, default=300, help="images of a class to train on (%(default)s)")
    parser.add_argument("--test", type=int, default=100, help="images of a class held out (%(default)s)")
    parser.add_argument("--attacked", type=int, default=100, help="held-out images that are attacked (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--eps", type=float, default=0.25, help="the ℓ2 budget (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "widths":
        _widths(options.output)
    elif options.part == "pairs":
        _pairs(options.teacher, options.output)
    elif options.images is None:
        parser.error("attacks: give --images, such as the train folder of CIFAR-10")
    else:
        _attacks(options)


def _widths(output: Path | None) -> None:
    sweeps = {
        "CNN": width_sweep(cnn, (8, 16, 32, 64, 128, 256)),
        "ViT": width_sweep(lambda width: vit(width, 4, ratio=4), (16, 32, 64, 128, 256, 512)),
    }
    _show("widths", "Nullity over the width", width_rows(sweeps), output)
    if output is not None:
        plot_widths(output / "widths.png", sweeps)


def _pairs(teacher: str, output: Path | None) -> None:
    found = teacher_against_student(_networks(teacher))
    _show("pairs", "Nullity of teachers and students", comparison_rows(found), output)
    if output is not None:
        plot_comparisons(output / "pairs.png", found)


def _networks(teacher: str) -> Iterator[tuple[Nullity, Nullity]]:
    torch.manual_seed(0)
    yield _of(teacher, "quickstart teacher"), _of("quickstart", "quickstart student")
    dreamsim = nullity(DreamSim("ensemble", RANDOM), "DreamSim ensemble")
    nights = {"grid": 28, "widths": (96, 192, 384), "depths": (2, 2, 2)}
    yield dreamsim, nullity(OrthogonalShiftNetwork(224, 1792, **nights), "OrthogonalShiftNetwork, 224 px")
    yield dreamsim, nullity(SLLNetwork.from_preset("small", image_size=224, out_features=1792), "SLLNetwork small")
    for large, small in COMPACT:
        yield _of(large), _of(small)


def _of(name: str, label: str = "") -> Nullity:
    return nullity(load_model(name).network, label or name)


@dataclass(frozen=True)
class _Run:
    """A network trained from one seed; what is random has the weights that it started from."""

    name: str
    seed: int
    random: Nullity
    trained: Nullity
    accuracy: float
    broken: float  # share of the images named right that the budget breaks
    median: float  # length of the minimal perturbation of these


def _attacks(options: argparse.Namespace) -> None:
    images, labels = _read(options.images, options.train + options.test)
    held_out = torch.arange(len(labels)) % (options.train + options.test) >= options.train
    order = torch.randperm(int(held_out.sum()), generator=torch.Generator().manual_seed(0))[: options.attacked]
    runs: list[_Run] = []
    with Progress("nullity against attacks") as say:
        for name in options.networks:
            for seed in range(options.seeds):
                say(f"{name}, seed {seed}")
                network = build(name, seed)
                random = nullity(network, name)
                recipe = Recipe(options.epochs, batch_size=64, lr=NETWORKS[name][1])
                train_classifier(network, images[~held_out], labels[~held_out], recipe, seed=seed)
                right = accuracy(network, images[held_out], labels[held_out])
                norms = _minimal_norms(network, images[held_out][order].float() / 255, labels[held_out][order])
                broken = float((norms <= options.eps).double().mean())
                runs.append(_Run(name, seed, random, nullity(network, name), right, broken, float(norms.median())))
    _show("networks", "Small networks, random and trained", _network_rows(runs), options.output)
    _correlations(runs, options)


def _read(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of each class, uint8, by class."""
    classes = sorted(each for each in folder.iterdir() if each.is_dir())
    files = [sorted(each.iterdir())[:count] for each in classes]
    if not files or any(len(each) < count for each in files):
        raise SystemExit(f"expected folders of at least {count} images each in {folder}")
    images = [np.asarray(Image.open(file).convert("RGB")) for each in files for file in each]
    labels = torch.arange(len(classes)).repeat_interleave(count)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def _minimal_norms(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Lengths of the smallest perturbations found, of the images that are named right; infinite where none was."""
    objective = ClassificationObjective(network, labels)
    with torch.no_grad():
        right = objective(x) <= 0
    x, objective = x[right], ClassificationObjective(network, labels[right])
    x_adv = minimal_norm(objective, x, steps=30, polish=4)
    lengths = (x_adv - x).flatten(1).norm(dim=1)
    return torch.where(lengths > 0, lengths, torch.inf)


def _network_rows(runs: list[_Run]) -> list[Row]:
    rows: list[Row] = []
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        rows.append(
            {
                "network": name,
                "parameters": f"{own[0].random.parameters:,}",
                "n": str(own[0].random.n),
                "μ": str(own[0].random.mu),
                "ν random": _span([run.random.nu for run in own]),
                "ν trained": _span([run.trained.nu for run in own]),
                "Σ random": _span([run.random.sum_nullity for run in own]),
                "Σ trained": _span([run.trained.sum_nullity for run in own]),
                "accuracy": _mean([100 * run.accuracy for run in own], 1),
                "broken": _mean([100 * run.broken for run in own], 1),
                "median norm": _mean([run.median for run in own], 3),
            }
        )
    return rows


def _correlations(runs: list[_Run], options: argparse.Namespace) -> None:
    eases: dict[str, Callable[[_Run], float]] = {
        f"broken at {options.eps:g}": lambda run: run.broken,
        "1/median norm": lambda run: 1 / run.median,
    }
    names = dict.fromkeys(run.name for run in runs)
    found, rows = {}, []
    for ease, of in eases.items():
        points = [(run.trained, of(run)) for run in runs]
        found[ease] = attack_correlation(points, measures=_MEASURES)
        means = {name: [run for run in runs if run.name == name] for name in names}
        right = [statistics.mean(run.accuracy for run in own) for own in means.values()]
        mean_ease = [statistics.mean(of(run) for run in own) for own in means.values()]
        found[ease].append(rank_correlation("accuracy", right, mean_ease))
        seeds = [
            [
                *attack_correlation([(run.trained, of(run)) for run in runs if run.seed == seed], 1, _MEASURES),
                rank_correlation("accuracy", *_columns(runs, seed, of), resamples=1),
            ]
            for seed in range(options.seeds)
        ]
        for number, row in enumerate(correlation_rows({ease: found[ease]})):
            rows.append({**row, "each seed": ", ".join(f"{seed[number].rho:+.2f}" for seed in seeds)})
        if options.output is not None:
            file = options.output / f"correlation-{'budget' if 'broken' in ease else 'norm'}.png"
            plot_correlation(file, points, ease, found[ease])
        trained = [run for run in runs if run.accuracy > _WELL_TRAINED]
        if len({run.name for run in trained}) >= 4:
            left = attack_correlation([(run.trained, of(run)) for run in trained], measures=_MEASURES)
            label = f"{ease}, accuracy above {100 * _WELL_TRAINED:.0f} %"
            rows += [{**row, "each seed": ""} for row in correlation_rows({label: left})]
    sizes = attack_correlation([(run.trained, float(run.trained.parameters)) for run in runs])
    rows += [{**row, "each seed": ""} for row in correlation_rows({"parameters instead": sizes})]
    _show("correlation", "Rank correlation with the ease of attack", rows, options.output)


def _columns(runs: list[_Run], seed: int, of: Callable[[_Run], float]) -> tuple[list[float], list[float]]:
    own = [run for run in runs if run.seed == seed]
    return [run.accuracy for run in own], [of(run) for run in own]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _mean(values: list[float], digits: int) -> str:
    """The mean, and half of what the seeds are apart."""
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _show(name: str, title: str, rows: list[Row], output: Path | None) -> None:
    print(f"{title}:\n\n{markdown_table(rows)}\n", flush=True)
    if output is not None:
        write_table(output, name, title, rows)


if __name__ == "__main__":
    main()
