"""1-Lipschitz activations that preserve the norm of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lipsim.layers.base import LipschitzLayer


class MaxMin(LipschitzLayer):
    """Sort pairs of channels, ``(x_i, x_{i + C/2}) → (max, min)`` (Anil et al. 2019, GroupSort with groups of two).

    A permutation of coordinates at every point, hence 1-Lipschitz and gradient-norm preserving.

    Raises:
        ValueError: an odd number of channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, …)`` with even C to the same shape."""
        if x.shape[1] % 2:
            raise ValueError(f"expected an even number of channels, got {x.shape[1]}")
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)

    def lipschitz_bound(self) -> float:
        return 1.0
