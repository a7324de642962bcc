"""The suite: attacks of different kinds in turn, the worst case of each sample, at growing budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipsim.attacks.apgd import apgd
from lipsim.attacks.mi_fgsm import mi_fgsm
from lipsim.attacks.minimal_norm import minimal_norm
from lipsim.attacks.objectives import GradientWatch, Objective
from lipsim.attacks.one_pixel import one_pixel
from lipsim.attacks.pgd import pgd
from lipsim.attacks.projections import Ball, Box, Norm, sample_norm
from lipsim.attacks.square import square
from lipsim.utils.errors import LipsimError

SUITES: dict[Norm, tuple[str, ...]] = {
    2: ("apgd", "minimal_norm", "square"),
    "inf": ("apgd", "square"),
    0: ("apgd", "one_pixel"),
}
ATTACKS: dict[Norm, tuple[str, ...]] = {
    2: ("apgd", "minimal_norm", "square", "pgd", "mi_fgsm"),
    "inf": ("apgd", "square", "pgd", "mi_fgsm"),
    0: ("apgd", "one_pixel", "pgd", "mi_fgsm"),
}
_BY_NAME: dict[str, Callable[..., Tensor]] = {"apgd": apgd, "pgd": pgd, "mi_fgsm": mi_fgsm, "square": square}
_POPULATION = 50
_POLISH = 4


@dataclass(frozen=True)
class SuiteResult:
    """What a suite of attacks left of N samples.

    Attributes:
        broken_at: ``(N,)``, the smallest budget at which any attack broke the sample: ∞ where none did, 0 where it was
            broken as it was.
        by: attack → the same for this attack alone, among the samples that it was given: those that nothing had broken
            before it.
        x_adv: like the images: the point that broke the sample at ``broken_at``, else the best one at the last budget.
        no_gradient: ``(N,)`` bool: attacks with gradients ran, and every gradient that they met was zero or not finite.
            What holds there has been tried by the others alone.
    """

    broken_at: Tensor
    by: dict[str, Tensor]
    x_adv: Tensor
    no_gradient: Tensor


def auto(
    objective: Objective,
    x: Tensor,
    *,
    norm: Norm = 2,
    eps: float | Iterable[float],
    attacks: Sequence[str] | None = None,
    steps: int = 100,
    restarts: int = 1,
    queries: int | None = None,
    box: Box = (0.0, 1.0),
    parts: int = 1,
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> SuiteResult:
    """Run several attacks one after the other at each budget, the smallest first.

    A sample that is broken is broken at every larger budget too, and is not attacked again. The minimal-norm attack
    knows no budget: it runs once on a sample, from the image and from the best point of the attack before it, and in
    its turn breaks the sample at the first budget that the change it found fits into.

    Args:
        objective: per-sample scalar to maximise; ``> 0`` is broken.
        x: images ``(N, C, H, W)``, float32 or float64, inside the box.
        norm: 2, "inf" or 0.
        eps: one or more budgets.
        attacks: names from :data:`ATTACKS`, in the order in which they run; None: :data:`SUITES`, which is APGD,
            minimal norm (ℓ2) and Square, or in ℓ0 APGD and the k-pixel attack.
        steps: of attacks with gradients.
        restarts: of each attack.
        queries: forward passes of attacks without gradients; None: five times ``steps``.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of everything that is random.
        index: ``(N,)`` sample indices that random numbers depend on.
        progress: told what runs next.

    Raises:
        ValueError: a bad norm, budget or box, or an attack that is unknown or does not work in this norm.
    """
    budgets = sorted({float(e) for e in (eps if isinstance(eps, Iterable) else [eps])})
    if not budgets:
        raise LipsimError("expected at least one budget eps, got none")
    for budget in budgets:
        Ball(norm, budget, box, parts).check(x)
    suite = _Suite(
        objective,
        x,
        check_attacks(attacks, norm),
        norm=norm,
        steps=steps,
        queries=5 * steps if queries is None else queries,
        restarts=restarts,
        box=box,
        parts=parts,
        seed=seed,
        index=index,
    )
    for budget in [budget for budget in budgets if budget > 0]:
        for name in suite.by:
            rows = suite.unbroken
            if not len(rows):
                return suite.result()
            if progress is not None:
                progress(f"{name} at ε = {budget:.4g}, {len(rows)} left")
            suite.run(name, budget, rows)
    return suite.result()


def check_attacks(attacks: Sequence[str] | None, norm: Norm) -> tuple[str, ...]:
    """The attacks of a suite by name.

    Raises:
        ValueError: none, one twice, or one that is unknown or does not work in this norm.
    """
    names = SUITES[norm] if attacks is None else tuple(attacks)
    if not names or len(set(names)) < len(names) or not set(names) <= set(ATTACKS[norm]):
        raise LipsimError(f"expected different attacks among {', '.join(ATTACKS[norm])} in norm {norm}, got {names}")
    return names


class _Suite:
    """The attacks, and what is known of each sample while they run."""

    def __init__(
        self,
        objective: Objective,
        x: Tensor,
        names: Sequence[str],
        *,
        norm: Norm,
        steps: int,
        queries: int,
        restarts: int,
        box: Box,
        parts: int,
        seed: int,
        index: Tensor | Sequence[int] | None,
    ) -> None:
        self.objective, self.clean = GradientWatch(objective, len(x), x.device), x.detach()
        self.norm, self.steps, self.queries, self.parts = norm, steps, queries, parts
        self.restarts, self.box, self.seed = restarts, box, seed
        self.index = torch.arange(len(x)) if index is None else torch.as_tensor(index).cpu()
        self.x_adv = self.clean.clone()
        with torch.no_grad():
            broken = self.objective(self.clean) > 0
        self.broken_at = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        self.broken_at[broken] = 0.0
        self.by = {name: self.broken_at.clone() for name in names}
        # Of the minimal-norm attack: where it has been, the smallest change, and the point there.
        self.searched = torch.zeros_like(broken)
        self.least, self.nearest = torch.full_like(self.broken_at, math.inf), self.clean.clone()

    @property
    def unbroken(self) -> Tensor:
        """Positions of the samples that nothing has broken."""
        return torch.isinf(self.broken_at).nonzero().flatten()

    def run(self, name: str, budget: float, rows: Tensor) -> None:
        """One attack on the samples at ``rows``."""
        if name == "minimal_norm":
            self._search(budget, rows[~self.searched[rows]])
            broken = rows[self.least[rows] <= budget]
            self.x_adv[broken] = self.nearest[broken]
            self._claim(name, budget, broken)
            return
        goal, clean = self.objective.select(rows), self.clean[rows]
        options: dict[str, Any] = {"restarts": self.restarts, "box": self.box, "seed": self.seed}
        options["index"] = self.index[rows.cpu()]
        if name == "one_pixel":
            generations = max(self.queries // _POPULATION - 1, 1)
            options |= {"num_pixels": int(budget), "steps": generations, "population": _POPULATION}
            found = one_pixel(goal, clean, **options)
        else:
            options |= {"norm": self.norm, "eps": budget, "parts": self.parts}
            steps = self.queries if name == "square" else self.steps
            found = _BY_NAME[name](goal, clean, steps=steps, **options)
        self.x_adv[rows] = found
        with torch.no_grad():
            broken = goal(found) > 0
        self._claim(name, budget, rows[broken])

    def result(self) -> SuiteResult:
        return SuiteResult(self.broken_at, self.by, self.x_adv, self.objective.no_gradient)

    def _claim(self, name: str, budget: float, rows: Tensor) -> None:
        self.broken_at[rows] = budget
        self.by[name][rows] = budget

    def _search(self, budget: float, rows: Tensor) -> None:
        """The smallest change of each sample: from its image, the best point so far, and random points."""
        if not len(rows):
            return
        clean, goal, index = self.clean[rows], self.objective.select(rows), self.index[rows.cpu()]
        ball = Ball(2, budget, self.box, self.parts)
        seeds = range(self.seed * 1_000 + 1, self.seed * 1_000 + self.restarts)
        starts = [clean, self.x_adv[rows], *(ball.random_point(clean, seed=seed, index=index) for seed in seeds)]
        found = minimal_norm(
            goal,
            clean,
            steps=self.steps,
            box=self.box,
            polish=_POLISH,
            starts=torch.stack(starts),
            parts=self.parts,
            seed=self.seed,
            index=index,
        )
        with torch.no_grad():
            broken = goal(found) > 0
        self.searched[rows] = True
        self.least[rows] = torch.where(broken, sample_norm(found - clean, 2, self.parts).double(), math.inf)
        self.nearest[rows] = found
