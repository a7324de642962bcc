"""Residual blocks ``x − 2 Wᵀ T relu(W x + b)`` with a diagonal ``T``, which SLL and CPL choose differently.

For slopes ``Λ ∈ [0, 1]`` of the ReLU the Jacobian is ``J = I − 2WᵀTΛW``, and
``JᵀJ = I − 4WᵀΛTW + 4WᵀΛT(W Wᵀ)TΛW``. Where ``T W Wᵀ T ⪯ c·T`` this is ``⪯ I + 4(c − 1)WᵀTΛW``: the block is
1-Lipschitz for ``c ≤ 1`` (Araujo et al. 2023, Thm. 3; Meunier et al. 2022, Prop. 2), and ``(2c − 1)``-Lipschitz above.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.base import FoldedLayer
from lipsim.layers.norms import conv_norm_bound, matrix_norm_bound, row_norms
from lipsim.layers.orthogonal import init_delta_orthogonal_, init_orthogonal_
from lipsim.layers.padding import check_padding
from lipsim.utils.errors import LipsimError

_ROUND_UP = 1 + 1e-11  # above the rounding of float64 sums of ten thousand terms


class ResidualLinear(FoldedLayer):
    """Residual block on vectors: ``(N, C)`` to ``(N, C)``.

    Args:
        features: input and output features ``C``.
        inner_features: rows of ``W``, the width inside the block.
    """

    def __init__(self, features: int, inner_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner_features, features))
        self.bias = nn.Parameter(torch.zeros(1, inner_features))
        # With orthonormal rows T is exact (T = 1) and the block a piecewise reflection, which preserves norm.
        init_orthogonal_(self.weight)

    @abstractmethod
    def scale(self) -> Tensor:
        """Diagonal of ``T``, ``(inner,)``."""

    @abstractmethod
    def gain(self, weight: Tensor, scale: Tensor) -> float:
        """Some ``c`` with ``T W Wᵀ T ⪯ c·T``, from the float64 weights that are really used."""

    def derive(self) -> tuple[Tensor, Tensor]:
        """``W`` and the negative output weight ``−2 Wᵀ T``, ``(C, inner)``."""
        return self.weight, -2 * self.weight.mT * self.scale()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            # T on the narrow activation: a scaled copy of W is as large as W, and would be kept for the backward pass.
            inner = torch.relu(F.linear(x, self.weight, self.bias.flatten()))
            return x + F.linear(-2 * self.scale() * inner, self.weight.mT)
        weight, output = self.weights()
        return x + F.linear(torch.relu(F.linear(x, weight, self.bias.flatten())), output)

    def lipschitz_bound(self) -> float:
        weight, output = (t.detach().double() for t in self.weights())
        return residual_bound(weight, output.mT, lambda scale: self.gain(weight, scale), matrix_norm_bound(weight))

    def extra_repr(self) -> str:
        inner, features = self.weight.shape
        return f"{features}, inner_features={inner}"


class ResidualConv2d(FoldedLayer):
    """Convolutional residual block: ``(N, C, H, W)`` to the same shape, for any kernel, stride and padding.

    ``W`` may change the size of the image, by a stride or an even kernel: ``Wᵀ`` is its exact adjoint and leads back.

    Args:
        channels: input and output channels ``C``.
        inner_channels: channels inside the block.
        kernel_size: side of the kernel.
        stride: of ``W``.
        padding: of ``W``, less than the kernel's side; default half of it.
        padding_mode: "zeros" or "circular".

    Raises:
        ValueError: a padding that reaches beyond the kernel, another padding mode, or circular padding with a stride
            or a kernel that changes the image's size.
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
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        if not 0 <= padding < kernel_size:
            raise LipsimError(f"expected a padding in [0, kernel_size), got {padding} with kernel_size {kernel_size}")
        if padding_mode == "circular" and not _is_adjoint_circular(kernel_size, stride, padding):
            raise LipsimError(
                "expected stride 1 and an odd kernel with half of it as padding where padding is circular, got "
                f"kernel_size {kernel_size}, stride {stride}, padding {padding}"
            )
        check_padding(padding_mode, [2 * padding] * 2, [kernel_size - 1] * 2)
        self.kernel = nn.Parameter(torch.zeros(inner_channels, channels, kernel_size, kernel_size))
        init_delta_orthogonal_(self.kernel)  # T is exact at the start, as in ResidualLinear
        self.bias = nn.Parameter(torch.zeros(1, inner_channels, 1, 1))
        self.stride, self.padding, self.padding_mode = stride, padding, padding_mode

    @abstractmethod
    def scale(self) -> Tensor:
        """Diagonal of ``T``, ``(inner,)``."""

    @abstractmethod
    def gain(self, kernel: Tensor, scale: Tensor) -> float:
        """Some ``c`` with ``T W Wᵀ T ⪯ c·T``, from the float64 kernel that is really used."""

    def derive(self) -> tuple[Tensor, Tensor]:
        """The kernel, and the one of ``−2 Wᵀ T``: ``(C, inner, k, k)`` at stride 1, else ``(inner, C, k, k)``."""
        output = -2 * (self.kernel * self.scale().view(-1, 1, 1, 1))
        # A convolution with the flipped kernel is the transposed convolution at stride 1, and faster than it.
        return self.kernel, output if self.stride > 1 else _flipped(output)

    def forward(self, x: Tensor) -> Tensor:
        kernel, output = self.weights()
        if self.training and self.stride == 1 and self.padding_mode != "circular":
            out_padding = self.kernel.shape[-1] - 1 - self.padding
            return _fused(x, kernel, self.bias.flatten(), output, self.padding, out_padding)
        return residual_conv2d(x, kernel, self.bias.flatten(), output, self.stride, self.padding, self.padding_mode)

    def lipschitz_bound(self) -> float:
        kernel, output = self.weights()
        return residual_conv2d_bound(
            kernel,
            output,
            lambda scale: self.gain(kernel.detach().double(), scale),
            self.stride,
            self.padding,
            self.padding_mode,
        )

    def extra_repr(self) -> str:
        inner, channels, kernel_size, _ = self.kernel.shape
        return (
            f"{channels}, inner_channels={inner}, kernel_size={kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, padding_mode={self.padding_mode}"
        )


def residual_conv2d(
    x: Tensor, kernel: Tensor, bias: Tensor, output: Tensor, stride: int, padding: int, padding_mode: str
) -> Tensor:
    """``x`` plus the output convolution of ``relu(conv(x))``, ``(N, C, H, W)`` to the same shape.

    Args:
        x: the input.
        kernel: ``W``, ``(inner, C, k, k)``.
        bias: ``(inner,)``.
        output: the kernel that leads back: ``(C, inner, k, k)``, of a convolution, at stride 1; ``(inner, C, k, k)``,
            of a transposed one, above.
        stride: of ``W``.
        padding: of ``W``.
        padding_mode: "zeros" or "circular".
    """
    kernel_size = kernel.shape[-1]
    if padding_mode == "circular":
        inner = F.relu_(F.conv2d(_wrap(x, padding), kernel, bias))
        return x + F.conv2d(_wrap(inner, padding), output)
    inner = F.relu_(F.conv2d(x, kernel, bias, stride, padding))
    if stride > 1:
        rest = [(size + 2 * padding - kernel_size) % stride for size in x.shape[2:]]
        return x + F.conv_transpose2d(inner, output, None, stride, padding, rest)
    return F.conv2d(inner, output, padding=kernel_size - 1 - padding).add_(x)


def residual_conv2d_bound(
    kernel: Tensor, output: Tensor, gain: Callable[[Tensor], float], stride: int, padding: int, padding_mode: str
) -> float:
    """Bound of :func:`residual_conv2d` with these weights; ``gain`` as in :func:`residual_bound`."""
    if padding_mode == "circular" and not _is_adjoint_circular(kernel.shape[-1], stride, padding):
        return math.inf  # edited since, and no exact adjoint any more
    kernel, output = kernel.detach().double(), output.detach().double()
    output = output if stride > 1 else _flipped(output)
    norm = conv_norm_bound(kernel, (stride, stride))
    return residual_bound(kernel.flatten(1), output.flatten(1), gain, norm, taps=kernel[0, 0].numel())


def _wrap(x: Tensor, padding: int) -> Tensor:
    return F.pad(x, (padding,) * 4, mode="circular") if padding else x


def _is_adjoint_circular(kernel_size: int, stride: int, padding: int) -> bool:
    """Whether a circular convolution keeps the size of the image, so that the flipped kernel is its adjoint."""
    return stride == 1 and 2 * padding == kernel_size - 1


def residual_bound(
    weight: Tensor, output: Tensor, gain: Callable[[Tensor], float], norm: float, taps: int = 1
) -> float:
    """Bound of ``x + Uᵀ relu(W x + b)`` from the float64 weights that are really used.

    Args:
        weight: ``W``, ``(inner, …)``.
        output: ``U``, of the same shape; only ``U = −2TW`` with a diagonal ``T ≥ 0`` gives a finite bound, up to
            rounding.
        gain: function of the diagonal of ``T`` that returns the ``c`` of this module's docstring.
        norm: bound on ``‖W‖₂``.
        taps: of a convolution.
    """
    # T of each row, from W and U over their norms: the square of a norm may overflow or vanish.
    length, output_length = row_norms(weight), row_norms(output)
    nonzero = (length > 0) & (output_length > 0)
    units = (
        t / torch.where(nonzero, norm, 1.0).unsqueeze(1) for t, norm in ((weight, length), (output, output_length))
    )
    cosine = torch.stack(list(units)).prod(0).sum(1)
    scale = torch.where(nonzero, -cosine * (output_length / torch.where(nonzero, length, 1.0)) / 2, 0.0)
    c: float = gain(scale) * _ROUND_UP
    if not torch.isfinite(scale).all() or (scale < 0).any() or not math.isfinite(c):
        return math.inf
    # What float32 rounding leaves of U + 2TW is another map R, and ‖RᵀΛW‖ ≤ ‖T^(−1/2) R‖·‖T^(1/2) W‖, where the last
    # norm is at most √c. Each pixel is read once per tap, at most, so norms are at most √taps times Frobenius norms.
    residual = row_norms(output + 2 * scale.unsqueeze(1) * weight)
    alive = scale > 0
    weighted = _norm(residual[alive] / scale[alive].sqrt()) * math.sqrt(c)
    lost = _norm(residual[~alive])
    rounding = math.sqrt(taps) * (weighted + (lost * norm if lost else 0.0))
    return (max(1.0, 2 * c - 1) + rounding) * _ROUND_UP


def _norm(vector: Tensor) -> float:
    return float(row_norms(vector.unsqueeze(0)))


def _flipped(kernel: Tensor) -> Tensor:
    return kernel.transpose(0, 1).flip(2, 3)


def _fused(x: Tensor, kernel: Tensor, bias: Tensor, output: Tensor, padding: int, out_padding: int) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        # A custom function is not autocast; the residual stream is in half precision as well.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, kernel, bias, output = (t.to(dtype) for t in (x, kernel, bias, output))
    updated: Tensor = _FusedResidual.apply(x, kernel, bias, output, padding, out_padding)[0]
    return updated


class _FusedResidual(torch.autograd.Function):
    """``x + conv(relu(conv(x)))`` in two passes less over the wide tensors, and without keeping anything but ``x`` and
    the narrow inner activation.

    The inner activation is an output like the other one, though nobody reads it: second derivatives reach the first
    convolution through what the backward pass reads of it.
    """  # noqa: D205

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, bias: Tensor, output: Tensor, padding: int, out_padding: int) -> Any:
        inner = F.relu_(F.conv2d(x, kernel, bias, padding=padding))
        return F.conv2d(inner, output, padding=out_padding).add_(x), inner

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, kernel, _, out_kernel, *ctx.paddings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, kernel, out_kernel, output[1])
        ctx.save_for_forward(x, kernel, out_kernel, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, through_inner: Tensor | None) -> Any:
        # Of operations that are differentiable themselves.
        x, kernel, output, inner = ctx.saved_tensors
        padding, out_padding = ctx.paddings
        needs_x, needs_kernel, needs_bias, needs_output = ctx.needs_input_grad[:4]
        grad_inner, grad_output = through_inner, None
        if gradient is not None:
            needed = [True, needs_output, False]
            grad_inner, grad_output, _ = _conv_backward(gradient, inner, output, out_padding, needed)
            grad_inner = grad_inner if through_inner is None else grad_inner + through_inner
        if grad_inner is None:
            return (None,) * 6
        grad_inner = torch.ops.aten.threshold_backward(grad_inner, inner, 0)
        needed = [needs_x, needs_kernel, needs_bias]
        grad_x, grad_kernel, grad_bias = _conv_backward(grad_inner, x, kernel, padding, needed)
        if needs_x and gradient is not None:
            grad_x = grad_x.add_(gradient)
        return grad_x if needs_x else None, grad_kernel, grad_bias, grad_output, None, None

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, kernel_t: Tensor | None, bias_t: Tensor | None, output_t: Tensor | None, *_: Any
    ) -> Any:
        x, kernel, output, inner = ctx.saved_tensors
        padding, out_padding = ctx.paddings
        inner_t, result_t = torch.zeros_like(inner), torch.zeros_like(x)
        if x_t is not None:
            inner_t, result_t = inner_t + F.conv2d(x_t, kernel, padding=padding), result_t + x_t
        if kernel_t is not None:
            inner_t = inner_t + F.conv2d(x, kernel_t, padding=padding)
        if bias_t is not None:
            inner_t = inner_t + bias_t.view(-1, 1, 1)
        inner_t = torch.ops.aten.threshold_backward(inner_t, inner, 0)
        result_t = result_t + F.conv2d(inner_t, output, padding=out_padding)
        if output_t is not None:
            result_t = result_t + F.conv2d(inner, output_t, padding=out_padding)
        return result_t, inner_t


def _conv_backward(gradient: Tensor, x: Tensor, kernel: Tensor, padding: int, needed: list[bool]) -> Any:
    """Gradients of a convolution of stride 1 with respect to input, kernel and bias, those that are needed."""
    one, zero = [1, 1], [0, 0]
    return torch.ops.aten.convolution_backward(
        gradient, x, kernel, [kernel.shape[0]], one, [padding] * 2, one, False, zero, 1, needed
    )
