"""Throughput on a device, each beside the baseline that benchmarks/README.md has for it, and memory of training."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from attacks import published_pgd
from device_checks import images_for
from device_figures import Figure, Scale, alternate, say, speeds, synchronize
from students import TRAINING, training_step
from teachers import CASES, embedding
from use_search import QUERIES, search_ratio

import lipsim
from lipsim.attacks import TwoAFCObjective, apgd, pgd
from lipsim.data import Triplet
from lipsim.layers import unfreeze
from lipsim.metric import PerceptualMetric
from lipsim.teachers import DreamSim
from lipsim.utils.precision import full_precision

STUDENTS = (
    "published small",
    "published small, bf16",
    "default student",
    "default student, channels_last",
    "default student, bf16",
    "ResNet-50",
)


def training_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """A step of training of the default student and of others, and the memory that it takes."""
    images = torch.rand(scale.student_batch, 3, scale.student_size, scale.student_size, device=device)
    cases = {case.name: case for case in TRAINING}
    steps, notes = {}, {}
    for name in STUDENTS:
        say(f"training step: {name}")
        steps[name] = training_step(cases[name], scale.student_size, images)
        if (taken := _memory(steps[name], device)) is not None:
            notes[name] = f"{taken / 2**30:.2f} GiB at most, weights and moments included"
    part = f"training step, {scale.student_batch} images of {scale.student_size} px"
    yield from speeds(part, alternate(steps, device, scale.rounds), scale.student_batch, "images/s", notes)


def _memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that torch holds at most in the second step, above what it held before the first; None but on CUDA."""
    if device.type != "cuda":
        step()
        return None
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def teacher_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """Embeddings of a teacher with random weights: as the original code computes them, and faster."""
    variant, depth = scale.teacher
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    say(f"teacher: {variant}")
    teacher = DreamSim(variant, "random", options=options).to(device).eval().requires_grad_(False)
    images = torch.rand(scale.teacher_batch, 3, teacher.image_size, teacher.image_size, device=device)
    cases = {name: how for name, *how in CASES if "compile" not in name and "at a time" not in name}
    steps = {name: embedding(teacher, images, *how) for name, how in cases.items()}
    first = next(iter(steps.values()))()
    notes = {}
    for name, step in steps.items():
        distance = max(0.0, float((1 - (step().float() * first).sum(1)).max()))
        notes[name] = f"cosine distance to the first {distance:.0e}"
    blocks = "" if depth is None else f" of {depth} blocks"
    part = f"teacher, DreamSim {variant}{blocks}, batches of {scale.teacher_batch}"
    yield from speeds(part, alternate(steps, device, scale.rounds), scale.teacher_batch, "images/s", notes)


def attack_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """Attacks at a budget that breaks nothing, so that all take the same steps."""
    say("attacks")
    metric = lipsim.load("quickstart").to(device)
    batch = images_for(metric, scale.attacked).to(device)
    trainable = copy.deepcopy(metric).requires_grad_(True)
    unfreeze(trainable)
    trainable.eval()
    eps, steps = 1 / 255, scale.attack_steps

    def ours(attack: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> torch.Tensor:
            objective = TwoAFCObjective(metric, batch.reference, batch.left, batch.right)
            return attack(objective, batch.reference, eps=eps, steps=steps)

        return run

    ways: dict[str, Callable[[], object]] = {
        "PGD, published way": lambda: published_pgd(trainable, batch, eps, steps),
        "lipsim.attacks.pgd": ours(pgd),
        "lipsim.attacks.apgd": ours(apgd),
    }
    part = f"attack, {scale.attacked} triplets, {steps} steps"
    yield from speeds(part, alternate(ways, device, scale.rounds), scale.attacked, "triplets/s", {})


@torch.no_grad()
def certification_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """What certificates cost beside the forward passes that they need."""
    say("certification")
    metric = lipsim.load("quickstart").to(device)
    few = images_for(metric, min(scale.certified, 64)).to(device)
    rows = torch.arange(scale.certified, device=device) % len(few)
    batch: Triplet = few.select(rows)
    metric.feature_error = metric.feature_error  # searched once, and not again at every change
    images = torch.cat(batch.images())

    def forward() -> tuple[torch.Tensor, ...]:
        with full_precision():
            return metric.embed(images).chunk(3)

    features = forward()
    ways: dict[str, Callable[[], object]] = {
        "forward passes": forward,
        "forward passes, radii and pixels": lambda: metric.certify(batch.reference, batch.left, batch.right),
        "radii and pixels from features": lambda: metric.certify_features(batch.reference, *features),
    }
    part = f"certification, {scale.certified} triplets of {metric.image_size} px"
    yield from speeds(part, alternate(ways, device, scale.rounds), scale.certified, "triplets/s", {})


def search_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """Search with the radius of every rank beside the product of matrices it cannot do without."""
    say("search")
    found = search_ratio(items=scale.gallery, rounds=3 * scale.rounds, device=device)
    for count in QUERIES:
        part = f"search among {scale.gallery:,}, {count} queries"
        product, search = found[f"product_{count}"], found[f"search_{count}"]
        yield Figure(part, "matrix product", f"{count / product:,.4g}", count / product, "queries/s", 1.0)
        yield Figure(part, "with certificates", f"{count / search:,.4g}", count / search, "queries/s", product / search)


def compile_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """``torch.compile`` of the metric: the same distances, and how fast."""
    say("torch.compile of the metric")
    metric = lipsim.load("quickstart").to(device)
    few = images_for(metric, min(scale.certified, 64)).to(device)
    rows = torch.arange(scale.certified, device=device) % len(few)
    x, y = few.reference[rows], few.left[rows]
    compiled: nn.Module = torch.compile(metric)

    def distance(of: PerceptualMetric | nn.Module) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return of(x, y)

        return run

    ways = {"distances": distance(metric), "distances, compile": distance(compiled)}
    eager, fast = (run() for run in ways.values())
    difference = float((eager - fast).abs().max())
    part = f"torch.compile of the metric, {scale.certified} pairs"
    yield from speeds(part, alternate(ways, device, scale.rounds), scale.certified, "pairs/s", {})
    yield Figure(part, "difference", f"{difference:.1e}", difference, passed=difference <= 1e-5)
