"""Layers with their weights as they are used, and networks made of such layers: nothing is derived in a forward pass.

What a parametrised layer computes in evaluation mode, one of these computes from the folded weights alone, operation by
operation. They are for files and for other runtimes; nothing keeps them 1-Lipschitz in training, and their bounds say
what their weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers.adapters import ExplicitConv2d, ExplicitLinear
from lipsim.layers.aol import AOLConv2d, AOLLinear
from lipsim.layers.base import FoldedLayer, LipschitzLayer, freeze
from lipsim.layers.norms import conv_norm_bound, matrix_norm_bound
from lipsim.layers.orthogonal import OrthogonalLinear, OrthogonalPatches
from lipsim.layers.residual import (
    ResidualConv2d,
    ResidualLinear,
    residual_bound,
    residual_conv2d,
    residual_conv2d_bound,
)
from lipsim.layers.sll import absolute_gram, dominance_gain

Filled = TypeVar("Filled", bound=nn.Module)
_DOMINATED = 1 + 1e-9  # a gain of no more than this makes a block 1-Lipschitz, up to rounding


class FoldedResidualLinear(LipschitzLayer):
    """Residual block ``x + U relu(W x + b)`` with explicit ``W`` and ``U``, ``(N, C)`` to ``(N, C)``.

    Args:
        features: input and output features ``C``.
        inner_features: rows of ``W``.

    Attributes:
        q: makes the bound cheap where it is that of an SLL block; any ``q`` gives a bound that holds.
    """

    def __init__(self, features: int, inner_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inner_features, features))
        self.bias = nn.Parameter(torch.zeros(inner_features))
        self.output = nn.Parameter(torch.zeros(features, inner_features))
        self.q = nn.Parameter(torch.zeros(inner_features))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(torch.relu(F.linear(x, self.weight, self.bias)), self.output)

    def lipschitz_bound(self) -> float:
        weight, output = self.weight.detach().double(), self.output.detach().double()
        gain = _gain(weight, weight @ weight.mT, self.q, matrix_norm_bound)
        return residual_bound(weight, output.mT, gain, matrix_norm_bound(weight))

    def extra_repr(self) -> str:
        inner, features = self.weight.shape
        return f"{features}, inner_features={inner}"


class FoldedResidualConv2d(LipschitzLayer):
    """Convolutional residual block with explicit kernels, ``(N, C, H, W)`` to the same shape.

    Args:
        channels: input and output channels ``C``.
        inner_channels: channels inside the block.
        kernel_size: side of the kernel.
        stride: of the first convolution.
        padding: of it.
        padding_mode: "zeros" or "circular".

    Attributes:
        q: as in :class:`FoldedResidualLinear`.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        back = (inner_channels, channels) if stride > 1 else (channels, inner_channels)
        self.kernel = nn.Parameter(torch.zeros(inner_channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(inner_channels))
        self.output = nn.Parameter(torch.zeros(*back, kernel_size, kernel_size))
        self.q = nn.Parameter(torch.zeros(inner_channels))
        self.stride, self.padding, self.padding_mode = stride, padding, padding_mode

    def forward(self, x: Tensor) -> Tensor:
        return residual_conv2d(x, self.kernel, self.bias, self.output, self.stride, self.padding, self.padding_mode)

    def lipschitz_bound(self) -> float:
        def norm(kernel: Tensor) -> float:
            return conv_norm_bound(kernel, (self.stride, self.stride))

        kernel = self.kernel.detach().double()
        gain = _gain(kernel, absolute_gram(kernel, self.stride), self.q, norm)
        return residual_conv2d_bound(kernel, self.output, gain, self.stride, self.padding, self.padding_mode)

    def extra_repr(self) -> str:
        inner, channels, kernel_size, _ = self.kernel.shape
        return (
            f"{channels}, inner_channels={inner}, kernel_size={kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, padding_mode={self.padding_mode}"
        )


def explicit_copy(module: nn.Module) -> nn.Module:
    """A copy for evaluation in which each layer with derived weights is one with explicit weights.

    It computes what ``module`` computes in evaluation mode. A :class:`FoldedLayer` of a class that is not known here
    keeps its forward pass, on weights that are constants from now on (which the state of the copy does not hold).
    """
    copy = deepcopy(module).eval().requires_grad_(False)
    freeze(copy)
    with torch.no_grad():
        return _replaced(copy, {}).requires_grad_(False).eval()


def _replaced(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with explicit layers inside; one that is used twice becomes one that is used twice."""
    if module not in done:
        if isinstance(module, FoldedLayer):
            done[module] = _explicit(module)
        else:
            done[module] = module
            for name, child in module._modules.items():
                module._modules[name] = None if child is None else _replaced(child, done)
    return done[module]


def _explicit(layer: FoldedLayer) -> nn.Module:
    # By what runs, not by class: a subclass may compute something else.
    build = _EXPLICIT.get(type(layer).forward)
    if build is None:
        layer.pin(tuple(weight.clone() for weight in layer.weights()))
        return layer
    return build(layer)


def _linear(layer: Any) -> nn.Linear:
    weight, *bias = layer.weights()
    bias = bias[0] if bias else getattr(layer, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    return _filled(linear, weight=weight, bias=bias)


def _conv2d(layer: Any) -> nn.Module:
    weight, *bias = layer.weights()
    before: tuple[nn.Module, ...] = ()
    options: dict[str, Any]
    if isinstance(layer, OrthogonalPatches):
        options = {"stride": layer.kernel.shape[-1]}
    elif isinstance(layer, AOLConv2d):
        options = {"stride": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode}
    else:
        left, right, top, bottom = layer.pads
        options = {**layer.options, "padding": (top, left)}
        if layer.circular:
            options["padding_mode"] = "circular"
            if (top, left) != (bottom, right):
                options["padding"] = "same"  # the only way to pad one side more
        elif (top, left) != (bottom, right):
            before, options["padding"] = (nn.ZeroPad2d(layer.pads),), 0
    bias = bias[0] if bias else getattr(layer, "bias", None)
    out_channels, in_channels, *kernel_size = weight.shape
    conv = nn.Conv2d(
        in_channels * options.get("groups", 1),
        out_channels,
        (kernel_size[0], kernel_size[1]),
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    filled = _filled(conv, weight=weight, bias=bias)
    return nn.Sequential(*before, filled) if before else filled


def _residual_linear(layer: Any) -> FoldedResidualLinear:
    weight, output = layer.weights()
    block = FoldedResidualLinear(weight.shape[1], weight.shape[0]).to(weight)
    return _filled(block, weight=weight, bias=layer.bias.flatten(), output=output, q=getattr(layer, "q", None))


def _residual_conv2d(layer: Any) -> FoldedResidualConv2d:
    kernel, output = layer.weights()
    inner, channels, size, _ = kernel.shape
    block = FoldedResidualConv2d(channels, inner, size, layer.stride, layer.padding, layer.padding_mode).to(kernel)
    return _filled(block, kernel=kernel, bias=layer.bias.flatten(), output=output, q=getattr(layer, "q", None))


def _filled(module: Filled, **weights: Tensor | None) -> Filled:
    for name, weight in weights.items():
        if weight is not None:
            getattr(module, name).copy_(weight)
    return module


_EXPLICIT: dict[Any, Callable[[Any], nn.Module]] = {
    OrthogonalLinear.forward: _linear,
    AOLLinear.forward: _linear,
    ExplicitLinear.forward: _linear,
    OrthogonalPatches.forward: _conv2d,
    AOLConv2d.forward: _conv2d,
    ExplicitConv2d.forward: _conv2d,
    ResidualLinear.forward: _residual_linear,
    ResidualConv2d.forward: _residual_conv2d,
}


def _gain(weight: Tensor, gram: Tensor, q: Tensor, norm: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    """The smaller of two bounds on the ``c`` of :func:`lipsim.layers.residual.residual_bound`."""

    def gain(scale: Tensor) -> float:
        c = dominance_gain(gram, q, scale)
        if c <= _DOMINATED:
            return c
        # T W Wᵀ T ⪯ c·T is ‖T^(1/2) W‖² ≤ c: exact for matrices, and dearer.
        root = norm(weight * scale.clamp(min=0).sqrt().view(-1, *[1] * (weight.ndim - 1)))
        return min(c, root * root) if math.isfinite(root) else c

    return gain
