"""The default student: orthogonal maps and sorting, then SLL blocks on the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers import Centering, ChannelShift, MaxMin, OrthogonalLinear, OrthogonalPatches, SLLLinear
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError


@records_arguments()
class OrthogonalShiftNetwork(nn.Sequential):
    """1-Lipschitz network that preserves norm, ``(N, 3, S, S) → (N, out_features)``, for any image size.

    The image is cut into ``grid × grid`` patches, each mapped by one orthonormal matrix. A block rolls groups of
    channels by one pixel, mixes the channels orthogonally and sorts pairs, which together is an orthogonal convolution
    over five neighbours at the price of a 1 × 1 one. Between stages 2 × 2 neighbours are merged. A wide orthonormal
    head and SLL blocks follow. Nothing before the SLL blocks loses norm but what the orthonormal rows drop.

    It starts close to a linear map of low frequencies, where natural images have their energy: patches keep their
    lowest discrete cosines, blocks are near the identity, merging is near the mean, and the head's rows are smooth.
    ``benchmarks/README.md`` has what it was chosen by.

    Args:
        image_size: side ``S`` of the input, padded with grey where patches do not divide it.
        out_features: features of the head, at most ``widths[-1]·(grid/2^(stages − 1))²``.
        grid: patches along a side.
        widths: channels of each stage, even.
        depths: blocks of each stage.
        linear_depth: SLL blocks after the head.
        linear_width: their inner width.

    Raises:
        ValueError: lists of different lengths or none, an odd width, or more features than the last stage holds.
    """

    config: dict[str, Any]

    def __init__(
        self,
        image_size: int = 64,
        out_features: int = 256,
        grid: int = 8,
        widths: Sequence[int] = (96, 192),
        depths: Sequence[int] = (2, 2),
        linear_depth: int = 2,
        linear_width: int = 256,
    ) -> None:
        if not len(widths) == len(depths) > 0:
            raise LipsimError(f"expected widths and depths of one length, one stage at least, got {widths}, {depths}")
        if any(width % 2 for width in widths):
            raise LipsimError(f"expected even widths, got {list(widths)}")
        patch, merge = math.ceil(image_size / grid), 2 ** (len(widths) - 1)
        size = math.ceil(math.ceil(image_size / patch) / merge) * merge
        held = widths[-1] * (size // merge) ** 2
        if held < out_features:
            raise LipsimError(
                f"expected at most {held} out_features, what the last stage holds, got {out_features}; "
                "use a finer grid or wider stages"
            )
        padding = size * patch - image_size
        layers: list[nn.Module] = [Centering()]
        if padding:
            layers.append(nn.ZeroPad2d((padding // 2, padding - padding // 2) * 2))
        channels = 3
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            side = 2 if stage else patch
            size = size // 2 if stage else size
            layers += [_patches(channels, width, side, first=not stage), MaxMin()]
            for _ in range(depth):
                layers += [ChannelShift(width), _mixing(width), MaxMin()]
            channels = width
        head = OrthogonalLinear(channels * size**2, out_features)
        _smooth_rows_(head.weight, channels, size)
        layers += [nn.Flatten(), head, *(SLLLinear(out_features, linear_width) for _ in range(linear_depth))]
        super().__init__(*layers)
        self.image_size = image_size
        self.out_features = out_features


def _patches(channels: int, width: int, side: int, first: bool) -> OrthogonalPatches:
    """The map that opens a stage: a random rotation of the lowest frequencies, or nearly those themselves."""
    layer, fan_in = OrthogonalPatches(channels, width, side), channels * side**2
    with torch.no_grad():
        if width <= fan_in:
            lowest = _lowest_frequencies(channels, side, width)
            if first:
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
