"""Convex potential layers (CPL).

Meunier et al. 2022, "A Dynamical System Perspective for Lipschitz Neural Networks": a gradient step on a convex
potential, ``x − 2 Wᵀ relu(W x + b)/‖W‖₂²``, is 1-Lipschitz (Prop. 2). The published layer takes ``‖W‖₂`` from power
iteration, which is a lower bound of it; here it is the upper bound of Gram iteration.
"""

from __future__ import annotations

import math

from torch import Tensor

from lipsim.layers.norms import conv_norm_bound, gram_iteration_bound, matrix_norm_bound
from lipsim.layers.reciprocal import reciprocal
from lipsim.layers.residual import ResidualConv2d, ResidualLinear


class CPLLinear(ResidualLinear):
    """Convex potential layer on vectors: ``(N, C)`` to ``(N, C)``.

    Args:
        features: input and output features ``C``.
        inner_features: rows of ``W``, the width inside the block.
    """

    def scale(self) -> Tensor:
        return _scale(self.weight.unsqueeze(-1).unsqueeze(-1))

    def gain(self, weight: Tensor, scale: Tensor) -> float:
        return _gain(scale, matrix_norm_bound(weight))


class CPLConv2d(ResidualConv2d):
    """Convolutional convex potential layer: ``(N, C, H, W)`` to the same shape, for any kernel, stride and padding.

    Args:
        channels: input and output channels ``C``.
        inner_channels: channels inside the block.
        kernel_size: side of the kernel.
        stride: of ``W``.
        padding: of ``W``, less than the kernel's side; default half of it.
        padding_mode: "zeros" or "circular".

    Raises:
        ValueError: as :class:`lipsim.layers.residual.ResidualConv2d`.
    """

    def scale(self) -> Tensor:
        return _scale(self.kernel, self.stride)

    def gain(self, kernel: Tensor, scale: Tensor) -> float:
        return _gain(scale, conv_norm_bound(kernel, (self.stride, self.stride)))


def _scale(kernel: Tensor, stride: int = 1) -> Tensor:
    """The same ``1/‖W‖₂²`` for every row; 0 where ``W`` vanishes, so that the block is the identity."""
    # The FFT in float32 is good to a few ulp of the largest response.
    return reciprocal(gram_iteration_bound(kernel, stride) ** 2, ulps=32).expand(kernel.shape[0])


def _gain(scale: Tensor, norm: float) -> float:
    root = math.sqrt(max(float(scale.max()), 0.0)) * norm  # the square of the norm alone may overflow
    return root * root
