"""Distances that every table compares with and that need no training."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before what imports matplotlib

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from lipsim.metric.distance import Distance

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, the finest scale first
_WINDOW = 11


def pixel_l2(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of the pixels, ``(N, 3, H, W)`` twice to ``(N,)``."""
    distance: Tensor = torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    return distance


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """``1 − SSIM`` (Wang et al. 2004, an 11-pixel Gaussian window), in [0, 2], ``(N,)``."""
    similarity = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)  # a tuple only where the full image is asked for
    return 1 - similarity


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """``1 − MS-SSIM`` (Wang et al. 2003), ``(N,)``; small images have as many of the five scales as fit.

    An image of 64 pixels has three, whose exponents are scaled to the same sum; below 24 pixels only the first.
    """
    side = min(x.shape[-2:])
    count = sum(side // 2**k > _WINDOW - 1 and side > (_WINDOW - 1) * 2**k for k in range(len(_SCALES)))
    betas = _SCALES[: max(count, 1)]
    betas = tuple(beta * sum(_SCALES) / sum(betas) for beta in betas)
    similarity = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", betas=betas)
    return (1 - similarity).to(x.dtype)  # torchmetrics raises to powers in torch's default dtype


BASELINES: dict[str, Distance] = {"pixel l2": pixel_l2, "SSIM": ssim, "MS-SSIM": ms_ssim}
