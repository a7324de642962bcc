"""Radius within which a query keeps its nearest neighbours; notation as in :mod:`lipsim.certificates`."""

from __future__ import annotations

from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.gallery import Gallery
from lipsim.certificates.numbers import check_constants
from lipsim.certificates.ranking import rank


def retrieval_radius(
    z: Tensor, gallery: Tensor, *, k: int = 1, anchor: float = 1.0, lipschitz: float = 1.0, feature_error: float = 0.0
) -> Tensor:
    """Radius within which a query ``(N, D)`` keeps the *set* of its ``k`` nearest gallery items ``(M, D)``, ``(N,)``.

    The minimum of :func:`reference_radius` over swaps of one item inside with one outside, which is exact. In float64.
    For many queries prepare the gallery once (:class:`.gallery.Gallery`) and :func:`.ranking.rank` them, which gives
    the radius of each rank as well.

    Raises:
        ValueError: not ``1 ≤ k < M``.

    Example:
        >>> import torch
        >>> z, gallery = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> print(f"{retrieval_radius(z, gallery).item():.4f}")  # its distance to the diagonal
        0.7071
    """
    check_constants(anchor, lipschitz, feature_error)
    if not 1 <= k < len(gallery):
        raise LipsimError(f"expected 1 ≤ k < {len(gallery)} (the size of the gallery), got k = {k}")
    prepared = Gallery(gallery, anchor)
    return rank(z, prepared, k=k, lipschitz=lipschitz, feature_error=feature_error).set_radius
