"""Almost orthogonal Lipschitz layers (AOL).

Prach and Lampert 2022, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks": the columns of any
``P`` are rescaled, ``W = P D`` with ``D_ii = (Σ_j |Pᵀ P|_ij)^(−1/2)``. Because ``D⁻² ⪰ Pᵀ P`` (diagonal dominance),
``W`` is 1-Lipschitz (Thm. 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import FoldedLayer
from lipsim.layers.norms import conv_norm_bound, matrix_norm_bound, polyphase
from lipsim.layers.orthogonal import init_delta_orthogonal_, init_orthogonal_
from lipsim.layers.padding import check_padding, check_sides, repeats_rows
from lipsim.layers.reciprocal import reciprocal_root


class AOLLinear(FoldedLayer):
    """Affine map with almost orthonormal columns, ``(N, in) → (N, out)``.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether to add a learned bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(init_orthogonal_(torch.empty(out_features, in_features)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def derive(self) -> tuple[Tensor]:
        """The rescaled matrix ``P D``."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = _unscaled(self.weight)
            return (weight * reciprocal_root((weight.mT @ weight).abs().sum(1)),)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights()[0], self.bias)

    def lipschitz_bound(self) -> float:
        return matrix_norm_bound(self.weights()[0])

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}"


class AOLConv2d(FoldedLayer):
    """Convolution with almost orthonormal columns, ``(N, in, H, W) → (N, out, H', W')``.

    At stride ``s`` each of the ``s × s`` phases of an input channel is a column of its own; the published layer bounds
    the convolution at stride 1 instead.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: of the convolution.
        padding: default half of the kernel's side, rounded down; circular padding cannot be more than that.
        padding_mode: "zeros" or "circular".
        bias: whether to add a learned bias.

    Raises:
        ValueError: another padding mode, circular padding that repeats rows of the operator, or (in ``forward``) a
            circular image whose sides are no multiples of the stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel_size - (padding_mode == "circular")) // 2 if padding is None else padding
        check_padding(padding_mode, [2 * padding] * 2, [kernel_size - 1] * 2)
        self.kernel = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        init_delta_orthogonal_(self.kernel)  # where the rescaling changes nothing
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride, self.padding, self.padding_mode = stride, padding, padding_mode

    def derive(self) -> tuple[Tensor]:
        """The rescaled kernel, ``(out, in, k, k)``."""
        with torch.autocast(self.kernel.device.type, enabled=False):
            kernel = _unscaled(self.kernel)
            columns = polyphase(kernel, (self.stride, self.stride)).transpose(0, 1)
            reach = [size - 1 for size in columns.shape[2:]]
            gram = F.conv2d(columns, columns, padding=reach).abs().sum((1, 2, 3))
            # One factor per input channel and phase, at the taps of this phase.
            scale = reciprocal_root(gram).view(self.kernel.shape[1], self.stride, self.stride)
            taps = torch.arange(self.kernel.shape[-1], device=scale.device) % self.stride
            return (kernel * scale[:, taps][:, :, taps],)

    def forward(self, x: Tensor) -> Tensor:
        (kernel,) = self.weights()
        if self.padding_mode == "circular":
            check_sides(x, [self.stride] * 2)
            return F.conv2d(F.pad(x, (self.padding,) * 4, mode="circular"), kernel, self.bias, self.stride)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)

    def lipschitz_bound(self) -> float:
        (kernel,) = self.weights()
        if repeats_rows(self.padding_mode, [2 * self.padding] * 2, [kernel.shape[-1] - 1] * 2):
            return math.inf  # edited since: rows of the operator repeat
        return conv_norm_bound(kernel, (self.stride, self.stride))

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.kernel.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"padding_mode={self.padding_mode}, bias={self.bias is not None}"
        )


def _unscaled(weight: Tensor) -> Tensor:
    """The weight divided by its largest entry, on which the rescaled one does not depend: squares must not vanish."""
    return weight / weight.detach().abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
