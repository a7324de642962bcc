"""An upper bound on the Lipschitz constant of a module, layer by layer, in float64 and rounded up.

Nothing in a bound is an estimate: power iteration, which bounds from below, can only refuse one. A module that the
audit cannot bound is refused by name, and so is every certificate that would stand on it.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipsim import layers
from lipsim.audit import cross_check, trust
from lipsim.layers import evaluation_mode
from lipsim.layers.base import FoldedLayer
from lipsim.layers.mixing import Branches
from lipsim.layers.norms import matrix_norm_bound, padded_conv_norm_bound
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


class UnboundedModuleError(LipsimError):
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

    ``nn.Sequential`` multiplies the bounds of its children, :class:`lipsim.layers.Branches` combine them; a module
    whose class has a method ``lipschitz_bound()`` declares its own, for every input; common layers of ``torch.nn`` are
    bounded here.

    A declaration counts for the class that makes it: a subclass that changes what runs has to declare its own, and
    subclasses of ``torch.nn`` layers are not trusted, they may compute anything. Neither are hooks, methods that were
    replaced, and bounds that some inputs exceed (see :mod:`lipsim.audit.trust` and :mod:`lipsim.audit.cross_check`).

    Raises:
        UnboundedModuleError: some part of it has no known bound, one that is not finite, or one that does not hold;
            weights in half precision or not finite.

    Example:
        >>> half = nn.Linear(3 * 8 * 8, 4)
        >>> half.weight.data = torch.eye(4, 3 * 8 * 8) / 2
        >>> report = lipschitz_bound(nn.Sequential(nn.Flatten(), half, nn.ReLU()), image_size=8)
        >>> print(f"{report.total:.4f}", [layer.kind for layer in report.layers])
        0.5000 ['Flatten', 'Linear', 'ReLU']
    """
    _take_in_torchvision()
    rows: list[LayerBound] = []
    tensors = (*module.parameters(), *module.buffers())
    weights = (t for t in tensors if t.dtype in (torch.float32, torch.float64) and not t.is_meta)
    like = next(weights, torch.empty(0))
    with torch.inference_mode(False), torch.no_grad(), full_precision(), evaluation_mode(module), ExitStack() as folds:
        image = cross_check.sample_image(image_size, like.dtype, like.device)
        features, total = _walk(module, image, "", rows, folds)
        if not math.isfinite(total):
            raise UnboundedModuleError("the product of all bounds is not finite; use layers with smaller weights")
        if not cross_check.agree(module(image.clone()), features, image, total):
            raise UnboundedModuleError(
                f"{_title(module, '')} does not compute what its layers do one after another; audit it without what "
                "comes between them"
            )
    return LipschitzReport(total, tuple(rows))


def conv2d_bound(conv: nn.Conv2d, input_size: tuple[int, int]) -> float:
    """Bound of a convolution on inputs ``(C, *input_size)``, for any stride, dilation, groups and padding.

    Tight up to boundary effects for zero and circular padding; copying pixels, as other padding does, counts in full.
    """
    return padded_conv_norm_bound(
        conv.weight.cpu(),
        input_size,
        # What forward pads with, where it copies pixels: padding itself is for show there.
        tuple(conv._reversed_padding_repeated_twice),  # type: ignore[arg-type]
        conv.padding_mode,
        _pair(conv.stride),
        _pair(conv.dilation),
        conv.groups,
    )


def linear_bound(linear: nn.Linear) -> float:
    """Largest singular value of the weight."""
    return matrix_norm_bound(linear.weight.cpu())


def _walk(module: nn.Module, x: Tensor, name: str, rows: list[LayerBound], folds: ExitStack) -> tuple[Tensor, float]:
    """Run a module on ``x`` and bound it; returns the output and the bound, and appends a row for each layer."""
    title = _title(module, name)
    if not isinstance(module, nn.Module):
        raise UnboundedModuleError(f"expected a module at {name!r}, got {module!r}")
    _refuse(trust.fault(module), title)
    kind = type(module)
    if issubclass(kind, nn.Sequential) and trust.redefinition(kind, nn.Sequential) is None:
        if type(module._modules) not in (dict, OrderedDict):
            raise UnboundedModuleError(
                f"{title} keeps its children in a {type(module._modules).__name__}, not in a dict"
            )
        bound = 1.0
        # Not named_children(), which passes over a module that is used twice.
        for child_name, child in module._modules.items():
            x, factor = _walk(child, x, _join(name, child_name), rows, folds)  # type: ignore[arg-type]
            bound = _product(bound, factor)
        return x, bound
    declares = trust.definer(kind, "lipschitz_bound")
    if declares is not None:
        _check_inside(module, title)
        _fold(module, folds)
    if declares is Branches:
        bound = _combined(module, x, name, rows, folds)  # type: ignore[arg-type]
    elif declares is not None:
        bound = _declared(module, title)
    elif kind is nn.Conv2d:
        bound = conv2d_bound(module, (x.shape[-2], x.shape[-1]))  # type: ignore[arg-type]
    elif kind in _BOUNDS:
        bound = _BOUNDS[kind](module)
    else:
        raise UnboundedModuleError(
            f"no Lipschitz bound is known for {title}; use layers of lipsim.layers, or give the module a method "
            "lipschitz_bound() that returns a proven one"
        )
    if not 0 <= bound < math.inf:
        raise UnboundedModuleError(f"{title} has no finite Lipschitz bound, it says {bound}")
    # The layers above are proven in their tests: enough to see that what they call was not replaced.
    output, fault = cross_check.check(module, x, bound, iterations=0 if trust.is_remembered(kind) else 3)
    _refuse(fault, title)
    rows.append(LayerBound(name, kind.__name__, bound))
    return output, bound


def _combined(module: Branches, x: Tensor, name: str, rows: list[LayerBound], folds: ExitStack) -> float:
    _check_branches(module, _title(module, name))
    bounds = []
    for part, child in module.branches().items():
        bounds.append(_walk(child, x, _join(name, part), rows, folds)[1])
        read = x.clone()
        before = read._version
        child(read)
        if read._version != before or not torch.equal(read, x):
            raise UnboundedModuleError(
                f"{_title(module, name)} holds a {type(child).__name__} that changes in place what the other branches "
                "read"
            )
    return module.combine(bounds)


def _declared(module: nn.Module, title: str) -> float:
    bound = module.lipschitz_bound()  # type: ignore[operator]
    if not isinstance(bound, int | float | Tensor):
        raise UnboundedModuleError(f"{title} declares a {type(bound).__name__} as its bound, expected a number")
    return float(bound)


def _check_inside(module: nn.Module, title: str) -> None:
    """Check what a module declares by its class, and whatever its declaration rests on."""
    for name, part in module.named_modules():
        where = f"{_title(part, name)} of {title}" if name else title
        if name:
            _refuse(trust.fault(part), where)
        base = trust.definer(type(part), "lipschitz_bound")
        base = trust.definer(type(part), "combine") if base is Branches else base
        changed = base and trust.redefinition(type(part), base)
        if base and changed:
            raise UnboundedModuleError(
                f"{where} redefines {changed}, while its bound is that of {base.__name__}; give "
                f"{changed.partition('.')[0]} a lipschitz_bound() of its own"
            )


def _fold(module: nn.Module, folds: ExitStack) -> None:
    """Derive weights once for the bound and all that runs, and forget them after the audit."""
    for layer in module.modules():
        if isinstance(layer, FoldedLayer) and not layer._folded:
            layer.freeze()
            folds.callback(layer.unfold)


def _refuse(fault: str | None, title: str) -> None:
    if fault:
        raise UnboundedModuleError(f"{title} {fault}")


def _product(bound: float, factor: float) -> float:
    """Rounded up, also where the product is too small for a normal number."""
    return math.nextafter(bound * factor, math.inf) if bound and factor else 0.0


def _check_branches(module: Branches, title: str) -> None:
    for child in module.modules():
        if getattr(child, "inplace", False):
            raise UnboundedModuleError(
                f"{title} holds a {type(child).__name__} that changes in place what the other branches read"
            )


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _title(module: object, name: str) -> str:
    return f"{type(module).__name__} at '{name or 'the top'}'"


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _leaky_relu_bound(module: nn.LeakyReLU) -> float:
    slope = abs(float(module.negative_slope))
    return slope if math.isnan(slope) else max(1.0, slope)


def _flatten_bound(module: nn.Flatten) -> float:
    # Flattening the batch as well would mix samples.
    return 1.0 if module.start_dim == 1 else math.inf


def _normalize_bound(module: nn.Module) -> float:
    std: Any = module.std
    # torchvision divides by the deviations as the dtype of the image rounds them.
    smallest = min(float(torch.as_tensor(std, dtype=d).abs().min()) for d in (torch.float32, torch.float64))
    return math.nextafter(1 / smallest, math.inf) if smallest else math.inf


_BOUNDS: dict[type[nn.Module], Callable[..., float]] = {
    nn.Linear: linear_bound,
    nn.LeakyReLU: _leaky_relu_bound,
    nn.Flatten: _flatten_bound,
    **dict.fromkeys(
        # Not nn.Softplus: it jumps where it turns into the identity.
        (nn.Identity, nn.ReLU, nn.Tanh, nn.ZeroPad2d, nn.PixelShuffle, nn.PixelUnshuffle),
        lambda _: 1.0,
    ),
}


def _take_in_torchvision() -> None:
    """Know torchvision's Normalize too, where torchvision is loaded: importing it here would take seconds.

    What replaced its forward before it was first seen here comes from another file, and is not taken in.
    """
    transforms = sys.modules.get("torchvision.transforms.transforms")
    normalize = getattr(transforms, "Normalize", None)
    if transforms is None or normalize is None or normalize in _BOUNDS:
        return
    if getattr(getattr(normalize.forward, "__code__", None), "co_filename", None) == transforms.__file__:
        _BOUNDS[normalize] = _normalize_bound
        trust.remember((normalize,))


trust.remember((nn.Sequential, nn.Conv2d, *_BOUNDS))
trust.remember(value for value in vars(layers).values() if isinstance(value, type))
