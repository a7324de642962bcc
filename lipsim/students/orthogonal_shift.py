"""The default student: orthogonal maps and sorting, then SLL blocks on the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lipsim.layers import Centering
from lipsim.students.sequence import LayerSequence
from lipsim.students.stages import check_features, check_stages, orthogonal_stages, smooth_head
from lipsim.utils.arguments import records_arguments


@records_arguments()
class OrthogonalShiftNetwork(LayerSequence):
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
        check_stages(widths, depths)
        patch, merge = math.ceil(image_size / grid), 2 ** (len(widths) - 1)
        size = math.ceil(math.ceil(image_size / patch) / merge) * merge
        check_features(widths, size // merge, out_features)
        padding = size * patch - image_size
        layers: list[nn.Module] = [Centering()]
        if padding:
            layers.append(nn.ZeroPad2d((padding // 2, padding - padding // 2) * 2))
        layers += orthogonal_stages(3, widths, depths, patch, of_pixels=True)
        layers += smooth_head(widths[-1], size // merge, out_features, linear_depth, linear_width)
        super().__init__(*layers)
        self.image_size = image_size
        self.out_features = out_features
