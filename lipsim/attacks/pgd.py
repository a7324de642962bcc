"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lipsim.attacks.ascent import ascend
from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball, Box, Norm


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

    Costs a sample ``1 + restarts·(steps + 1)`` forward and ``restarts·steps`` backward passes, fewer once it is broken.
    What is random depends on ``(seed, index of the sample)`` alone.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks"; ℓ0: Croce & Hein 2019,
    "Sparse and imperceivable adversarial attacks".

    Args:
        objective: per-sample scalar to maximise.
        x: images ``(N, C, H, W)``, float32 or float64, inside the box.
        norm: 2, "inf" or 0.
        eps: budget, the largest norm of ``x_adv − x``; in ℓ0 a number of pixels.
        steps: gradient steps of a run; one more forward pass looks at its last point.
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

    Example:
        >>> import torch
        >>> from lipsim.attacks import DistanceObjective
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> brighter = DistanceObjective(lambda x, y: (x - y).sum((1, 2, 3)), x, threshold=9)  # linear, slope √12
        >>> x_adv = pgd(brighter, x, eps=0.1)
        >>> print(f"{(x_adv - x).norm():.3f} {(x_adv - x).sum():.3f}")  # straight up the slope
        0.100 0.346
    """
    ball = Ball(norm, eps, box, parts)
    size = ball.step_size(steps) if step_size is None else step_size
    lengths = [size * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2) for step in range(steps)]
    return ascend(objective, x, ball, lengths, _latest, restarts=restarts, seed=seed, index=index)


def _latest(_total: Tensor, gradient: Tensor) -> Tensor:
    """Each step follows its own gradient."""
    return gradient
