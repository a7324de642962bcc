"""Adversarial training: what moves the images before each step (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lipsim.attacks.mi_fgsm import mi_fgsm
from lipsim.attacks.objectives import Objective, UnendingObjective
from lipsim.attacks.pgd import pgd
from lipsim.attacks.projections import Ball, Norm
from lipsim.utils.errors import LipsimError

_ATTACKS = {"pgd": pgd, "mi_fgsm": mi_fgsm}


@dataclass(frozen=True)
class Adversary:
    """Moves images within a budget to where an objective is largest, all steps long.

    One step of training costs ``steps + 2`` forward and ``steps`` backward passes more than without.

    Args:
        norm: 2 or "inf".
        eps: budget, in units of images in [0, 1].
        steps: gradient steps.
        attack: "pgd" or "mi_fgsm", of :mod:`lipsim.attacks`.

    Raises:
        ValueError: a bad norm or budget, an unknown attack, or no step.

    Example:
        >>> Adversary(norm="inf", eps=8 / 255).steps
        7
    """

    norm: Norm = 2
    eps: float = 0.5
    steps: int = 7
    attack: Literal["pgd", "mi_fgsm"] = "pgd"

    def __post_init__(self) -> None:
        if self.attack not in _ATTACKS:
            raise LipsimError(f"expected the attack to be one of {', '.join(_ATTACKS)}, got {self.attack!r}")
        if self.norm not in (2, "inf") or self.steps < 1:
            raise LipsimError(f"expected norm 2 or inf and at least 1 step, got norm {self.norm} and {self.steps}")
        Ball(self.norm, self.eps, (0.0, 1.0))  # checks the budget

    def __call__(self, objective: Objective, x: Tensor, *, parts: int = 1, seed: int = 0) -> Tensor:
        """Images ``x_adv`` like ``x`` in [0, 1].

        Args:
            objective: per-sample scalar to maximise.
            x: ``(N, C, H, W)`` in [0, 1].
            parts: the channels are that many images, each with the whole budget.
            seed: of random starts, where a gradient vanishes.
        """
        attack = _ATTACKS[self.attack]
        unending = UnendingObjective(objective)
        return attack(unending, x, norm=self.norm, eps=self.eps, steps=self.steps, parts=parts, seed=seed)
