"""SDP-based Lipschitz layers (SLL).

Araujo et al. 2023, "A Unified Algebraic Perspective on Lipschitz Neural Networks".
An SLL block computes ``x − 2 Wᵀ T relu(W x + b)`` with the diagonal ``T_ii = 1/Σ_j |W Wᵀ|_ij q_j/q_i``. Because
``T^{-1} ⪰ W Wᵀ`` (diagonal dominance), it is 1-Lipschitz for every ``W``, ``b`` and ``q > 0`` (Thm. 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import FoldedLayer


class SLLLinear(FoldedLayer):
    """SLL block on vectors: ``(N, C)`` to ``(N, C)``.

    Args:
        features: input and output features ``C``.
        inner_features: rows of ``W``, the width inside the block.
    """

    def __init__(self, features: int, inner_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner_features, features))
        self.bias = nn.Parameter(torch.zeros(1, inner_features))
        self.q = nn.Parameter(torch.zeros(inner_features))
        # With orthonormal rows T is exact (T = 1) and the block a piecewise reflection, which preserves norm.
        nn.init.orthogonal_(self.weight)

    def derive(self) -> tuple[Tensor, Tensor]:
        """``W`` and the output weight ``2 Wᵀ T``, ``(C, inner)``."""
        scale = _scale(self.weight @ self.weight.mT, self.q)
        return self.weight, 2 * self.weight.mT * scale

    def forward(self, x: Tensor) -> Tensor:
        weight, output = self.weights()
        return x - F.linear(torch.relu(F.linear(x, weight, self.bias.flatten())), output)

    def lipschitz_bound(self) -> float:
        weight, output = (t.detach().double() for t in self.weights())
        gram = (weight @ weight.mT).abs()
        return _block_bound(gram, weight, output.mT, self.q)

    def extra_repr(self) -> str:
        inner, features = self.weight.shape
        return f"{features}, inner_features={inner}"


class SLLConv2d(FoldedLayer):
    """Convolutional SLL block: ``(N, C, H, W)`` to the same shape, stride 1, zero padding that keeps the size.

    ``|W Wᵀ|`` is the absolute self-convolution of the kernel summed over space. It dominates the operator on the whole
    plane; the zero-padded one is ``R W E`` with the extension ``E`` of the image by zeros and the restriction ``R`` of
    the output, and ``R W E Eᵀ Wᵀ Rᵀ ⪯ R W Wᵀ Rᵀ``.

    Args:
        channels: input and output channels ``C``.
        inner_channels: channels inside the block.
        kernel_size: odd side of the kernel.

    Raises:
        ValueError: an even kernel size, for which no symmetric padding keeps the image size.
    """

    def __init__(self, channels: int, inner_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        self.kernel = nn.Parameter(torch.zeros(inner_channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(1, inner_channels, 1, 1))
        self.q = nn.Parameter(torch.zeros(inner_channels))
        self.padding = kernel_size // 2
        # Delta-orthogonal (Xiao et al. 2018): T is exact at the start, as in SLLLinear. The noise only breaks the
        # symmetry between the other taps; more of it would loosen T at once.
        with torch.no_grad():
            nn.init.normal_(self.kernel, std=1e-3 / math.sqrt(channels * kernel_size**2))
            self.kernel[:, :, self.padding, self.padding] += nn.init.orthogonal_(torch.empty(inner_channels, channels))

    def derive(self) -> tuple[Tensor, Tensor]:
        """The kernel and the flipped output kernel ``2 Wᵀ T`` ``(C, inner, k, k)``."""
        scale = _scale(self._absolute_gram(self.kernel), self.q, absolute=False)
        # A convolution with the flipped kernel is the transposed convolution at stride 1, and faster than it.
        return self.kernel, 2 * (self.kernel * scale.view(-1, 1, 1, 1)).transpose(0, 1).flip(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel, output = self.weights()
        inner = torch.relu(F.conv2d(x, kernel, self.bias.flatten(), padding=self.padding))
        return x - F.conv2d(inner, output, padding=self.padding)

    def lipschitz_bound(self) -> float:
        kernel, output = (t.detach().double() for t in self.weights())
        unflipped = output.transpose(0, 1).flip(2, 3)
        taps = kernel.shape[-1] ** 2
        return _block_bound(self._absolute_gram(kernel), kernel.flatten(1), unflipped.flatten(1), self.q, taps)

    def extra_repr(self) -> str:
        inner, channels, kernel_size, _ = self.kernel.shape
        return f"{channels}, inner_channels={inner}, kernel_size={kernel_size}"

    @staticmethod
    def _absolute_gram(kernel: Tensor) -> Tensor:
        return F.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1).abs().sum((2, 3))


def _scale(gram: Tensor, q: Tensor, absolute: bool = True) -> Tensor:
    """Diagonal of ``T``; 0 where a row of ``W`` vanishes, so that the block is the identity there and not NaN."""
    gram = gram.abs() if absolute else gram
    rows = (gram * torch.exp(q.unsqueeze(0) - q.unsqueeze(1))).sum(1)
    # Below the square root of the smallest number the gradient of 1/rows would overflow.
    positive = rows > 16 * torch.finfo(rows.dtype).tiny ** 0.5
    # Rounded down, so that float32 sums do not push the bound of the block above 1.
    margin = 1 + 16 * torch.finfo(rows.dtype).eps
    return torch.where(positive, 1 / torch.where(positive, rows * margin, 1.0), 0.0)


def _block_bound(absolute_gram: Tensor, weight: Tensor, output: Tensor, q: Tensor, taps: int = 1) -> float:
    """Bound of ``x − Uᵀ relu(W x + b)`` from the weights that are really used (float64).

    Only ``U = 2TW`` with a diagonal ``T ≥ 0`` is an SLL block. With ``T W Wᵀ T ⪯ c T``, the Jacobian for slopes
    ``Λ ∈ [0, 1]`` satisfies ``JᵀJ = I − 4WᵀΛTW + 4WᵀΛT(WWᵀ)TΛW ⪯ I + 4(c − 1)WᵀTΛW``, so the block is 1-Lipschitz for
    ``c ≤ 1`` and ``√(1 + 4(c − 1)c) = 2c − 1``-Lipschitz above; ``c ≤ max_i T_i Σ_j |W Wᵀ|_ij q_j/q_i``.
    """
    energy = weight.square().sum(1)
    scale = torch.where(energy > 0, (output * weight).sum(1) / (2 * torch.where(energy > 0, energy, 1.0)), 0.0)
    if (scale < 0).any():
        return math.inf
    # What float32 rounding leaves of U − 2TW is another linear map, with at most its Frobenius norm.
    residual = output - 2 * scale.unsqueeze(1) * weight
    q = q.detach().double()
    rows = (absolute_gram * torch.exp(q.unsqueeze(0) - q.unsqueeze(1))).sum(1)
    c = float(torch.where(scale > 0, scale * rows, 0.0).max()) * (1 + 1e-12)
    if not math.isfinite(c):
        return math.inf
    # ‖R‖ ≤ √taps·‖R‖_F for a convolution (each pixel is read once per tap), and ‖W‖² ≤ max_i Σ_j |W Wᵀ|_ij.
    rounding = math.sqrt(taps * float(absolute_gram.sum(1).max())) * float(torch.linalg.vector_norm(residual))
    return max(1.0, 2 * c - 1) + rounding
