"""A student on deel-torchlip's spectrally normalised layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lipsim.layers import Centering, MaxMin, SpaceToDepth, SpectralConv2d, SpectralLinear
from lipsim.students.sequence import LayerSequence
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError


@records_arguments()
class TorchlipNetwork(LayerSequence):
    """Spectral 1 × 1 convolutions between invertible down-samplings, ``(N, 3, S, S) → (N, out_features)``.

    Serrurier et al. 2021 (deel-torchlip). Each stage moves ``block × block`` patches into channels and mixes them with
    orthonormal 1 × 1 convolutions and sorted pairs (GroupSort), so pixels meet by down-sampling; larger kernels of this
    package waste a third of the budget in each layer (see :class:`lipsim.layers.SpectralConv2d`).

    Args:
        image_size: side ``S`` of the input, a multiple of the product of all blocks.
        out_features: features of the head.
        blocks: side of the down-sampling that opens each stage.
        depths: convolutions in each stage.
        widths: their channels, even, per stage.

    Raises:
        ValueError: lists of different lengths, an odd width, or an image size that the blocks do not divide.
    """

    config: dict[str, Any]

    def __init__(
        self,
        image_size: int = 64,
        out_features: int = 256,
        blocks: Sequence[int] = (4, 2, 2),
        depths: Sequence[int] = (2, 2, 2),
        widths: Sequence[int] = (48, 192, 512),
    ) -> None:
        if not len(blocks) == len(depths) == len(widths):
            raise LipsimError(f"expected blocks, depths and widths of one length, got {blocks}, {depths}, {widths}")
        if any(width % 2 for width in widths):
            raise LipsimError(f"expected even widths, got {list(widths)}")
        channels, size = 3, image_size
        layers: list[nn.Module] = [Centering()]
        for block, depth, width in zip(blocks, depths, widths, strict=True):
            if size % block:
                raise LipsimError(
                    f"expected an image_size that {list(blocks)} divide one after another, got {image_size}"
                )
            channels, size = channels * block**2, size // block
            stage: list[nn.Module] = []
            for _ in range(depth):
                stage += [SpectralConv2d(channels, width), MaxMin()]
                channels = width
            layers += [SpaceToDepth(block), nn.Sequential(*stage)]
        super().__init__(*layers, nn.Flatten(), SpectralLinear(channels * size**2, out_features))
        self.image_size = image_size
        self.out_features = out_features
