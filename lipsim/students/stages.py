"""Orthogonal stages and the head after them, which students are built of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers import ChannelShift, MaxMin, OrthogonalLinear, OrthogonalPatches, SLLLinear
from lipsim.utils.errors import LipsimError


def check_stages(widths: Sequence[int], depths: Sequence[int]) -> None:
    """Refuse lists of different lengths or none, and odd widths, which sorting in pairs cannot take."""
    if not len(widths) == len(depths) > 0:
        raise LipsimError(f"expected widths and depths of one length, one stage at least, got {widths}, {depths}")
    if any(width % 2 for width in widths):
        raise LipsimError(f"expected even widths, got {list(widths)}")


def check_features(widths: Sequence[int], size: int, out_features: int) -> None:
    """Refuse more features than ``size × size`` places of the last stage hold."""
    held = widths[-1] * size**2
    if held < out_features:
        raise LipsimError(
            f"expected at most {held} out_features, what the last stage holds, got {out_features}; "
            "use a finer grid or wider stages"
        )


def orthogonal_stages(
    channels: int, widths: Sequence[int], depths: Sequence[int], patch: int = 1, *, of_pixels: bool
) -> list[nn.Module]:
    """Stages of orthogonal convolutions over five neighbours, sorted in pairs; each but the first halves the sides.

    Args:
        channels: channels of the input.
        widths: channels of each stage, even.
        depths: blocks of each stage.
        patch: side of the patches that the first stage reads.
        of_pixels: whether these are of pixels, whose lowest frequencies it starts from, turned at random.
    """
    layers: list[nn.Module] = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        layers += [_patches(channels, width, 2 if stage else patch, of_pixels and not stage), MaxMin()]
        for _ in range(depth):
            layers += [ChannelShift(width), _mixing(width), MaxMin()]
        channels = width
    return layers


def smooth_head(channels: int, size: int, out_features: int, linear_depth: int, linear_width: int) -> list[nn.Module]:
    """An orthonormal map of ``(N, channels, size, size)`` that starts with smooth rows, and SLL blocks after it."""
    head = OrthogonalLinear(channels * size**2, out_features)
    _smooth_rows_(head.weight, channels, size)
    return [nn.Flatten(), head, *(SLLLinear(out_features, linear_width) for _ in range(linear_depth))]


def _patches(channels: int, width: int, side: int, of_pixels: bool) -> OrthogonalPatches:
    """The map that opens a stage: a random rotation of the lowest frequencies, or nearly those themselves."""
    layer, fan_in = OrthogonalPatches(channels, width, side), channels * side**2
    with torch.no_grad():
        if width <= fan_in:
            lowest = _lowest_frequencies(channels, side, width)
            if of_pixels:
                lowest = nn.init.orthogonal_(torch.empty(width, width)) @ lowest
            else:
                lowest = lowest + 0.01 * fan_in**-0.5 * torch.randn(width, fan_in)
            layer.kernel.copy_(lowest.view_as(layer.kernel))
        _spread_(layer)
    return layer


def _mixing(width: int) -> OrthogonalPatches:
    layer = OrthogonalPatches(width, width)
    with torch.no_grad():
        layer.kernel.mul_(0.05).add_(torch.eye(width).view_as(layer.kernel))
        _spread_(layer)
    return layer


def _spread_(layer: OrthogonalPatches) -> None:
    """Small biases, so that the pairs of a sorting do not all cross at the same point."""
    assert layer.bias is not None
    layer.bias.uniform_(-0.1, 0.1)


def _smooth_rows_(weight: Tensor, channels: int, size: int) -> None:
    """Colour random rows ``(D, channels·size²)`` by ``1/(1 + frequency)`` over the grid."""
    with torch.no_grad():
        basis, frequency = _cosines(size), torch.arange(size)
        planes = weight.view(-1, channels, size, size) / (1 + torch.hypot(frequency[:, None].float(), frequency))
        weight.copy_(F.normalize((basis.mT @ planes @ basis).flatten(1), dim=1))


def _cosines(size: int) -> Tensor:
    """Orthonormal DCT-II, ``(size, size)``, rows by rising frequency."""
    frequency = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (frequency + 0.5) * frequency[:, None] / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.to(torch.get_default_dtype())


def _lowest_frequencies(channels: int, side: int, rows: int) -> Tensor:
    """The two-dimensional DCT functions of lowest frequency of patches, ``(rows, channels·side²)``, orthonormal."""
    basis, frequency = _cosines(side), torch.arange(side)
    order = (frequency[:, None] ** 2 + frequency**2).flatten().repeat(channels).argsort(stable=True)[:rows]
    channel, index = order // side**2, order % side**2
    start = torch.zeros(rows, channels, side**2)
    start[torch.arange(rows), channel] = torch.kron(basis, basis)[index]
    return start.flatten(1)
