"""Outward rounding: what certificates lose so that they hold in floating-point numbers as well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import Anchored, anchored_norm

Features = Tensor | Anchored  # before the projection, or after it

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny  # the smallest number with all digits


def over_bound(radius: Tensor, lipschitz: float) -> Tensor:
    """A radius in feature space over ``L``, at most the largest finite number; 0 without a bound and where unknown."""
    if lipschitz == 0 or lipschitz == math.inf:
        return torch.zeros_like(radius)
    radius = torch.where(torch.isnan(radius), 0.0, radius)
    return (radius / lipschitz).clamp(max=torch.finfo(radius.dtype).max)


def bounded_norm(z: Features, anchor: float) -> Tensor:
    """Anchored norm, rounded down to the largest finite number, and to 0 where it has not all its digits."""
    norm = z.norm if isinstance(z, Anchored) else anchored_norm(z, anchor)
    norm = norm.clamp(max=torch.finfo(norm.dtype).max)
    return torch.where(norm < TINY, norm * 0, norm) if norm.dtype == torch.float64 else norm


def anchored(anchor: float, *features: Features) -> tuple[torch.dtype, tuple[Anchored, ...]]:
    """Features projected in float64, those that are not yet, and the dtype of what is computed from them.

    Raises:
        ValueError: some were projected with another anchor.
    """
    for e in features:
        if isinstance(e, Anchored) and e.anchor != anchor:
            raise LipsimError(f"expected features projected with the anchor {anchor}, got {e.anchor}")
    first = features[0]
    dtype = torch.float64 if isinstance(first, Anchored) else first.dtype
    return dtype, tuple(e if isinstance(e, Anchored) else Anchored(e, anchor) for e in features)


def rounding_error(z: Tensor) -> float:
    """More than float64 loses in unit vectors of ``D`` features, scalar products with them, and angles between them.

    With the unit roundoff ``u`` and sums of ``D`` terms in any order: a unit vector is off by ``(D/2 + 6)u``, the
    difference of two by twice that, ``⟨e, p0 − p1⟩`` by ``(3D + 16)u‖e‖``, and the difference of two angles by
    ``(6D + 60)u`` (Higham 2002, §3.1; ``‖p − q‖² + ‖p + q‖² = 4`` makes the angle a 1-Lipschitz function of both).
    """
    return 8 * (z.shape[-1] + 16) * EPS


def round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded down to a dtype, at most its largest finite number, 0 for NaN; covers the roundings of a few operations.

    What is below the smallest normal number is 0.
    """
    info = torch.finfo(dtype)
    value = torch.where(value > info.tiny, value, 0.0).clamp(max=info.max)
    return (value * (1 - 4 * info.eps)).to(dtype)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded up to a dtype; what is above 0 is at least its smallest normal number."""
    info = torch.finfo(dtype)
    value = torch.where(value > 0, value.clamp(min=info.tiny), value)
    return (value * (1 + 4 * info.eps)).to(dtype)
