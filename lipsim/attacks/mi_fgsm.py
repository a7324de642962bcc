"""Momentum iterative FGSM (Dong et al. 2018), also called MIA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.ascent import ascend
from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball, Box, Norm, expand


def mi_fgsm(
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
    decay: float = 1.0,
) -> Tensor:
    """Maximise an objective within a ball along accumulated gradients, the best point of all steps kept.

    Gradients are divided by their mean absolute value and added up; each step has the same length. The published steps
    of ``eps/steps`` reach the sphere only where all of them agree; those here add up to 2.5 times its radius.

    Costs a sample ``1 + restarts·(steps + 1)`` forward and ``restarts·steps`` backward passes, fewer once it is broken.
    What is random depends on ``(seed, index of the sample)`` alone.

    Source: Dong et al. 2018, "Boosting adversarial attacks with momentum", Algorithm 1.

    Args:
        objective: per-sample scalar to maximise.
        x: images ``(N, C, H, W)``, float32 or float64, inside the box.
        norm: 2 or "inf", or 0 as in :func:`lipsim.attacks.pgd`.
        eps: budget, the largest norm of ``x_adv − x``; in ℓ0 a number of pixels.
        steps: gradient steps of a run; one more forward pass looks at its last point.
        step_size: None: :meth:`Ball.step_size`.
        restarts: runs; the first starts at ``x``, the others at random points.
        box: the range of valid images; None for all of ℝⁿ.
        parts: the channels are that many images, each with a budget of its own.
        seed: of the random starts.
        index: ``(N,)`` sample indices that the random starts depend on.
        decay: of the accumulated gradient from step to step, ``μ``.

    Returns:
        ``x_adv`` like ``x``, with the best objective found; ``x`` itself where ``eps`` is 0.

    Raises:
        ValueError: a bad norm, budget or box, or an objective without a gradient.

    Example:
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> brighter = DistanceObjective(lambda x, y: (x - y).sum((1, 2, 3)), x, threshold=9)  # linear, slope √12
        >>> x_adv = mi_fgsm(brighter, x, eps=0.1)
        >>> print(f"{(x_adv - x).norm():.3f} {(x_adv - x).sum():.3f}")  # straight up the slope
        0.100 0.346
    """
    ball = Ball(norm, eps, box, parts)
    size = ball.step_size(steps) if step_size is None else step_size

    def accumulate(momentum: Tensor, gradient: Tensor) -> Tensor:
        scale = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
        return decay * momentum + gradient / expand(scale, gradient)

    return ascend(objective, x, ball, [size] * steps, accumulate, restarts=restarts, seed=seed, index=index)
