"""Distances that every table compares with and that need no training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def pixel_l2(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of the pixels, ``(N, 3, H, W)`` twice to ``(N,)``."""
    return torch.linalg.vector_norm((x - y).flatten(1), dim=1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """``1 − SSIM`` (Wang et al. 2004, an 11-pixel Gaussian window), in [0, 2], ``(N,)``."""
    similarity = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)  # a tuple only where the full image is asked for
    return 1 - similarity


BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pixel l2": pixel_l2, "SSIM": ssim}
