"""Reciprocals for rescaled weights: rounded down, and 0 where there is nothing to divide by."""

from __future__ import annotations

import torch
from torch import Tensor


def reciprocal(values: Tensor, ulps: int = 16) -> Tensor:
    """``1/values``, of the same shape, rounded down.

    Args:
        values: at least 0. Where they vanish the result and its gradient are 0 and not infinite or NaN.
        ulps: units in the last place by which they are enlarged before, for the rounding of the sums that they are.
    """
    positive, enlarged = _enlarged(values, ulps)
    return torch.where(positive, 1 / enlarged, 0.0)


def reciprocal_root(values: Tensor, ulps: int = 16) -> Tensor:
    """``values^(−1/2)``; all else as in :func:`reciprocal`."""
    positive, enlarged = _enlarged(values, ulps)
    return torch.where(positive, enlarged**-0.5, 0.0)


def _enlarged(values: Tensor, ulps: int) -> tuple[Tensor, Tensor]:
    """Where values are positive, and the values enlarged there, 1 elsewhere: no gradient becomes NaN on the way."""
    finfo = torch.finfo(values.dtype)
    # Below the square root of the smallest number the gradient of a reciprocal would overflow.
    positive = values > 16 * finfo.tiny**0.5
    return positive, torch.where(positive, values * (1 + ulps * finfo.eps), 1.0)
