"""A gallery of features, prepared so that many queries can be compared with all of it; see :mod:`.ranking`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.geometry import Anchored, project
from lipsim.certificates.numbers import check_constants
from lipsim.certificates.rounding import rounding_error

_ROWS = 2**13  # of a gallery, that are in float64 at a time
_UNIT_ROUNDOFF = 2.0**-24  # of float32


class Gallery:
    """Features ``(M, D)`` of a gallery, and their unit vectors ``p = e/‖e‖`` in float32 around their mean.

    A product of a query with the latter ranks the whole gallery but for :attr:`slack`, which is proven: the sum of
    ``D + 1`` products in any order is off by ``(D + 1)u`` of the lengths of both vectors (Higham 2002, §3.1), and
    around their mean vectors of one narrow cone, as images of one kind have, are short.

    Memory: as much again as the features in float32; they themselves are read row by row and may be mapped from a file.

    Args:
        features: ``(M, D)`` in float32 or float64, on any device.
        anchor: ``κ``.

    Attributes:
        features: as given.
        anchor: as given.
        slack: how far :meth:`similarities` may be from the cosine less the query's cosine with the mean.
        least_norm: the smallest ``‖e‖``; 0 where a feature is not finite, for which nothing is certified.

    Raises:
        ValueError: no such features.
    """

    def __init__(self, features: Tensor, anchor: float = 1.0) -> None:
        check_constants(anchor)
        if features.ndim != 2 or not features.numel() or features.dtype not in (torch.float32, torch.float64):
            raise LipsimError(
                f"expected features (M, D) of a gallery in float32 or float64, got {features.dtype} of shape "
                f"{tuple(features.shape)}"
            )
        self.features, self.anchor = features, anchor
        count, size = features.shape
        # Of some items, evenly spaced: near the mean is as good, and what is taken off is known exactly.
        some = features[
            torch.linspace(0, count - 1, min(count, _ROWS), dtype=torch.float64, device=features.device).long()
        ]
        mean = unit_vectors(some, anchor).mean(0)
        self._mean = torch.where(torch.isfinite(mean).all(), mean, 0.0)
        self._offsets = torch.empty(count, size + 1, dtype=torch.float32, device=features.device)
        longest, self.least_norm = 0.0, math.inf
        for start in range(0, count, _ROWS):
            rows = Anchored(features[start : start + _ROWS], anchor)
            offset = (torch.cat([rows.unit[0], rows.unit[1].unsqueeze(-1)], -1) - self._mean).nan_to_num()
            self._offsets[start : start + len(offset)] = offset
            longest = max(longest, float(torch.linalg.vector_norm(offset, dim=-1).amax()))
            least = torch.where(torch.isfinite(rows.z).all(-1), rows.norm, 0.0).amin()
            self.least_norm = min(self.least_norm, float(least))
        # Both vectors are rounded to float32, and so is their product where it was computed in float64.
        self.slack = 1.01 * (size + 8) * _UNIT_ROUNDOFF * longest + 4 * rounding_error(features)

    def __len__(self) -> int:
        return len(self.features)

    def unit(self, rows: Tensor) -> Tensor:
        """``p`` of some items, ``(…, D + 1)`` float64, the anchor last; 0 for zero features without an anchor."""
        return unit_vectors(self.features[rows], self.anchor)

    def base(self, unit: Tensor) -> Tensor:
        """The cosine of unit vectors ``(N, D + 1)`` with the mean of the gallery's, times its length, ``(N,)``."""
        return unit @ self._mean

    def similarities(self, unit: Tensor) -> Tensor:
        """``⟨p(z), p(y)⟩`` less :meth:`base`, ``(N, M)`` float32, off by :attr:`slack` at most.

        Args:
            unit: of the queries, ``(N, D + 1)`` float64.
        """
        with torch.autocast(unit.device.type, enabled=False):
            if _products_are_exact(unit.device):
                return unit.float() @ self._offsets.mT
            return torch.cat([(unit @ rows.double().mT).float() for rows in self._offsets.split(_ROWS)], 1)


def unit_vectors(features: Tensor, anchor: float) -> Tensor:
    """``p = e/‖e‖`` of features ``(…, D)`` in one vector, ``(…, D + 1)`` float64."""
    p, s = project(features.double(), anchor)
    return torch.cat([p, s.unsqueeze(-1)], -1)


def _products_are_exact(device: torch.device) -> bool:
    """Whether a product of float32 matrices is one of float32 numbers, and not of TF32 or bf16 ones."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return backend.fp32_precision in ("none", "ieee")
