"""The attacks that are known by name: what each one needs, and how it is called in a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipsim.attacks.apgd import apgd
from lipsim.attacks.mi_fgsm import mi_fgsm
from lipsim.attacks.minimal_norm import minimal_norm
from lipsim.attacks.objectives import Objective
from lipsim.attacks.one_pixel import one_pixel
from lipsim.attacks.pgd import pgd
from lipsim.attacks.projections import NORMS, Ball, Box, Norm, check_norm
from lipsim.attacks.square import square
from lipsim.attacks.survivors import restart_seed
from lipsim.utils.errors import LipsimError

_POPULATION = 50  # of the k-pixel attack in a suite
_POLISH = 4  # steps of the minimal-norm attack in a suite


@dataclass(frozen=True)
class Task:
    """What a suite asks of an attack at one budget.

    Attributes:
        norm: 2, "inf" or 0.
        eps: the budget.
        steps: gradient steps of a run, of attacks with gradients.
        queries: forward passes of a run, of attacks without.
        restarts: runs.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of everything that is random.
        index: ``(N,)`` sample indices that random numbers depend on.
        best: like the images, the best point of the attack before this one.
    """

    norm: Norm
    eps: float
    steps: int
    queries: int
    restarts: int
    box: Box
    parts: int
    seed: int
    index: Tensor
    best: Tensor

    @property
    def options(self) -> dict[str, Any]:
        """What every attack with restarts takes."""
        return {"restarts": self.restarts, "box": self.box, "seed": self.seed, "index": self.index}


@dataclass(frozen=True)
class Attack:
    """An attack by name.

    Attributes:
        name: of the function in :mod:`lipsim.attacks`.
        title: in tables.
        norms: in which it works.
        gradients: it climbs by gradients of the objective, ``Task.steps`` of them; else it asks for values alone,
            ``Task.queries`` of them.
        budget: it works within a budget. Else it looks for the smallest change, once for each sample, and breaks the
            sample at every budget that this change fits into.
        in_suite: it is part of :func:`suite`.
        attack: (objective, images, task) → ``x_adv``.
    """

    name: str
    title: str
    norms: tuple[Norm, ...]
    gradients: bool
    budget: bool
    in_suite: bool
    attack: Callable[[Objective, Tensor, Task], Tensor]


def _with_steps(function: Callable[..., Tensor]) -> Callable[[Objective, Tensor, Task], Tensor]:
    """An attack whose ``steps`` are gradient steps."""

    def attack(objective: Objective, x: Tensor, task: Task) -> Tensor:
        return function(objective, x, norm=task.norm, eps=task.eps, steps=task.steps, parts=task.parts, **task.options)

    return attack


def _square(objective: Objective, x: Tensor, task: Task) -> Tensor:
    return square(objective, x, norm=task.norm, eps=task.eps, steps=task.queries, parts=task.parts, **task.options)


def _pixels(objective: Objective, x: Tensor, task: Task) -> Tensor:
    population = max(4, min(_POPULATION, task.queries // 2))
    generations = max(task.queries // population - 1, 1)  # the first members are looked at too
    return one_pixel(
        objective,
        x,
        num_pixels=int(task.eps),
        generations=generations,
        population=population,
        parts=task.parts,
        **task.options,
    )


def _smallest(objective: Objective, x: Tensor, task: Task) -> Tensor:
    """From the image, the best point so far, and random points of the ball."""
    ball = Ball(task.norm, task.eps, task.box, task.parts)
    seeds = [restart_seed(task.seed, restart) for restart in range(1, task.restarts)]
    starts = [x, task.best, *(ball.random_point(x, seed=seed, index=task.index) for seed in seeds)]
    return minimal_norm(
        objective,
        x,
        steps=task.steps,
        box=task.box,
        polish=_POLISH,
        starts=torch.stack(starts),
        parts=task.parts,
        seed=task.seed,
        index=task.index,
    )


ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("apgd", "APGD", NORMS, gradients=True, budget=True, in_suite=True, attack=_with_steps(apgd)),
        Attack("minimal_norm", "minimal norm", (2,), gradients=True, budget=False, in_suite=True, attack=_smallest),
        Attack("square", "Square", (2, "inf"), gradients=False, budget=True, in_suite=True, attack=_square),
        Attack("one_pixel", "one pixel", (0,), gradients=False, budget=True, in_suite=True, attack=_pixels),
        Attack("pgd", "PGD", NORMS, gradients=True, budget=True, in_suite=False, attack=_with_steps(pgd)),
        Attack("mi_fgsm", "MI-FGSM", NORMS, gradients=True, budget=True, in_suite=False, attack=_with_steps(mi_fgsm)),
    )
}
"""The attacks by name, in the order in which a suite runs them and tables show them."""


def attacks_in(norm: Norm) -> tuple[str, ...]:
    """Names of the attacks that work in a norm.

    Raises:
        ValueError: an unknown norm.
    """
    check_norm(norm)
    return tuple(attack.name for attack in ATTACKS.values() if norm in attack.norms)


def suite(norm: Norm) -> tuple[str, ...]:
    """Names of the attacks that :func:`lipsim.attacks.auto` runs in a norm where none are named.

    Raises:
        ValueError: an unknown norm.
    """
    return tuple(name for name in attacks_in(norm) if ATTACKS[name].in_suite)


def check_attacks(attacks: Sequence[str] | None, norm: Norm) -> tuple[str, ...]:
    """The attacks of a suite by name.

    Raises:
        ValueError: an unknown norm, no attack, one twice, or one that is unknown or does not work in this norm.
    """
    known = attacks_in(norm)
    names = suite(norm) if attacks is None else tuple(attacks)
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise LipsimError(f"expected different attacks among {', '.join(known)} in norm {norm}, got {names}")
    return names
