"""Adversarial training: what moves the images before each step (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lipsim.attacks.apgd import apgd
from lipsim.attacks.mi_fgsm import mi_fgsm
from lipsim.attacks.objectives import Objective, Target, TwoAFCObjective, UnendingObjective
from lipsim.attacks.pgd import pgd
from lipsim.attacks.projections import Ball, Norm
from lipsim.data.triplet import Triplet
from lipsim.layers.base import evaluation_mode
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError

_ATTACKS = {"apgd": apgd, "mi_fgsm": mi_fgsm, "pgd": pgd}


@dataclass(frozen=True)
class Adversary:
    """Moves images within a budget to where an objective is largest, all steps long.

    One step of training costs ``steps + 2`` forward and ``steps`` backward passes more than without.

    Args:
        norm: 2 or "inf".
        eps: budget, in units of images in [0, 1].
        steps: gradient steps.
        attack: "pgd", "apgd" or "mi_fgsm", of :mod:`lipsim.attacks`.

    Raises:
        ValueError: a bad norm or budget, an unknown attack, or no step.

    Example:
        >>> Adversary(norm="inf", eps=8 / 255).steps
        7
    """

    norm: Norm = 2
    eps: float = 0.5
    steps: int = 7
    attack: Literal["pgd", "apgd", "mi_fgsm"] = "pgd"

    def __post_init__(self) -> None:
        if self.attack not in _ATTACKS:
            raise LipsimError(f"expected the attack to be one of {', '.join(_ATTACKS)}, got {self.attack!r}")
        if self.norm not in (2, "inf") or self.steps < 1:
            raise LipsimError(f"expected norm 2 or inf and at least 1 step, got norm {self.norm} and {self.steps}")
        Ball(self.norm, self.eps, (0.0, 1.0))  # checks the budget

    def __call__(
        self,
        objective: Objective,
        x: Tensor,
        *,
        parts: int = 1,
        seed: int = 0,
        index: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Images ``x_adv`` like ``x`` in [0, 1].

        Args:
            objective: per-sample scalar to maximise.
            x: ``(N, C, H, W)`` in [0, 1].
            parts: the channels are that many images, each with the whole budget.
            seed: of random starts, where a gradient vanishes.
            index: ``(N,)`` sample indices that these depend on.
        """
        attack = _ATTACKS[self.attack]
        unending = UnendingObjective(objective)
        return attack(unending, x, norm=self.norm, eps=self.eps, steps=self.steps, parts=parts, seed=seed, index=index)


def adversarial_triplets(
    adversary: Adversary,
    metric: PerceptualMetric,
    batch: Triplet,
    target: Target = "reference",
    *,
    seed: int = 0,
    index: Tensor | None = None,
) -> Triplet:
    """Triplets with images moved to where the 2AFC margin speaks most against the votes, as the metric answers now.

    The metric answers in evaluation mode meanwhile, without gradients of its weights; modes and gradients are then as
    they were. A tied vote speaks for no side: its triplet stays.

    Args:
        adversary: how far, and by which attack.
        metric: the metric, in any mode.
        batch: triplets in [0, 1]; images that several of them share move in each on their own.
        target: which images move; "all" gives each of the three the whole budget.
        seed: of what is random in the attack, with the indices of the triplets.
        index: ``(N,)`` whole numbers in place of these indices.
    """
    rows = (batch.right_vote != 0.5).nonzero().flatten()
    if not len(rows):
        return batch
    part, index = batch.select(rows), (batch.index if index is None else index.to(rows.device))[rows]
    with as_attacked(metric):
        answered = TwoAFCObjective(
            metric,
            part.reference,
            part.left,
            part.right,
            target,
            chosen_left=part.right_vote < 0.5,
            check_range=False,  # every batch is checked when it comes
        )
        moved = adversary(answered, answered.images, parts=answered.parts, seed=seed, index=index)
    images: dict[Target, Tensor] = {"reference": batch.reference, "left": batch.left, "right": batch.right}
    names = list(images) if target == "all" else [target]
    for name, tensor in zip(names, moved.chunk(answered.parts, 1), strict=True):
        images[name] = images[name].index_copy(0, rows, tensor)
    return Triplet(images["reference"], images["left"], images["right"], batch.right_vote, batch.index)


@contextmanager
def as_attacked(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, as an attack will meet it, and without gradients of its weights; both restored afterwards.

    Autocast keeps the halves of weights that have gradients, and those that an attack made without a graph would cost
    the training step its own. Its float16 has no room for the gradients of pixels, and is off.
    """
    parameters = list(module.parameters())
    with_gradient = [parameter.requires_grad for parameter in parameters]
    device = parameters[0].device.type if parameters else "cpu"
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with evaluation_mode(module), torch.autocast(device, enabled=False) if narrow else nullcontext():
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, requires_grad in zip(parameters, with_gradient, strict=True):
                parameter.requires_grad_(requires_grad)
