"""Fine-tuning of a 1-Lipschitz student on human (or built-in) 2AFC votes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lipsim.data import SharedTriplet, Triplet
from lipsim.data.augment import augmented
from lipsim.data.skipping import NothingRead
from lipsim.training.acceleration import Acceleration
from lipsim.training.base import OptimizerFactory, Stage
from lipsim.training.global_batch import RateScaling
from lipsim.training.losses import RadiusHinge, TripletLoss
from lipsim.training.schedules import Schedule, Triangular
from lipsim.training.start import student_metric


class FineTuning(Stage):
    """Train a student on triplets with a hinge on its certified radius, or on the paper's margin.

    Args:
        student: 1-Lipschitz encoder, to train from its initialisation.
        init_from: exported metric to start from instead, such as the one that distillation wrote.
        anchor: constant coordinate of the metric; None: that of ``init_from``, 1 of a student.
        loss: hinge on the exact radius (default) or on ``d`` (:class:`lipsim.training.MarginHinge`, the paper's).
        augment: flip and turn all three images of a triplet alike; the vote stays.
        optimizer: default Adam with the paper's β.
        schedule: default the paper's triangle.
        acceleration: how training runs the encoder; see :class:`lipsim.training.Acceleration`.
        rate_scaling: of the learning rate by the global batch; default none.
    """

    def __init__(
        self,
        student: nn.Module | None = None,
        init_from: Path | None = None,
        anchor: float | None = None,
        loss: TripletLoss | None = None,
        augment: bool = False,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.9)),
        schedule: Schedule | None = None,
        acceleration: Acceleration | None = None,
        rate_scaling: RateScaling | None = None,
    ) -> None:
        super().__init__(
            student_metric(student, init_from, anchor),
            optimizer,
            schedule or Triangular(),
            acceleration,
            rate_scaling,
        )
        self.loss = loss or RadiusHinge()
        self.augment = augment

    def training_step(self, batch: Triplet | NothingRead, batch_idx: int) -> Tensor | None:
        """Loss of a batch; each distinct image is embedded once."""
        if isinstance(batch, NothingRead):
            return self.nothing_learned()
        if self.augment:
            batch = augmented(batch, self.sample_keys(len(batch)), self.batch_key())
        rest = (batch.right_vote, self.metric.anchor, self.progress)
        if isinstance(batch, SharedTriplet):
            loss = self.loss.of_shared(self.embed(batch.distinct), batch.ids, *rest)
        else:
            loss = self.loss(*batch.embed(self.embed), *rest)
        loss = self.mean_over_processes(loss, self.loss, batch.right_vote)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss
