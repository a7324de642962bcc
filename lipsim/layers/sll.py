"""SDP-based Lipschitz layers (SLL).

Araujo et al. 2023, "A Unified Algebraic Perspective on Lipschitz Neural Networks": residual blocks with
``T_ii = 1/Σ_j |W Wᵀ|_ij q_j/q_i``. Because ``T⁻¹ ⪰ W Wᵀ`` (diagonal dominance), they are 1-Lipschitz for every ``W``,
``b`` and ``q > 0`` (Thm. 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.reciprocal import reciprocal
from lipsim.layers.residual import ResidualConv2d, ResidualLinear


class SLLLinear(ResidualLinear):
    """SLL block on vectors: ``(N, C)`` to ``(N, C)``.

    Args:
        features: input and output features ``C``.
        inner_features: rows of ``W``, the width inside the block.
    """

    def __init__(self, features: int, inner_features: int) -> None:
        super().__init__(features, inner_features)
        self.q = nn.Parameter(torch.zeros(inner_features))

    def scale(self) -> Tensor:
        device, dtype = self.weight.device.type, self.weight.dtype
        if self.training and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            # Good to three digits, which training under autocast has anyway; evaluation always has all of them, and so
            # has float16, which overflows.
            dtype = torch.bfloat16
        return reciprocal(_row_sums(_Gram.apply(self.weight, dtype), self.q))

    def gain(self, weight: Tensor, scale: Tensor) -> float:
        return dominance_gain(weight @ weight.mT, self.q, scale)


class SLLConv2d(ResidualConv2d):
    """Convolutional SLL block: ``(N, C, H, W)`` to the same shape, for any kernel, stride and padding.

    ``|W Wᵀ|`` is the absolute self-convolution of the kernel, at multiples of the stride, summed over space. It
    dominates the operator on the whole plane; the zero-padded one is ``R W E`` with the extension ``E`` of the image by
    zeros and the restriction ``R`` of the output, and ``R W E Eᵀ Wᵀ Rᵀ ⪯ R W Wᵀ Rᵀ``. The circular one folds entries of
    the same row onto each other, and the absolute value of a sum is at most the sum of absolute values.

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

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(channels, inner_channels, kernel_size, stride, padding, padding_mode)
        self.q = nn.Parameter(torch.zeros(inner_channels))

    def scale(self) -> Tensor:
        return reciprocal(_row_sums(absolute_gram(self.kernel, self.stride), self.q))

    def gain(self, kernel: Tensor, scale: Tensor) -> float:
        return dominance_gain(absolute_gram(kernel, self.stride), self.q, scale)


class _Gram(torch.autograd.Function):
    """``W Wᵀ``, with one product in the backward pass where autograd takes two.

    Gram matrices are a large part of a training step with few images.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, dtype: torch.dtype) -> Tensor:
        factor = weight.to(dtype)
        with torch.autocast(weight.device.type, enabled=False):
            return (factor @ factor.mT).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, ctx.dtype = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Of operations that are differentiable themselves, for second derivatives.
        (weight,) = ctx.saved_tensors
        return ((gradient + gradient.mT).to(ctx.dtype) @ weight.to(ctx.dtype)).to(weight.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (weight,) = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            half: Tensor = (tangent.to(ctx.dtype) @ weight.to(ctx.dtype).mT).to(weight.dtype)
        return half + half.mT


def absolute_gram(kernel: Tensor, stride: int) -> Tensor:
    """``|W Wᵀ|`` of a convolution ``(inner, C, k, k)``, summed over space, ``(inner, inner)``."""
    with torch.autocast(kernel.device.type, enabled=False):
        reach = (kernel.shape[-1] - 1) // stride * stride
        return F.conv2d(kernel, kernel, stride=stride, padding=reach).abs().sum((2, 3))


def _row_sums(gram: Tensor, q: Tensor) -> Tensor:
    """``Σ_j |W Wᵀ|_ij q_j/q_i``, ``(inner,)``, whose reciprocals are the diagonal of ``T``; ``q`` is its logarithm."""
    return (gram.abs() * torch.exp(q.unsqueeze(0) - q.unsqueeze(1))).sum(1)


def dominance_gain(gram: Tensor, q: Tensor, scale: Tensor) -> float:
    """A ``c`` with ``T W Wᵀ T ⪯ c·T``, for any ``q``, from ``W Wᵀ`` and the diagonal of ``T``, in float64."""
    return float(torch.where(scale > 0, scale * _row_sums(gram, q.detach().double()), 0.0).max())
