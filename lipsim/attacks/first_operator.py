"""The first linear operator that a model applies to an image, with all that comes before it.

Its kernel is what the model cannot see at all (Ozbulak et al., "Exact Feature Collisions in Neural Networks"). What
normalises the input inside the model is part of the operator, so that kernels are of images as the model takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from lipsim.attacks.partial_pass import Reached, run_up_to
from lipsim.layers.encoder import first_weight
from lipsim.layers.orthogonal import OrthogonalLinear, OrthogonalPatches
from lipsim.utils.checks import check_images, taking_images
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision

_PARAMETRIZATIONS = "parametrizations"  # torch's name of what derives the weights of a module
_NORMS = (nn.modules.batchnorm._NormBase,)  # invertible in evaluation mode: what follows them is the operator


@dataclass(frozen=True)
class Patches:
    """The row space and the kernel of a patch embedding, whose windows neither overlap nor are padded.

    Attributes:
        size: height and width of a patch.
        seen: ``(r, 3·h·w)`` orthonormal rows, float64: what the layer sees of a patch.
        unseen: ``(k, 3·h·w)`` orthonormal rows, float64: its kernel.
    """

    size: tuple[int, int]
    seen: Tensor
    unseen: Tensor

    def split(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` as rows ``(N·P, 3·h·w)``; borders that no patch covers are left out."""
        rows: Tensor = F.unfold(x, self.size, stride=self.size).transpose(1, 2).flatten(0, 1)
        return rows

    def join(self, rows: Tensor, border: Tensor) -> Tensor:
        """Images of rows, with the pixels of ``border`` ``(N, 3, H, W)`` where no patch is."""
        (height, width), (h, w) = border.shape[-2:], self.size
        covered = (height // h * h, width // w * w)
        joined = border.clone()
        columns = rows.unflatten(0, (len(border), -1)).transpose(1, 2)
        joined[..., : covered[0], : covered[1]] = F.fold(columns, covered, self.size, stride=self.size)
        return joined


@dataclass(frozen=True)
class FirstOperator:
    """The linear part ``A`` of the first layer with weights that a model applies to an image.

    Attributes:
        name: path of the layer in the model.
        kind: its class.
        image_size: side of the images.
        forward: ``A``, on changes of images ``(N, 3, S, S)``.
        dtype: of the changes that it takes; None: any.
        patches: what a patch embedding sees; None where windows overlap.
        sees_windows: whether a window of a convolution that it answers with 0 is 0 itself, as the weight has as many
            independent rows as a window has values: its kernel holds the pixels that no window reads, and nothing else.
    """

    name: str
    kind: str
    image_size: int
    forward: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None
    patches: Patches | None = None
    sees_windows: bool = False

    def __call__(self, change: Tensor) -> Tensor:
        return self.forward(change)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def check(self, x: Tensor) -> None:
        """Refuse what are no images of this size.

        Raises:
            ValueError: gray images, another size, no floating-point numbers.
        """
        check_images(x, self.image_size)


def first_operator(model: nn.Module, image_size: int) -> FirstOperator | None:
    """Find the first layer with weights that reads the image, together with all that comes before it.

    Any module in evaluation mode will do, whatever it answers: encoders, classifiers, segmenters, detectors. It runs up
    to that layer only. Convolutions and linear layers behind a normalisation of the input become operators of their
    own, which cost what the layer costs; everything else (an image resized inside the model, a layer of another class)
    is run as it is, up to the layer's output. Where a model reads the image in several places, only the first counts.

    Args:
        model: takes images ``(N, 3, image_size, image_size)``.
        image_size: their side.

    Returns:
        The operator; None where it is not affine: a layer that is nonlinear inside, such as an SLL block, which hands
        all of its input on, or a model without weights.

    Raises:
        ValueError: a model that does not take such images.
    """
    weight = first_weight(model)
    probe = torch.zeros(1, 3, image_size, image_size)
    probe = probe if weight is None else probe.to(weight)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, *probe.shape, generator=generator).to(probe)
    with torch.no_grad(), full_precision():
        found = _first_layer(model, probe)
        if found is None:
            return None
        name, layer = found
        with taking_images(type(model).__name__, probe):
            offset = run_up_to(model, layer, probe)
        if not isinstance(offset, Tensor):
            return None
        rows = len(offset)  # a layer may take an image in several pieces, such as tiles, one after another

        def affine(x: Tensor) -> Tensor:
            image: Tensor = run_up_to(model, layer, x)
            return image if rows == 1 else image.unflatten(0, (-1, rows))

        offset = affine(probe)
        apart = torch.cat([affine(a), affine(b)])
        if rows != 1 and not _alike(affine(torch.cat([a, b])), apart, float(apart.abs().max())):
            return None  # pieces of an image are not one after another
        expected, got = affine(a) - 2 * affine(b) + 2 * offset, affine(a - 2 * b)
        if not _alike(got, expected, float((affine(a) - offset).abs().max())):
            return None
        kind, scale = type(layer).__name__, _scale(model, layer, probe, a)
        direct = None if scale is None else _direct(layer, *scale)
        if direct is not None and _alike(direct(a), affine(a) - offset, float(direct(a).abs().max())):
            patches = _patches(layer, scale[0]) if scale is not None else None
            return FirstOperator(name, kind, image_size, direct, None, patches, _sees_windows(layer))
    return FirstOperator(name, kind, image_size, lambda x: affine(x) - offset, probe.dtype)


def require_operator(model: nn.Module, image_size: int) -> FirstOperator:
    """:func:`first_operator`, for callers who cannot do without one.

    Raises:
        ValueError: there is none, or the model does not take such images.
    """
    operator = first_operator(model, image_size)
    if operator is None:
        raise LipsimError(
            f"expected a model whose first layer with weights is linear, got {type(model).__name__}, whose first layer "
            "is not: it has no kernel to move in; look for collisions of a deeper layer instead"
        )
    return operator


def _first_layer(model: nn.Module, probe: Tensor) -> tuple[str, nn.Module] | None:
    """Name and module of the first layer that is called and has weights of its own.

    Raises:
        ValueError: the model fails on the probe before any.
    """

    def record(name: str, layer: nn.Module) -> Callable[..., None]:
        def stop(*_: object) -> None:
            raise Reached((name, layer))

        return stop

    hooks = [
        layer.register_forward_pre_hook(record(name, layer))
        for name, layer in model.named_modules()
        if not isinstance(layer, _NORMS) and _PARAMETRIZATIONS not in name.split(".") and _has_weights_alone(layer)
    ]
    try:
        with taking_images(type(model).__name__, probe):
            model(probe)
    except Reached as found:
        name, layer = found.value
        return name, layer
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _has_weights_alone(layer: nn.Module) -> bool:
    """Whether a module has weights and no layers; what parametrises a weight belongs to it."""
    if any(name != _PARAMETRIZATIONS for name, _ in layer.named_children()):
        return False
    return is_parametrized(layer) or any(True for _ in layer.parameters(recurse=False))


def _alike(got: Tensor, expected: Tensor, scale: float) -> bool:
    tolerance = torch.finfo(got.dtype).eps ** 0.5
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=tolerance, atol=tolerance * scale)


def _scale(model: nn.Module, layer: nn.Module, probe: Tensor, a: Tensor) -> tuple[Tensor, torch.Size] | None:
    """Factors ``(1, 3, 1, 1)`` of the channels and the shape of what the layer gets, if it gets the scaled image."""

    def reads(x: Tensor) -> Any:
        return run_up_to(model, layer, x, output=False)

    offset = reads(probe)
    if not isinstance(offset, Tensor) or offset.numel() != probe.numel() or not offset.is_floating_point():
        return None
    slope = (reads(torch.ones_like(probe)) - offset).view_as(probe)
    factor = slope.mean((2, 3), keepdim=True)
    moved = (reads(a) - offset).view_as(probe)
    scale = float(factor.abs().max())
    if not _alike(slope, factor.expand_as(slope), scale) or not _alike(moved, factor * a, scale):
        return None
    return factor, offset.shape[1:]


def _direct(layer: nn.Module, factor: Tensor, shape: torch.Size) -> Callable[[Tensor], Tensor] | None:
    """The operator without the model around it, in any dtype, of a plain convolution or linear layer."""
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and len(shape) == 3:
        conv = layer

        def convolve(x: Tensor) -> Tensor:
            scaled = (x * factor.to(x)).view(-1, *shape)
            weight = conv.weight.detach().to(x)
            if isinstance(conv.padding, str):
                return F.conv2d(scaled, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            return F.conv2d(scaled, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

        return convolve
    if type(layer) is OrthogonalPatches and len(shape) == 3:
        kernel = layer.weights()[0].detach()
        return lambda x: F.conv2d((x * factor.to(x)).view(-1, *shape), kernel.to(x), stride=kernel.shape[-1])
    if isinstance(layer, OrthogonalLinear) or type(layer) is nn.Linear:
        matrix: Tensor = layer.weights()[0] if isinstance(layer, OrthogonalLinear) else layer.weight
        return lambda x: F.linear((x * factor.to(x)).reshape(-1, *shape), matrix.detach().to(x))
    return None


def _patches(layer: nn.Module, factor: Tensor) -> Patches | None:
    """Row space and kernel of a patch embedding in pixels; None for other layers.

    The rank has the usual tolerance, ``max(rows, cols) · ε · σ_max`` with the ε of the weight's dtype.
    """
    if isinstance(layer, OrthogonalPatches):
        weight = layer.weights()[0].detach()
    elif isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and layer.groups == 1:
        weight = layer.weight.detach()
        if tuple(layer.stride) != tuple(weight.shape[2:]) or any(layer.padding) or set(layer.dilation) != {1}:
            return None
    else:
        return None
    size = (weight.shape[2], weight.shape[3])
    matrix = (weight * factor.to(weight)).double().flatten(1)
    _, values, rows = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((values > max(matrix.shape) * torch.finfo(weight.dtype).eps * values[0]).sum())
    return Patches(size, rows[:rank].contiguous(), rows[rank:].contiguous())


def _sees_windows(layer: nn.Module) -> bool:
    """Whether every group of a convolution's weight has full column rank, with the usual tolerance."""
    if not isinstance(layer, nn.Conv2d):
        return False
    for part in layer.weight.detach().double().chunk(layer.groups):
        matrix = part.flatten(1)
        values = torch.linalg.svdvals(matrix)
        least = max(matrix.shape) * torch.finfo(layer.weight.dtype).eps * values[0]
        if len(matrix) < matrix.shape[1] or values[-1] <= least:
            return False
    return True
