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
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torchvision.transforms import Normalize

from lipsim.layers import evaluation_mode
from lipsim.layers.mixing import Branches
from lipsim.layers.norms import matrix_norm_bound, padded_conv_norm_bound
from lipsim.precision import full_precision


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
    """The bound of a whole network, ``total``, and of each of its layers.

    ``total`` is the product over a sequence. Layers inside branches (a mixture) come before the one that combines them.
    """

    total: float
    layers: tuple[LayerBound, ...]

    def __str__(self) -> str:
        rows = [f"{layer.bound:<14.9g}{layer.kind:<20}{layer.name}" for layer in self.layers]
        return "\n".join([*rows, f"{self.total:<14.9g}total"])


def lipschitz_bound(module: nn.Module, image_size: int) -> LipschitzReport:
    """Bound the Lipschitz constant (ℓ2 to ℓ2) of ``module`` on images ``(N, 3, image_size, image_size)``.

    ``nn.Sequential`` multiplies the bounds of its children, :class:`lipsim.layers.Branches` combine them; a module with
    a method ``lipschitz_bound()`` declares its own; common layers of ``torch.nn`` are bounded here. Subclasses of those
    are not trusted, they may compute anything.

    Raises:
        UnboundedModuleError: some part of it has no known bound, or one that is not finite; weights in half precision.
    """
    layers: list[LayerBound] = []
    parameter = next(module.parameters(), torch.empty(0))
    x = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad(), full_precision(), evaluation_mode(module):
        _, total = _walk(module, x, "", layers)
    return LipschitzReport(total, tuple(layers))


def conv2d_bound(conv: nn.Conv2d, input_size: tuple[int, int]) -> float:
    """Bound of a convolution on inputs ``(C, *input_size)``, for any stride, dilation, groups and padding.

    Tight up to boundary effects for zero and circular padding; copying pixels, as other padding does, counts in full.
    """
    (top, bottom), (left, right) = (_padding(conv, axis) for axis in (0, 1))
    return padded_conv_norm_bound(
        conv.weight.cpu(),
        input_size,
        (left, right, top, bottom),
        conv.padding_mode,
        conv.stride,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
    )


def linear_bound(linear: nn.Linear) -> float:
    """Largest singular value of the weight."""
    return matrix_norm_bound(linear.weight.cpu())


def _walk(module: Any, x: Tensor, name: str, layers: list[LayerBound]) -> tuple[Tensor, float]:
    """Run a module on ``x`` and bound it; returns the output and the bound, and appends a row for each layer."""
    title = f"{type(module).__name__} at '{name or 'the top'}'"
    _check(module, title)
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        bound = 1.0
        # Not named_children(), which passes over a module that is used twice.
        for child_name, child in module._modules.items():
            x, factor = _walk(child, x, _join(name, child_name), layers)
            bound *= factor * (1 + 1e-15)
        return x, bound
    if isinstance(module, Branches) and type(module).lipschitz_bound is Branches.lipschitz_bound:
        _check_branches(module, title)
        bounds = [_walk(child, x, _join(name, part), layers)[1] for part, child in module.branches().items()]
        bound = module.combine(bounds)
    elif hasattr(module, "lipschitz_bound"):
        bound = module.lipschitz_bound()
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
    return module(x), float(bound)


def _check(module: nn.Module, title: str) -> None:
    """Refuse what no bound of a class covers: a forward replaced or hooked, weights in half precision or not finite."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks)
    if any(hooks) or "forward" in vars(module):
        raise UnboundedModuleError(
            f"{title} has forward hooks or a forward of its own, which may compute anything; remove them to audit it"
        )
    # A sequence is checked by its children; of other modules nothing inside is seen again.
    recurse = not isinstance(module, (nn.Sequential, Branches))
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise UnboundedModuleError(
                f"{title} has weights in half precision ({tensor.dtype}), whose rounding no bound covers; store them "
                "in float32 or float64"
            )
        if not torch.isfinite(tensor).all():
            raise UnboundedModuleError(f"{title} has non-finite weights")


def _check_branches(module: Branches, title: str) -> None:
    for child in module.modules():
        if getattr(child, "inplace", False):
            raise UnboundedModuleError(
                f"{title} holds a {type(child).__name__} that changes in place what the other branches read"
            )


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _padding(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    """Pixels before and after, along one axis."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return int(conv.padding[axis]), int(conv.padding[axis])


def _leaky_relu_bound(module: nn.LeakyReLU) -> float:
    return max(1.0, abs(module.negative_slope))


def _flatten_bound(module: nn.Flatten) -> float:
    # Flattening the batch as well would mix samples.
    return 1.0 if module.start_dim == 1 else math.inf


def _normalize_bound(module: Normalize) -> float:
    # torchvision divides by the deviations as float32 rounds them.
    return 1 / min(abs(float(std)) for std in module.std) * (1 + 2**-22)


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
