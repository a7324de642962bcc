"""Auto-PGD (Croce & Hein 2020) on a raw margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective, value_and_gradient
from lipsim.attacks.projections import Ball, Box, Norm, expand
from lipsim.attacks.survivors import Survivors

_MOMENTUM = 0.75
_SUCCESSES = 0.75  # share of the steps between two checkpoints that must increase the objective


def apgd(
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
    """Maximise an objective within a ball by gradient steps with momentum whose length adapts to each sample.

    At checkpoints that come ever closer, a sample whose objective has not grown in three of four steps, or has found no
    better point at an unchanged step size, goes on from its best point with half the step size.

    The authors' code differs: its first run starts at random, its first step is a diameter, a checkpoint at which just
    three of four steps helped counts as slow (the paper's condition does not), checkpoints are rounded down, and the
    jump back to the best point carries momentum.

    Costs a sample ``1 + restarts·(steps + 1)`` forward and ``restarts·steps`` backward passes, fewer once it is broken.
    What is random depends on ``(seed, index of the sample)`` alone.

    Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", Algorithm 1; ℓ0: the projection of Croce & Hein 2019.

    Args:
        objective: per-sample scalar to maximise.
        x: images ``(N, C, H, W)``, float32 or float64, inside the box.
        norm: 2, "inf" or 0.
        eps: budget, the largest norm of ``x_adv − x``; in ℓ0 a number of pixels.
        steps: gradient steps of a run; one more forward pass looks at its last point.
        step_size: length of the first step; None: the radius of the ball (:meth:`Ball.step_size` in ℓ0). The published
            diameter leaves higher scores on trained metrics, most of all after few steps.
        restarts: runs; the first starts at ``x``, the others at random points.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of the random starts.
        index: ``(N,)`` sample indices that the random starts depend on.

    Returns:
        ``x_adv`` like ``x``, with the best objective found; ``x`` itself where ``eps`` is 0.

    Raises:
        ValueError: a bad norm, budget or box, or an objective without a gradient.

    Example:
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> brighter = DistanceObjective(lambda x, y: (x - y).sum((1, 2, 3)), x, threshold=9)  # linear, slope √12
        >>> x_adv = apgd(brighter, x, eps=0.1)
        >>> print(f"{(x_adv - x).norm():.3f} {(x_adv - x).sum():.3f}")  # straight up the slope
        0.100 0.346
    """
    ball = Ball(norm, eps, box, parts)
    ball.check(x)
    if eps == 0 or steps < 1:
        return x.detach().clone()
    if step_size is None:
        step_size = ball.step_size(steps) if norm == 0 else eps
    batch = Survivors(objective, x, index)
    for restart in range(restarts):
        if not len(batch):
            break
        start = batch.random_start(ball, seed, restart)
        _run(batch, ball, steps, step_size, start, batch.clean if restart == 0 else start)
    return batch.best


def _run(batch: Survivors, ball: Ball, steps: int, step_size: float, start: Tensor, current: Tensor) -> None:
    previous = top = current
    top_gradient = torch.zeros_like(current)
    top_value = torch.full_like(batch.value[batch.rows], -math.inf)
    last_value, top_before = -top_value, top_value  # of the step before, and at the checkpoint before
    size = torch.full_like(top_value, step_size, dtype=current.dtype)
    gains, halved = torch.zeros_like(top_value), torch.zeros_like(top_value)
    checkpoints, passed = _checkpoints(steps), 0
    for step in range(steps):
        value, gradient = value_and_gradient(batch.objective, current)
        gains = gains + (value > last_value)
        better = value > top_value
        top = torch.where(expand(better, top), current, top)
        top_gradient = torch.where(expand(better, top), gradient, top_gradient)
        top_value = torch.where(better, value, top_value)
        images = (current, previous, start, gradient, top, top_gradient)
        left = batch.keep(current, value, *images, value, top_value, top_before, size, gains, halved)
        if not len(batch):
            return
        current, previous, start, gradient, top, top_gradient = left[:6]
        value, top_value, top_before, size, gains, halved = left[6:]
        if step in checkpoints:
            slow = gains < _SUCCESSES * (step - passed)
            idle = (halved == 0) & (top_value <= top_before)
            halve = slow | idle
            size = torch.where(halve, size / 2, size)
            back = expand(halve, current)
            current, previous = torch.where(back, top, current), torch.where(back, top, previous)
            gradient = torch.where(back, top_gradient, gradient)
            value = torch.where(halve, top_value, value)
            top_before, halved, gains, passed = top_value, halve.to(halved), torch.zeros_like(gains), step
        moved = ball.project(current + expand(size, current) * ball.direction(gradient), batch.clean)
        if step:
            momentum = _MOMENTUM * (moved - current) + (1 - _MOMENTUM) * (current - previous)
            moved = ball.project(current + momentum, batch.clean)
        # A stationary point gives no direction: leave it at random.
        stuck = expand(~gradient.flatten(1).any(1), current)
        previous, current, last_value = current, torch.where(stuck, start, moved), value
    batch.keep_last(current)


def _checkpoints(steps: int) -> set[int]:
    """Steps at which step sizes may change: after 22 % of all, then at intervals that shrink by 3 % down to 6 %."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:] if share < 1}
