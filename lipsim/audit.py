"""An upper bound on the Lipschitz constant of a module, layer by layer, in float64 and rounded up.

Nothing here is an estimate: no power iteration, which bounds from below. A module that the audit cannot bound is
refused by name, and so is every certificate that would stand on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from lipsim.precision import full_precision

_ROUND_UP = 1 + 1e-12  # above the rounding of the float64 products, FFTs and SVDs used here


class UnboundedModuleError(ValueError):
    """A module has no known Lipschitz bound."""


@dataclass(frozen=True)
class LayerBound:
    """One row of a report: the module's path in the network, its class, and its bound."""

    name: str
    kind: str
    bound: float


@dataclass(frozen=True)
class LipschitzReport:
    """The bound of a whole network, ``total``, and of each of its layers."""

    total: float
    layers: tuple[LayerBound, ...]

    def __str__(self) -> str:
        rows = [f"{layer.bound:<14.9g}{layer.kind:<20}{layer.name}" for layer in self.layers]
        return "\n".join([*rows, f"{self.total:<14.9g}total"])


def lipschitz_bound(module: nn.Module, image_size: int) -> LipschitzReport:
    """Bound the Lipschitz constant (ℓ2 to ℓ2) of ``module`` on images ``(N, 3, image_size, image_size)``.

    ``nn.Sequential`` multiplies the bounds of its children; a module with a method ``lipschitz_bound()`` declares its
    own; common layers of ``torch.nn`` are bounded here. Subclasses of those are not trusted, they may compute anything.

    Raises:
        UnboundedModuleError: some part of it has no known bound, or one that is not finite.
    """
    layers: list[LayerBound] = []
    parameter = next(module.parameters(), torch.empty(0))
    x = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), full_precision():
            _walk(module, x, "", layers)
    finally:
        module.train(training)
    return LipschitzReport(math.prod(layer.bound for layer in layers) * (1 + len(layers) * 1e-15), tuple(layers))


def conv2d_bound(conv: nn.Conv2d, input_size: tuple[int, int]) -> float:
    """Bound of a zero-padded convolution on inputs ``(C, H, W)``, tight up to boundary effects.

    A stride ``s`` becomes stride 1 on the ``s × s`` polyphase components, which is a permutation of the input. The
    padded operator is a restriction of the circular one on a torus large enough that nothing wraps around, and that one
    is diagonalised by the FFT: its norm is the largest singular value over all frequencies (Sedghi et al. 2019).

    Raises:
        UnboundedModuleError: dilation, groups or a padding mode that this diagonalisation does not cover.
    """
    if conv.padding_mode != "zeros" or set(conv.dilation) != {1} or conv.groups != 1:
        raise UnboundedModuleError("Conv2d is bounded for zero padding, dilation 1 and groups 1 only")
    kernel = conv.weight.detach().double().cpu()
    stride_h, stride_w = conv.stride
    pad_h, pad_w = (-kernel.shape[2] % stride_h, -kernel.shape[3] % stride_w)
    kernel = nn.functional.pad(kernel, (0, pad_w, 0, pad_h))
    out_channels, in_channels, height, width = kernel.shape
    kernel = kernel.view(out_channels, in_channels, height // stride_h, stride_h, width // stride_w, stride_w)
    kernel = kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    # The torus holds the padded input in units of strides, plus the reach of the kernel.
    padding = [0, 0] if conv.padding == "valid" else [conv.kernel_size[0], conv.kernel_size[1]]
    torus = [
        -(-(size + 2 * pad) // stride) + taps
        for size, pad, stride, taps in zip(input_size, padding, conv.stride, kernel.shape[2:], strict=True)
    ]
    spectrum = torch.fft.rfft2(kernel, s=torus).permute(2, 3, 0, 1)
    return float(torch.linalg.svdvals(spectrum).max()) * _ROUND_UP


def linear_bound(linear: nn.Linear) -> float:
    """Largest singular value of the weight, by a full SVD."""
    return float(torch.linalg.matrix_norm(linear.weight.detach().double().cpu(), ord=2)) * _ROUND_UP


def _walk(module: Any, x: Tensor, name: str, layers: list[LayerBound]) -> Tensor:
    title = f"{type(module).__name__} at '{name or 'the top'}'"
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnboundedModuleError(f"{title} has forward hooks, which may compute anything; remove them to audit it")
    if not all(torch.isfinite(parameter).all() for parameter in module.parameters(recurse=False)):
        raise UnboundedModuleError(f"{title} has non-finite weights")
    if hasattr(module, "lipschitz_bound"):
        bound = module.lipschitz_bound()
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # Not named_children(), which passes over a module that is used twice.
        for child_name, child in module._modules.items():
            x = _walk(child, x, f"{name}.{child_name}" if name else child_name, layers)
        return x
    elif type(module) is nn.Conv2d:
        bound = conv2d_bound(module, (x.shape[-2], x.shape[-1]))
    elif type(module) in _BOUNDS:
        bound = _BOUNDS[type(module)](module)
    else:
        raise UnboundedModuleError(
            f"no Lipschitz bound is known for {title}; use layers of lipsim.layers, or give the module a method "
            "lipschitz_bound() that returns a proven one"
        )
    if not 0 <= bound < math.inf:
        raise UnboundedModuleError(f"{title} has no finite Lipschitz bound, it says {bound}")
    layers.append(LayerBound(name, type(module).__name__, float(bound)))
    return module(x)


def _leaky_relu_bound(module: nn.LeakyReLU) -> float:
    return max(1.0, abs(module.negative_slope))


def _flatten_bound(module: nn.Flatten) -> float:
    # Flattening the batch as well would mix samples.
    return 1.0 if module.start_dim == 1 else math.inf


def _normalize_bound(module: Normalize) -> float:
    return 1 / min(abs(float(std)) for std in module.std) * _ROUND_UP


_BOUNDS: dict[type[nn.Module], Callable[..., float]] = {
    nn.Linear: linear_bound,
    nn.LeakyReLU: _leaky_relu_bound,
    nn.Flatten: _flatten_bound,
    Normalize: _normalize_bound,
    **dict.fromkeys(
        # Not nn.Softplus: it jumps where it turns into the identity.
        (nn.Identity, nn.ReLU, nn.Tanh, nn.ZeroPad2d, nn.PixelShuffle, nn.PixelUnshuffle),
        lambda _: 1.0,
    ),
}
