"""The loop of PGD and MI-FGSM: steps of given lengths along what the gradients add up to, within a ball."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective, value_and_gradient
from lipsim.attacks.projections import Ball, expand
from lipsim.attacks.survivors import Survivors

Accumulate = Callable[[Tensor, Tensor], Tensor]


def ascend(
    objective: Objective,
    x: Tensor,
    ball: Ball,
    lengths: Sequence[float],
    accumulate: Accumulate,
    *,
    restarts: int,
    seed: int,
    index: Tensor | Sequence[int] | None,
) -> Tensor:
    """Maximise an objective by steps of given lengths, each projected back to the ball; the best point of all is kept.

    Args:
        objective: per-sample scalar to maximise.
        x: images ``(N, C, H, W)`` inside the box of the ball.
        ball: what may be reached.
        lengths: of the steps, one each.
        accumulate: (what it gave at the step before, zeros at first; gradient) → where to go, each like ``x``.
        restarts: runs; the first starts at ``x``, the others at random points.
        seed: of the random points.
        index: ``(N,)`` sample indices that the random points depend on.

    Raises:
        ValueError: images outside the box, or an objective without a gradient.
    """
    ball.check(x)
    if ball.eps == 0 or not lengths:
        return x.detach().clone()
    batch = Survivors(objective, x, index)
    for restart in range(restarts):
        start = batch.random_start(ball, seed, restart)
        current = batch.clean if restart == 0 else start
        total = torch.zeros_like(current)
        for length in lengths:
            if not len(batch):
                return batch.best
            value, gradient = value_and_gradient(batch.objective, current)
            current, gradient, start, total = batch.keep(current, value, current, gradient, start, total)
            total = accumulate(total, gradient)
            moved = current + length * ball.direction(total)
            # A stationary start (identical images, a dead region) gives no direction: leave it at random.
            stuck = expand(~total.flatten(1).any(1), current)
            current = ball.project(torch.where(stuck, start, moved), batch.clean)
        batch.keep_last(current)
    return batch.best
