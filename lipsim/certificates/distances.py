"""Bounds on one distance under perturbation; notation as in :mod:`lipsim.certificates`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import one_minus_cos, rotation, unit_angle
from lipsim.certificates.numbers import check_constants, check_number
from lipsim.certificates.rounding import anchored, bounded_norm, over_bound, round_down, round_up, rounding_error


def distance_interval(
    z: Tensor,
    y: Tensor,
    eps: Tensor | float,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    eps_other: Tensor | float = 0.0,
    feature_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Interval ``(lower, upper)`` of the distance when ``x`` moves by at most ``eps`` (and ``y`` by ``eps_other``).

    ``[1 − cos(max(0, θ − α)), 1 − cos(min(π, θ + α))]``, ``(N,)`` each; the two angles ``α`` add up when both move.

    Raises:
        ValueError: a budget is negative, or budgets have more dimensions than the distances.

    Example:
        >>> z, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> lower, upper = distance_interval(z, y, 0.5, anchor=0.0)  # 0.5 turns a unit vector by at most 30°
        >>> print(f"{lower.item():.4f} {upper.item():.4f}")  # 1 - cos 60°, 1 - cos 120°
        0.5000 1.5000
    """
    check_constants(anchor, lipschitz, feature_error)
    dtype, (e, other) = anchored(anchor, z, y)
    rounding = rounding_error(z)
    theta = unit_angle(e.unit, other.unit)
    turn = torch.full_like(theta, rounding)
    for features, budget in ((e, eps), (other, eps_other)):
        if isinstance(budget, str):
            raise LipsimError(f"expected budgets eps ≥ 0, as numbers, got {budget!r}")
        budget = torch.as_tensor(budget, dtype=theta.dtype, device=theta.device)
        if budget.ndim > theta.ndim:  # (N, 1) would make (N, N) of N intervals
            raise LipsimError(f"expected one budget or one a pair {tuple(theta.shape)}, got {tuple(budget.shape)}")
        if (budget < 0).any():
            raise LipsimError(f"expected budgets eps ≥ 0, got {float(budget.min())}")
        moved = lipschitz * budget if math.isfinite(lipschitz) else torch.where(budget > 0, math.inf, 0.0)
        turn = turn + rotation(bounded_norm(features, anchor), (moved + feature_error) * (1 + rounding))
    lower = one_minus_cos((theta - turn).clamp(min=0))
    upper = one_minus_cos((theta + turn).clamp(max=math.pi))
    unknown = torch.isnan(theta) | torch.isnan(turn)
    lower, upper = torch.where(unknown, 0.0, lower), torch.where(unknown, 2.0, upper)
    return round_down(lower, dtype), round_up(upper, dtype).clamp(max=2)


def threshold_radius(
    z: Tensor, y: Tensor, threshold: float, *, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which the answer to "is ``d(x, y) ≤ threshold``?" stays when ``x`` moves, ``(N,)``.

    ``‖e‖·sin(min(|θ_τ − θ|, π/2))/L`` with ``θ_τ = arccos(1 − τ)``.

    Raises:
        ValueError: the threshold is outside [0, 2].

    Example:
        >>> z, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> print(f"{threshold_radius(z, y, 0.5, anchor=0.0).item():.4f}")  # from 90° to 60°: sin 30°
        0.5000
    """
    threshold = check_number("threshold in [0, 2], the range of the distance,", threshold, 0, 2)
    check_constants(anchor, lipschitz, feature_error)
    dtype, (e, other) = anchored(anchor, z, y)
    rounding = rounding_error(z)
    boundary = threshold_angle(threshold)
    turn = rotation(bounded_norm(other, anchor), feature_error * (1 + rounding)) + rounding
    free = ((unit_angle(e.unit, other.unit) - boundary).abs() - turn).clamp(min=0, max=math.pi / 2)
    reach = bounded_norm(e, anchor) * torch.sin(free) * (1 - rounding) - feature_error
    return round_down(over_bound(reach.clamp(min=0), lipschitz), dtype)


def threshold_angle(threshold: float) -> float:
    """``θ_τ = arccos(1 − τ)``, with the digits of thresholds near 0 and near 2."""
    return 2 * math.atan2(math.sqrt(threshold), math.sqrt(2 - threshold))
