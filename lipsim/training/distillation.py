"""Distillation of a teacher's embedding into a 1-Lipschitz student (Ghazanfari et al. 2024, §4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim import export
from lipsim.data.augment import ColorJitter
from lipsim.metric import PerceptualMetric
from lipsim.training.acceleration import Acceleration
from lipsim.training.base import Evaluation, MetricModule, OptimizerFactory, encoder_from, image_size_of, images_of
from lipsim.training.losses import DistillationLoss, ScaleFree, pairwise_distances
from lipsim.training.schedules import Schedule, WarmupCosine


class Distillation(MetricModule):
    """Teach a student the teacher's embedding of the clean image, from the clean and from a colour-jittered view.

    Learns from any images: batches of triplets (all their images), of an image folder, or plain tensors. Besides the
    2AFC scores, validation logs the mean cosine similarity of both embeddings and the correlation of all distances
    within a batch.

    Args:
        teacher: exported metric whose encoder is the teacher.
        student: 1-Lipschitz encoder with as many features as the teacher.
        init_from: exported metric to start from instead.
        anchor: constant coordinate of the student's metric.
        loss: scale-free (default), or the paper's :class:`lipsim.training.RMSE`.
        jitter: whether the student also sees the jittered view.
        optimizer: default Adam with the paper's β and no weight decay.
        schedule: default the paper's warm-up and cosine.
        acceleration: how training runs the encoder; see :class:`lipsim.training.Acceleration`.
    """

    def __init__(
        self,
        teacher: Path,
        student: nn.Module | None = None,
        init_from: Path | None = None,
        anchor: float = 1.0,
        loss: DistillationLoss | None = None,
        jitter: bool = True,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=1e-2, betas=(0.5, 0.9)),
        schedule: Schedule | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        encoder = encoder_from(student, init_from, "student")
        super().__init__(
            PerceptualMetric(encoder, image_size_of(encoder), anchor=anchor),
            optimizer,
            schedule or WarmupCosine(),
            acceleration,
        )
        # In a list, so that neither checkpoints nor the optimizer see the teacher's weights.
        self._teacher = [export.load(teacher)]
        self.loss = loss or ScaleFree()
        self.view = ColorJitter() if jitter else None

    @property
    def teacher(self) -> PerceptualMetric:
        """The frozen teacher's metric, on the device of the student."""
        return self._teacher[0].to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss over the clean and the jittered view."""
        images = images_of(batch)
        with torch.no_grad():
            target = self.teacher.embed(images)
        views = [images] if self.view is None else [images, self.view(images)]
        features = self.embed(torch.cat(views)).chunk(len(views))
        loss = torch.stack([self.loss(z, target, self.metric.anchor) for z in features]).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Evaluation | None:
        """Compare student and teacher; score the student where the batch has triplets."""
        evaluation = super().validation_step(batch, batch_idx, dataloader_idx)
        images = images_of(batch)
        student, target = self.metric.embed(images), self.teacher.embed(images)
        name = f"val/{self.set_name(dataloader_idx)}"
        values = {}
        if len(images) > 2:  # the last images of a folder may make one pair, or none
            values["distance_correlation"] = distance_correlation(student, target, self.metric.anchor)
        if student.shape == target.shape:
            values["cosine_similarity"] = F.cosine_similarity(student, target).mean()
        for key, value in values.items():
            self.log(f"{name}/{key}", value, sync_dist=True, batch_size=len(images), add_dataloader_idx=False)
        return evaluation


def distance_correlation(student: Tensor, teacher: Tensor, anchor: float) -> Tensor:
    """Pearson correlation of both metrics' pairwise distances within a batch; other batches give other values."""
    pair = torch.stack([pairwise_distances(student, anchor), pairwise_distances(teacher, 0.0)])
    return torch.corrcoef(pair)[0, 1]
