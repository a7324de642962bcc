"""The loop that the attacks share: best points kept, broken samples dropped, the rest aligned with their batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball
from lipsim.utils.errors import LipsimError

_RESTARTS = 1_000  # seeds that a seed has for its restarts


def restart_seed(seed: int, restart: int) -> int:
    """The seed of a restart, another one for each restart of each seed as long as there are no more than 1,000."""
    return seed * _RESTARTS + restart


def sample_index(count: int, index: Tensor | Sequence[int] | None) -> Tensor:
    """Indices ``(count,)`` of samples; None counts them from 0.

    Raises:
        ValueError: another number of indices.
    """
    found = torch.arange(count) if index is None else torch.as_tensor(index).cpu()
    if len(found) != count:
        raise LipsimError(f"expected one index a sample, got {len(found)} for {count} samples")
    return found


class Survivors:
    """The samples of a batch that are not broken yet, as a compact batch, and the best point found of every sample.

    Args:
        objective: of the whole batch.
        x: images ``(N, …)``; a sample that is broken as it is stays as it is.
        index: ``(N,)`` sample indices; None counts the rows.

    Attributes:
        best: ``(N, …)``, the points with the largest objective so far.
        value: ``(N,)``, the objective there.
        rows: ``(M,)``, positions of the survivors in the batch.
        clean: ``(M, …)``, their images.
        index: ``(M,)``, their sample indices.
        objective: on the survivors.
    """

    def __init__(self, objective: Objective, x: Tensor, index: Tensor | Sequence[int] | None = None) -> None:
        self.clean = x.detach()
        self.best = self.clean.clone()
        with torch.no_grad():
            self.value = objective(self.best).detach().nan_to_num(nan=-torch.inf)
        self.objective = objective
        self.rows = torch.arange(len(x), device=x.device)
        self.index = sample_index(len(x), index)
        self._drop(self.value > 0)

    def __len__(self) -> int:
        return len(self.rows)

    def random_start(self, ball: Ball, seed: int, restart: int) -> Tensor:
        """A random point of the ball for each survivor, ``(M, …)``, another one for each restart."""
        return ball.random_point(self.clean, seed=restart_seed(seed, restart), index=self.index)

    def keep(self, x_adv: Tensor, value: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Record a point ``(M, …)`` of each survivor and its objective ``(M,)``; drop those that it breaks.

        Returns:
            The tensors ``(M, …)`` of ``state``, for the samples that are left.
        """
        better = value > self.value[self.rows]
        self.best[self.rows[better]] = x_adv[better]
        self.value[self.rows[better]] = value[better]
        broken = value > 0
        if not broken.any():
            return state
        self._drop(broken)
        return tuple(tensor[~broken] for tensor in state)

    def keep_last(self, x_adv: Tensor) -> None:
        """Record points whose objective is not known yet, at the end of a run."""
        if len(self):
            with torch.no_grad():
                self.keep(x_adv, self.objective(x_adv).detach())

    def _drop(self, broken: Tensor) -> None:
        left = (~broken).nonzero().flatten()
        if len(left) < len(broken):
            self.objective = self.objective.select(left)
            self.rows, self.clean, self.index = self.rows[left], self.clean[left], self.index[left.cpu()]
