"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Box, Norm, ascent_direction, check_budget, expand, project_to_budget, sample_norm
from lipsim.attacks.random import sample_normal


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
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Maximise an objective within a ball by normalised gradient steps, the best point of all steps kept.

    The first run starts at ``x`` (at a random point where the gradient vanishes), the others at random points of the
    ball. A sample is dropped from the computation as soon as it is broken (``objective > 0``).

    Args:
        objective: per-sample scalar to maximise.
        x: images ``(N, 3, H, W)``, float32 or float64, inside the box.
        norm: 2 or "inf".
        eps: budget, the largest norm of ``x_adv − x``.
        steps: gradient steps of a run.
        step_size: length of the first step, decayed to a tenth by a cosine; None: ``2.5·eps/steps``, whose steps add up
            to 1.4 times the radius of the ball.
        restarts: runs.
        box: the range of valid images; None for all of ℝⁿ.
        seed: of the random starts.
        index: ``(N,)`` sample indices that the random starts depend on.

    Returns:
        ``x_adv`` like ``x``, with the best objective found; ``x`` itself where ``eps`` is 0.

    Raises:
        ValueError: an unknown norm or a negative budget.
    """
    check_budget(norm, eps)
    best = x.detach().clone()
    if eps == 0 or steps < 1:
        return best
    indices = torch.arange(len(x)) if index is None else torch.as_tensor(index).cpu()
    with torch.no_grad():
        best_value = objective(best).detach()
    size = 2.5 * eps / steps if step_size is None else step_size
    for restart in range(restarts):
        rows = (best_value <= 0).nonzero().flatten()
        if not len(rows):
            break
        clean, goal = x[rows].detach(), objective.select(rows)
        start = _random_start(clean, norm, eps, box, seed * 1_000 + restart, indices[rows.cpu()])
        current = clean if restart == 0 else start
        alive = torch.arange(len(rows), device=x.device)
        for step in range(steps + 1):
            value, gradient = _value_and_gradient(goal, current)
            improved = value > best_value[rows[alive]]
            best[rows[alive[improved]]] = current[improved]
            best_value[rows[alive[improved]]] = value[improved]
            left = value <= 0
            if step == steps or not left.any():
                break
            if not left.all():
                goal, alive = goal.select(left.nonzero().flatten()), alive[left]
                current, gradient = current[left], gradient[left]
            direction = ascent_direction(gradient, norm)
            # A stationary start (identical images, a dead region) gives no direction: leave it at random.
            stuck = expand(sample_norm(gradient) == 0, current)
            decay = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
            moved = torch.where(stuck, start[alive], current + size * decay * direction)
            current = project_to_budget(moved, clean[alive], norm, eps, box)
    return best


def _value_and_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = objective(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def _random_start(x: Tensor, norm: Norm, eps: float, box: Box, seed: int, index: Tensor) -> Tensor:
    noise = sample_normal(x, seed=seed, index=index)
    if norm == "inf":
        delta = eps * torch.erf(noise / 2**0.5)  # uniform in the cube
    else:
        delta = eps * noise / expand(sample_norm(noise), noise)
    return project_to_budget(x + delta, x, norm, eps, box)
