"""Balls, boxes and steepest-ascent directions, per sample."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Norm = Literal[2, "inf"]
Box = tuple[float, float] | None


def check_budget(norm: Norm, eps: float) -> None:
    """Refuse budgets that no attack understands.

    Raises:
        ValueError: an unknown norm, or an ``eps`` that is negative or not finite.
    """
    if norm not in (2, "inf"):
        raise ValueError(f"expected norm 2 or 'inf', got {norm!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"expected a finite budget eps ≥ 0, got {eps}")


def sample_norm(delta: Tensor, norm: Norm = 2) -> Tensor:
    """Norm of each sample, ``(N, …)`` to ``(N,)``."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=math.inf if norm == "inf" else 2, dim=1)


def expand(scalar: Tensor, like: Tensor) -> Tensor:
    """``(N,)`` viewed as ``(N, 1, 1, 1)`` to broadcast over ``like``."""
    return scalar.view(-1, *([1] * (like.ndim - 1)))


def ascent_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Unit-norm direction that increases fastest; 0 where the gradient vanishes."""
    if norm == "inf":
        return gradient.sign()
    # Scaled by the largest entry first: squares of small float32 gradients underflow.
    gradient = gradient / expand(sample_norm(gradient, "inf").clamp(min=torch.finfo(gradient.dtype).tiny), gradient)
    return gradient / expand(sample_norm(gradient).clamp(min=torch.finfo(gradient.dtype).tiny), gradient)


def project_to_budget(x_adv: Tensor, x: Tensor, norm: Norm, eps: float, box: Box) -> Tensor:
    """Nearest point of the ball around ``x``, then of the box; since ``x`` is in the box, this stays in the ball."""
    delta = x_adv - x
    if norm == "inf":
        delta = delta.clamp(-eps, eps)
    else:
        length = sample_norm(delta)
        delta = delta * expand(torch.where(length > eps, eps / length.clamp(min=1e-38), torch.ones_like(length)), delta)
    return x + delta if box is None else (x + delta).clamp(*box)
