"""The suite: attacks of different kinds in turn, the worst case of each sample, at growing budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball, Box, Norm, sample_norm
from lipsim.attacks.registry import ATTACKS, Task, check_attacks
from lipsim.attacks.survivors import sample_index
from lipsim.attacks.watch import Passes, WatchedObjective
from lipsim.certificates.numbers import check_count
from lipsim.utils.errors import LipsimError


@dataclass(frozen=True)
class SuiteResult:
    """What a suite of attacks left of N samples.

    Attributes:
        broken_at: ``(N,)``, the smallest budget at which any attack broke the sample: ∞ where none did, 0 where it was
            broken as it was.
        by: attack → the same for this attack alone, among the samples that it was given: those that nothing had broken
            before it.
        x_adv: like the images: the point that broke the sample at ``broken_at``, else that with the largest objective
            of all that attacks handed on, within the last budget; the image itself where nothing raised it.
        no_gradient: ``(N,)`` bool: attacks with gradients ran, and every gradient that they met was zero or not finite.
            What holds there has been tried by the others alone.
        passes: forward and backward passes of each sample, with the looks at its clean image and at what attacks found.
        passes_by: attack → those of this attack. The minimal-norm attack goes on until every sample that it got has
            settled, so that its share depends on the batch.
    """

    broken_at: Tensor
    by: dict[str, Tensor]
    x_adv: Tensor
    no_gradient: Tensor
    passes: Passes
    passes_by: dict[str, Passes]


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

    Costs a sample one forward pass, and at each budget until it is broken what its attacks cost
    (:attr:`SuiteResult.passes` says what that was). What is random depends on ``(seed, index of the sample)`` alone.

    Source: the idea, APGD and Square are of AutoAttack (Croce & Hein 2020, "Reliable evaluation of adversarial
    robustness with an ensemble of diverse parameter-free attacks"); its losses and other attacks are of classifiers.

    Args:
        objective: per-sample scalar to maximise; ``> 0`` is broken.
        x: images ``(N, C, H, W)``, float32 or float64, inside the box.
        norm: 2, "inf" or 0.
        eps: one or more budgets.
        attacks: names from :data:`lipsim.attacks.registry.ATTACKS`, in the order in which they run; None: APGD, minimal
            norm (ℓ2) and Square, or in ℓ0 APGD and the k-pixel attack.
        steps: gradient steps of each run of attacks with gradients.
        restarts: runs of each attack.
        queries: forward passes of each run of attacks without gradients; None: five times ``steps``.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of everything that is random.
        index: ``(N,)`` sample indices that random numbers depend on.
        progress: told what runs next.

    Raises:
        ValueError: a bad norm, budget or box, no step, run or query, or an attack that is unknown or does not work in
            this norm.
    """
    check_effort(steps, restarts, queries)
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


def check_effort(steps: int, restarts: int, queries: int | None) -> None:
    """Refuse attacks that would do nothing: a score under them would be the natural one.

    Raises:
        ValueError: no step, run or query.
    """
    for name, value in (("steps", steps), ("restarts", restarts), ("queries", queries)):
        if value is not None:
            check_count(name, value)


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
        self.objective, self.clean = WatchedObjective(objective, x), x.detach()
        self.norm, self.steps, self.queries, self.parts = norm, steps, queries, parts
        self.restarts, self.box, self.seed = restarts, box, seed
        self.index = sample_index(len(x), index)
        self.x_adv = self.clean.clone()
        # What the attack before handed on, better or not: where the minimal-norm attack starts besides the image.
        self.latest = self.clean.clone()
        with torch.no_grad():
            value = self.objective(self.clean).detach()
        self.value = value.nan_to_num(nan=-math.inf)  # at x_adv
        broken = value > 0
        self.broken_at = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        self.broken_at[broken] = 0.0
        self.by = {name: self.broken_at.clone() for name in names}
        self.passes_by = {name: Passes.none(len(x), x.device) for name in names}
        self.smallest = {name: _Smallest.unknown(self.clean) for name in names if not ATTACKS[name].budget}

    @property
    def unbroken(self) -> Tensor:
        """Positions of the samples that nothing has broken."""
        return torch.isinf(self.broken_at).nonzero().flatten()

    def run(self, name: str, budget: float, rows: Tensor) -> None:
        """One attack on the samples at ``rows``."""
        before = self.objective.passes
        if name in self.smallest:
            broken = self._fit(name, budget, rows)
        else:
            found, value = self._attack(name, budget, rows)
            self.latest[rows] = found
            better = value > self.value[rows]
            self.x_adv[rows[better]], self.value[rows[better]] = found[better], value[better]
            broken = rows[value > 0]
        self.passes_by[name] += self.objective.passes - before
        self.broken_at[broken] = budget
        self.by[name][broken] = budget

    def result(self) -> SuiteResult:
        watched = self.objective
        return SuiteResult(self.broken_at, self.by, self.x_adv, watched.no_gradient, watched.passes, self.passes_by)

    def _attack(self, name: str, budget: float, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What an attack makes of the samples at ``rows``, and the objective there."""
        goal = self.objective.select(rows)
        task = Task(
            norm=self.norm,
            eps=budget,
            steps=self.steps,
            queries=self.queries,
            restarts=self.restarts,
            box=self.box,
            parts=self.parts,
            seed=self.seed,
            index=self.index[rows.cpu()],
            best=self.latest[rows],
        )
        found = ATTACKS[name].attack(goal, self.clean[rows], task)
        with torch.no_grad():
            return found, goal(found).detach()

    def _fit(self, name: str, budget: float, rows: Tensor) -> Tensor:
        """Those of ``rows`` whose smallest change fits into the budget; looked for where it has not been."""
        known = self.smallest[name]
        new = rows[~known.searched[rows]]
        if len(new):
            found, value = self._attack(name, budget, new)
            length = sample_norm(found - self.clean[new], self.norm, self.parts).double()
            known.searched[new] = True
            known.length[new] = torch.where(value > 0, length, math.inf)
            known.x_adv[new] = found
        broken = rows[known.length[rows] <= budget]
        self.x_adv[broken] = known.x_adv[broken]
        return broken


@dataclass(frozen=True)
class _Smallest:
    """Of an attack without a budget: which samples it has seen, the smallest change of each, and the point there."""

    searched: Tensor
    length: Tensor
    x_adv: Tensor

    @classmethod
    def unknown(cls, clean: Tensor) -> _Smallest:
        count = len(clean)
        searched = torch.zeros(count, dtype=torch.bool, device=clean.device)
        length = torch.full((count,), math.inf, dtype=torch.float64, device=clean.device)
        return cls(searched, length, clean.clone())
