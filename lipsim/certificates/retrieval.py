"""Radius within which a query keeps its nearest neighbours; notation as in :mod:`lipsim.certificates`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipsim.certificates.decisions import reference_radius
from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import project
from lipsim.certificates.numbers import check_constants

_CHUNK = 2**24  # elements of a batch of differences


def retrieval_radius(
    z: Tensor, gallery: Tensor, *, k: int = 1, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which a query ``(N, D)`` keeps the *set* of its ``k`` nearest gallery items ``(M, D)``, ``(N,)``.

    The minimum of :func:`reference_radius` over swaps of one item inside with one outside, which is exact. In float64.

    Raises:
        ValueError: not ``1 ≤ k < M``.

    Example:
        >>> z, gallery = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> print(f"{retrieval_radius(z, gallery).item():.4f}")  # its distance to the diagonal
        0.7071
    """
    check_constants(anchor, lipschitz, feature_error)
    if not 1 <= k < len(gallery):
        raise LipsimError(f"expected 1 ≤ k < {len(gallery)} (the size of the gallery), got k = {k}")
    # In float64: near-duplicates are ordered and told apart by what float32 rounds away.
    z, gallery = z.double(), gallery.double()
    p, s = project(gallery, anchor)
    order = (z @ p.mT + anchor * s).argsort(dim=-1, descending=True, stable=True)
    inside = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :k], True)
    radius = torch.full_like(z[:, 0], math.inf)
    # Differences of embeddings, not of similarities: near-duplicates in the gallery keep their digits.
    chunk = max(1, _CHUNK // max(1, z.numel()))
    for member in order[:, :k].unbind(-1):
        for start in range(0, len(gallery), chunk):
            others = gallery[start : start + chunk]
            swaps = reference_radius(
                z.unsqueeze(1),
                gallery[member].unsqueeze(1),
                others,
                anchor=anchor,
                lipschitz=lipschitz,
                feature_error=feature_error,
            )
            swaps = torch.where(inside[:, start : start + chunk], math.inf, swaps)
            radius = torch.minimum(radius, swaps.amin(1))
    return radius
