"""The rows of benchmarks/results.py: what is trained, how, and for how long."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from results_data import Batches, Task

import lipsim
from lipsim.attacks.adversary import Adversary
from lipsim.data import Triplet
from lipsim.data.embeddings.folder import EmbeddedImages
from lipsim.metric import PerceptualMetric
from lipsim.metric.distance import Distance
from lipsim.metric.distances import pixel_l2, ssim
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, ScatteringTransform, SLLNetwork
from lipsim.teachers import SmallViT
from lipsim.training import (
    RMSE,
    CertifiedShare,
    Distillation,
    FineTuning,
    MarginHinge,
    RadiusHinge,
    ScaleFree,
    TeacherTuning,
    Triangular,
    WarmupCosine,
)
from lipsim.training.base import Stage
from lipsim.training.start import start_from

BUDGETS = (0.0, 0.14, 0.28, 0.42)  # of the loss on photographs
UNTRAINED_ROWS = ("pixel", "ssim", "scattering")  # the same for each seed
TUNED_ROW = "teacher-plain"  # what other rows of a task without a pretrained teacher learn from


@dataclass(frozen=True)
class Trained:
    """What a row made: a metric or a distance, and what that cost.

    Attributes:
        metric: what answers.
        seconds: of training, on the clock.
        steps: of all optimizers.
        smoothed: standard deviation of the noise under which it answers; 0: without.
        published: whether the published radius is a row of its own.
    """

    metric: Distance
    seconds: float = 0.0
    steps: int = 0
    smoothed: float = 0.0
    published: bool = False


@dataclass(frozen=True)
class Context:
    """What a row is made with."""

    task: Task
    seed: int
    device: torch.device
    options: argparse.Namespace

    @property
    def seconds(self) -> float:
        """The time budget."""
        return 60.0 * float(self.options.minutes)

    @property
    def teacher(self) -> Path:
        """The file of the teacher, which a row of this seed has tuned where there is no pretrained one."""
        own = row_folder(self.options.output, self.options.task, TUNED_ROW, self.seed) / "metric.safetensors"
        return self.task.teacher or own

    def fit(
        self, stage: Stage, make: Callable[[], EmbeddedImages | Triplet], seconds: float, clip: float | None = None
    ) -> Trained:
        """Train a stage until the time is over, or its share of ``--steps`` is done; its schedule follows that."""
        steps: int | None = self.options.steps
        trainer = L.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            max_time=None if steps else timedelta(seconds=seconds),
            max_steps=math.ceil(steps * seconds / self.seconds) if steps else -1,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit(stage, train_dataloaders=DataLoader(Batches(make), batch_size=None), weights_only=True)
        return Trained(stage.metric, time.perf_counter() - start, trainer.global_step)


def row_folder(output: Path, task: str, row: str, seed: int) -> Path:
    """Where a row of a seed is written."""
    return output / "rows" / f"{task}--{row}--{seed}"


def lipsim_recipe(context: Context, margin: float) -> Trained:
    """The published recipe: RMSE to the teacher's unit-norm embedding, then a hinge on the difference of distances."""
    task = context.task
    student = SLLNetwork.from_preset("small", task.image_size, task.features)
    # The activations of 20 layers at full resolution are what memory goes by: at 128 pixels 6 GiB of a batch.
    acceleration = lipsim.training.Acceleration(channels_last=True, checkpoint=task.image_size > 128)
    distillation = Distillation(
        context.teacher,
        student,
        loss=RMSE(),
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.5, 0.9)),
        schedule=WarmupCosine(2000),
        acceleration=acceleration,
    )
    first = context.fit(distillation, _distilled_on(context, 32), context.seconds / 2)
    tuning = FineTuning(student, loss=MarginHinge(margin), schedule=Triangular(), acceleration=acceleration)
    second = context.fit(tuning, task.triplets(32, context.device), context.seconds / 2)
    return Trained(second.metric, first.seconds + second.seconds, first.steps + second.steps, published=True)


def scattering(context: Context) -> Trained:
    """Moduli of wavelets, not trained."""
    size = context.task.image_size
    return Trained(PerceptualMetric(ScatteringTransform(size), size).to(context.device))


def linear(context: Context) -> Trained:
    """One orthonormal map of the pixels, by a hinge on the radius."""
    return _tuned(context, OrthogonalProjection(context.task.image_size, 256), context.seconds)


def ours(context: Context, **size: object) -> Trained:
    """The default student: a hinge on the radius; before, where there are many images without classes, distillation."""
    task = context.task
    student = OrthogonalShiftNetwork(task.image_size, task.features, **size)  # type: ignore[arg-type]
    if len(task.images) < 1000 or task.has_classes:
        return _tuned(context, student, context.seconds)
    distillation = Distillation(
        context.teacher,
        student,
        loss=ScaleFree(),
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.9)),
        schedule=WarmupCosine(10),
    )
    first = context.fit(distillation, _distilled_on(context, 64), context.seconds / 2)
    second = _tuned(context, student, context.seconds / 2)
    return Trained(second.metric, first.seconds + second.seconds, first.steps + second.steps)


def _tuned(context: Context, student: nn.Module, seconds: float) -> Trained:
    task = context.task
    if task.has_classes:
        tuning = FineTuning(
            student,
            loss=CertifiedShare(BUDGETS, 0.25),
            optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.9, 0.99)),
            schedule=WarmupCosine(100),
        )
        return context.fit(tuning, task.shared(context.device), seconds)
    tuning = FineTuning(student, loss=RadiusHinge(task.target), augment=task.turns == "all", schedule=Triangular())
    return context.fit(tuning, task.triplets(task.batch, context.device), seconds)


def _distilled_on(context: Context, batch: int) -> Callable[[], EmbeddedImages | Triplet]:
    """Images with embeddings, or triplets, whose images a teacher without a file of them embeds on the way."""
    task = context.task
    if len(task.plain):
        return task.embedded(batch, context.device)
    return task.triplets(math.ceil(batch / 3), context.device)


def teacher(context: Context, tune: bool = False, adversarial: bool = False, sigma: float = 0.0) -> Trained:
    """The teacher: as it is, or tuned on the triplets, plainly, adversarially or under noise."""
    task = context.task
    if task.teacher is not None and not tune:
        return Trained(lipsim.load(task.teacher))
    adversary = Adversary(norm=2, eps=task.image_size / 256, steps=2) if adversarial else None
    encoder: nn.Module
    if task.teacher is None:
        encoder = SmallViT(task.image_size)
        recipe: dict[str, Any] = {
            "loss": MarginHinge(0.2),
            "contrast": 0.3,
            "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05),
            "schedule": WarmupCosine(50),
        }
    else:
        encoder = start_from(None, task.teacher, "teacher").encoder
        recipe = {
            "augment": False,
            "optimizer": lambda p: torch.optim.Adam(p, lr=1e-4),
            "schedule": WarmupCosine(10),
        }
    stage = TeacherTuning(UnderNoise(encoder, sigma) if sigma else encoder, adversary=adversary, **recipe)
    # Of few images each is embedded once, unless an adversary moves each in every triplet on its own.
    batch = task.batch if len(task.train.images) < 1000 and not adversarial else 64 if task.teacher is None else 32
    trained = context.fit(stage, task.triplets(batch, context.device), context.seconds, clip=1.0)
    metric = PerceptualMetric(encoder, task.image_size, anchor=0.0, lipschitz=math.inf)
    return Trained(metric, trained.seconds, trained.steps, smoothed=sigma)


class UnderNoise(nn.Module):
    """An encoder that sees images under Gaussian noise in training, as randomized smoothing has them.

    Args:
        encoder: the encoder.
        sigma: standard deviation of the noise.
    """

    def __init__(self, encoder: nn.Module, sigma: float) -> None:
        super().__init__()
        self.encoder, self.sigma, self.image_size = encoder, sigma, encoder.image_size

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` to features ``(N, D)``."""
        embedding: Tensor = self.encoder(x + self.sigma * torch.randn_like(x) if self.training else x)
        return embedding


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        title: what the tables call it.
        recipe: how it is made, in words.
        make: does it.
        pretrained: whether only data with a pretrained teacher have it.
    """

    title: str
    recipe: str
    make: Callable[[Context], Trained]
    pretrained: bool = False


_LIPSIM = (
    "SLLNetwork small, half of the time RMSE to the teacher's unit-norm embedding (Adam, 0.01, warm-up and cosine, "
    "batches of 32), half of it a hinge on the difference of distances (Adam, 0.001, triangle)"
)
_HINGE = (
    "a hinge on the exact radius, target 2 for each 64 pixels of the side (Adam, 0.001, triangle); on photographs the "
    "share of triplets certified at four budgets (CertifiedShare) over batches of 512 images and 16,384 triplets of "
    "their classes (Adam, 0.002, warm-up and cosine)"
)
_OURS = (
    "OrthogonalShiftNetwork, on built-in data direction and relations of the teacher's embeddings for half of the time "
    f"(Adam, 0.002), then {_HINGE}"
)
_TUNED = "the teacher tuned on the triplets, all weights, a hinge on the difference of distances"
_SMOOTHED = (
    f"{_TUNED}, under Gaussian noise on all images; certified by randomized smoothing, with noise on the reference, or "
    "on all images"
)
ROWS = {
    "pixel": Row("pixel ℓ2", "Euclidean distance; its certificate is exact", lambda _: Trained(pixel_l2)),
    "ssim": Row("SSIM", "structural similarity", lambda _: Trained(ssim)),
    "scattering": Row("scattering", "ScatteringTransform, which is not trained", scattering),
    "lipsim-0.2": Row("LipSim, margin 0.2", f"{_LIPSIM}, margin 0.2", lambda c: lipsim_recipe(c, 0.2)),
    "lipsim-0.5": Row("LipSim, margin 0.5", f"{_LIPSIM}, margin 0.5", lambda c: lipsim_recipe(c, 0.5)),
    "linear": Row("linear map", f"OrthogonalProjection, 256 features, {_HINGE}", linear),
    "ours-small": Row(
        "ours, small",
        f"{_OURS}; widths 48 and 96, one block each",
        lambda c: ours(c, widths=(48, 96), depths=(1, 1), linear_depth=1),
    ),
    "ours-default": Row("ours, default", f"{_OURS}; widths 96 and 192, two blocks each", ours),
    "ours-large": Row(
        "ours, large",
        f"{_OURS}; a grid of 16, widths 96, 192 and 384, two blocks each, inner width 512",
        lambda c: ours(c, grid=16, widths=(96, 192, 384), depths=(2, 2, 2), linear_width=512),
    ),
    "teacher-plain": Row(
        "teacher",
        "EfficientNet-Lite0 as it is (ImageNet), images resized inside; on the built-in data a small ViT tuned "
        "on the triplets",
        teacher,
    ),
    "teacher-tuned": Row("teacher, tuned", _TUNED, lambda c: teacher(c, tune=True), pretrained=True),
    "teacher-adversarial": Row(
        "teacher, adversarially tuned",
        f"{_TUNED}, on references that PGD has moved by 0.25 in ℓ2 for each 64 pixels of the side",
        lambda c: teacher(c, tune=True, adversarial=True),
    ),
    "teacher-smoothed-0.25": Row(
        "teacher, smoothed, σ = 0.25",
        _SMOOTHED,
        lambda c: teacher(c, tune=True, sigma=0.25),
    ),
    "teacher-smoothed-1": Row(
        "teacher, smoothed, σ = 1",
        _SMOOTHED,
        lambda c: teacher(c, tune=True, sigma=1.0),
    ),
}
