"""Tuning of a teacher on 2AFC votes: DreamSim's recipe (Fu et al. 2023) in small."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lipsim.data import SharedTriplet, Triplet
from lipsim.data.augment import apply_symmetries, random_symmetries
from lipsim.metric import PerceptualMetric
from lipsim.training.base import MetricModule, OptimizerFactory, encoder_from, image_size_of
from lipsim.training.losses import MarginHinge, TripletLoss
from lipsim.training.schedules import Schedule, WarmupCosine


class TeacherTuning(MetricModule):
    """Train an encoder without a Lipschitz bound on triplets, with a hinge on the cosine margin.

    Args:
        teacher: the encoder, such as :class:`lipsim.teachers.SmallViT`.
        init_from: exported metric to start from instead.
        loss: default a hinge on the margin, 0.05 as DreamSim has it.
        augment: flip and turn all three images of a triplet alike, and exchange their colour channels; the vote stays.
        optimizer: default Adam.
        schedule: default warm-up and cosine.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        init_from: Path | None = None,
        loss: TripletLoss | None = None,
        augment: bool = True,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=3e-4),
        schedule: Schedule | None = None,
    ) -> None:
        encoder = encoder_from(teacher, init_from, "teacher")
        # No anchor: the teacher's embedding is on the unit sphere, and there is no bound that an anchor would serve.
        metric = PerceptualMetric(encoder, image_size_of(encoder), anchor=0.0, lipschitz=math.inf)
        super().__init__(metric, optimizer, schedule or WarmupCosine(100))
        self.loss = loss or MarginHinge(0.05)
        self.augment = augment

    def training_step(self, batch: Triplet, batch_idx: int) -> Tensor:
        """Hinge over a batch."""
        z, z0, z1 = (augmented(batch) if self.augment else batch).embed(self.metric.embed)
        loss = self.loss(z, z0, z1, batch.right_vote, self.metric.anchor)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss


def augmented(batch: Triplet) -> Triplet:
    """The batch under random symmetries, one for each triplet (one for all where triplets share images)."""
    if isinstance(batch, SharedTriplet):
        reflections, channels = random_symmetries(1, batch.distinct)
        count = len(batch.distinct)
        distinct = apply_symmetries(batch.distinct, (reflections.expand(count, -1), channels.expand(count, -1)))
        return SharedTriplet(distinct, batch.ids, batch.right_vote, batch.index)
    symmetries = random_symmetries(len(batch), batch.reference)
    reference, left, right = (apply_symmetries(part, symmetries) for part in batch.images())
    return Triplet(reference, left, right, batch.right_vote, batch.index)
