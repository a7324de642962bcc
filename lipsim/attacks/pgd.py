"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective, value_and_gradient
from lipsim.attacks.projections import Ball, Box, Norm, expand, sample_norm
from lipsim.attacks.survivors import Survivors


def pgd(
    objective: Objective,
    x: Tensor,
    *,
    norm: Norm = 2,
    eps: float,
    steps: int = 100,
    step_size: float | None = None,
    restarts: int = 1,
    box: Box = (0.0, 1.0),
    parts: int = 1,
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Maximise an objective within a ball by normalised gradient steps, the best point of all steps kept.

    The first run starts at ``x`` (at a random point where the gradient vanishes), the others at random points of the
    ball. A sample is dropped from the computation as soon as it is broken (``objective > 0``). In ℓ0 each step is
    followed by the projection of Croce & Hein 2019.

    Args:
        objective: per-sample scalar to maximise.
        x: images ``(N, C, H, W)``, float32 or float64, inside the box.
        norm: 2, "inf" or 0.
        eps: budget, the largest norm of ``x_adv − x``; in ℓ0 a number of pixels.
        steps: forward and backward passes of a run; one more forward pass looks at its last point.
        step_size: length of the first step, decayed to a tenth by a cosine; None: :meth:`Ball.step_size`, whose steps
            add up to 1.4 times the radius of the ball.
        restarts: runs.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of the random starts.
        index: ``(N,)`` sample indices that the random starts depend on.

    Returns:
        ``x_adv`` like ``x``, with the best objective found; ``x`` itself where ``eps`` is 0.

    Raises:
        ValueError: a bad norm, budget or box, or an objective without a gradient.
    """
    ball = Ball(norm, eps, box, parts)
    ball.check(x)
    if eps == 0 or steps < 1:
        return x.detach().clone()
    size = ball.step_size(steps) if step_size is None else step_size
    batch = Survivors(objective, x, index)
    for restart in range(restarts):
        start = batch.random_start(ball, seed, restart)
        current = batch.clean if restart == 0 else start
        for step in range(steps):
            if not len(batch):
                return batch.best
            value, gradient = value_and_gradient(batch.objective, current)
            current, gradient, start = batch.keep(current, value, current, gradient, start)
            decay = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
            moved = current + size * decay * ball.direction(gradient)
            # A stationary start (identical images, a dead region) gives no direction: leave it at random.
            stuck = expand(sample_norm(gradient) == 0, current)
            current = ball.project(torch.where(stuck, start, moved), batch.clean)
        batch.keep_last(current)
    return batch.best
