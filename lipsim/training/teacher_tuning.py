"""Tuning of a teacher on 2AFC votes: DreamSim's recipe (Fu et al. 2023), on its backbones or in small."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lipsim.attacks.adversary import Adversary, adversarial_triplets
from lipsim.attacks.objectives import TARGETS, Target
from lipsim.certificates.numbers import check_number
from lipsim.data import Triplet
from lipsim.data.augment import augmented
from lipsim.data.order import ATTACK
from lipsim.data.skipping import NothingRead
from lipsim.layers.encoder import head_of
from lipsim.metric import PerceptualMetric
from lipsim.teachers.lora_tuning import Lora, add_adapter
from lipsim.training.acceleration import Acceleration
from lipsim.training.base import OptimizerFactory, Stage
from lipsim.training.global_batch import RateScaling, gathered, shared
from lipsim.training.losses import MarginHinge, TripletLoss, info_nce
from lipsim.training.schedules import Schedule, WarmupCosine
from lipsim.training.start import image_size_of, start_from
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import subkeys


class TeacherTuning(Stage):
    """Train an encoder without a Lipschitz bound on triplets, with a hinge on the cosine margin.

    What is exported has the tuned weights in plain layers, for :class:`lipsim.training.Distillation` to take.

    Args:
        teacher: the encoder, such as :class:`lipsim.teachers.DreamSim` without its adapter, or ``SmallViT``.
        init_from: exported metric to start from instead.
        tune: "all" weights; "lora", low-rank factors on some layers, DreamSim's recipe (needs ``lipsim[tune]``); or the
            "head" alone, which the teacher has to have (``head`` of :class:`lipsim.teachers.Ensemble`).
        lora: rank, scale, dropout and place of the factors; of linear layers, and of convolutions that are neither
            grouped nor dilated (EfficientNet's ``conv_pw`` and ``conv_pwl``).
        batch_statistics: whether batch normalisation uses, and keeps running, the statistics of the batches as in
            training from scratch. By default its statistics stay those of the pretrained network: of small batches,
            and of triplets whose images resemble each other, they are others than those of the images to come, and
            an adversary meets the network with the statistics that stay. Scale and shift train with all weights.
        loss: default a hinge on the margin, 0.05 as DreamSim has it.
        contrast: weight of a contrastive term (InfoNCE, van den Oord et al. 2018) between references and preferred
            candidates of a batch. A teacher from scratch learns from it what images are, which a pretrained one knows.
        temperature: of the contrastive term.
        augment: flip and turn all three images of a triplet alike; the vote stays.
        adversary: moves images before each step to where the margin speaks most against the votes (adversarial
            training, Madry et al. 2018), at the cost that it tells; None trains plainly.
        adversary_target: which images it moves, "reference", "left", "right", or "all" by the whole budget each.
        optimizer: default Adam.
        schedule: default warm-up and cosine.
        acceleration: how training runs the encoder; see :class:`lipsim.training.Acceleration`.
        rate_scaling: of the learning rate by the global batch; default none.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        init_from: Path | None = None,
        tune: Literal["all", "lora", "head"] = "all",
        lora: Lora | None = None,
        batch_statistics: bool = False,
        loss: TripletLoss | None = None,
        contrast: float = 0.0,
        temperature: float = 0.07,
        augment: bool = True,
        adversary: Adversary | None = None,
        adversary_target: Target = "reference",
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=3e-4),
        schedule: Schedule | None = None,
        acceleration: Acceleration | None = None,
        rate_scaling: RateScaling | None = None,
    ) -> None:
        if tune not in ("all", "lora", "head"):
            raise LipsimError(f"expected to tune all, lora or head, got {tune!r}")
        if adversary_target not in TARGETS:
            raise LipsimError(
                f"expected the adversary's target to be in {', '.join(TARGETS)}, got {adversary_target!r}"
            )
        if batch_statistics and tune != "all":
            raise LipsimError(f"batch statistics change with all weights only, not where {tune} is tuned")
        if batch_statistics and acceleration is not None and acceleration.checkpoint:
            raise LipsimError(
                "activation checkpointing computes blocks twice, and batch statistics would move twice in a step; take "
                "one of acceleration.checkpoint and batch_statistics"
            )
        check_number("contrast", contrast)
        check_number("temperature", temperature, above=True)
        encoder, images, _ = start_from(teacher, init_from, "teacher")
        if tune == "lora":
            add_adapter(encoder, lora or Lora())
        elif tune == "head":
            head = head_of(encoder)
            if head is None:
                raise LipsimError(f"this {type(encoder).__name__} has no head to tune; give it one, such as head: 512")
            encoder.requires_grad_(False)
            head.requires_grad_(True)
        # No anchor: the teacher's embedding is on the unit sphere, and there is no bound that an anchor would serve.
        metric = PerceptualMetric(
            encoder,
            image_size_of(encoder),
            anchor=0.0,
            lipschitz=math.inf,
            resize=images.resize,
            framing=images.framing,
        )
        super().__init__(metric, optimizer, schedule or WarmupCosine(100), acceleration, rate_scaling)
        self.loss = loss or MarginHinge(0.05)
        self.contrast, self.temperature = contrast, temperature
        self.augment = augment
        self.adversary, self.adversary_target = adversary, adversary_target
        self.batch_statistics = batch_statistics

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which statistics of batch normalisation stay as they are unless told otherwise."""
        super().train(mode)
        if mode:
            self._keep_statistics()
        return self

    def on_train_start(self) -> None:
        super().on_train_start()
        self._keep_statistics()  # not before: Lightning warns of modules in evaluation mode when training starts

    def _keep_statistics(self) -> None:
        for module in self.modules():
            if not self.batch_statistics and isinstance(module, _NormBase) and module.track_running_stats:
                module.eval()

    def training_step(self, batch: Triplet | NothingRead, batch_idx: int) -> Tensor | None:
        """Hinge over a batch, and the contrastive term."""
        if isinstance(batch, NothingRead):
            return self.nothing_learned()
        keys = self.sample_keys(len(batch))
        if self.augment:
            batch = augmented(batch, keys, self.batch_key())
        if self.adversary is not None:
            index = subkeys(keys, ATTACK)
            batch = adversarial_triplets(self.adversary, self.metric, batch, self.adversary_target, index=index)
        z, z0, z1 = batch.embed(self.embed)
        loss = self.loss(z, z0, z1, batch.right_vote, self.metric.anchor, self.progress)
        loss = self.mean_over_processes(loss, self.loss, batch.right_vote)
        if self.contrast:
            preferred = torch.where((batch.right_vote > 0.5).unsqueeze(1), z1, z0)
            untied = batch.right_vote != 0.5  # nobody has preferred a candidate of the others
            loss = loss + self._contrastive(z[untied], preferred[untied])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def loss_of_no_rows(self, features: Tensor) -> Tensor:
        """As of :class:`Stage`, with the contrastive term over the triplets of the other processes."""
        loss = super().loss_of_no_rows(features)
        return loss + self._contrastive(features, features) if self.contrast else loss

    def _contrastive(self, z: Tensor, preferred: Tensor) -> Tensor:
        """The weighted term over the rows of all processes, with ``(N, D)`` of this one; 0 where nobody has any."""
        every, every_preferred = gathered(z, preferred)
        if not len(every):
            return z.new_zeros(())
        return self.contrast * shared(info_nce(every, every_preferred, self.temperature))
