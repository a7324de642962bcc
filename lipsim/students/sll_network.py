"""The published LipSim student: SLL convolutions at full resolution, then SLL linear blocks."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from lipsim.layers import ChannelPadding, ScaledAvgPool2d, SLLConv2d, SLLLinear, Truncation
from lipsim.students.sequence import LayerSequence
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError

# (depth, channels, linear depth, linear inner width); the inner width of every convolution is 5.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "small": (20, 45, 7, 1024),
    "medium": (30, 60, 10, 2048),
    "large": (50, 90, 10, 2048),
    "xlarge": (70, 120, 15, 2048),
}


@records_arguments()
class SLLNetwork(LayerSequence):
    """SLL network of LipSim (Ghazanfari et al. 2024, App. A): ``(N, 3, S, S)`` to ``(N, out_features)``, 1-Lipschitz.

    Zero-padded channels, ``depth`` SLL convolutions at full resolution, two 4 × 4 average pools that preserve the norm
    of constants, ``linear_depth`` SLL linear blocks on all that is left, and the first ``out_features`` of it.

    Its convolutions use their ``q`` as the paper says. Those of the published code do not; it is the case ``q = 0`` of
    this network, and :func:`lipsim.metric.published.convert` makes it that.

    Args:
        image_size: side ``S`` of the input.
        out_features: features to keep, the teacher's dimension.
        channels: width of the convolutions.
        depth: number of convolutional blocks.
        linear_depth: number of linear blocks.
        linear_width: inner width of the linear blocks.
        conv_width: inner width of the convolutional blocks.

    Raises:
        ValueError: the image is too small to leave ``out_features`` features.
    """

    config: dict[str, Any]

    def __init__(
        self,
        image_size: int = 224,
        out_features: int = 1792,
        channels: int = 45,
        depth: int = 20,
        linear_depth: int = 7,
        linear_width: int = 1024,
        conv_width: int = 5,
    ) -> None:
        features = channels * (image_size // 4 // 4) ** 2
        if features < out_features:
            raise LipsimError(
                f"images of {image_size} pixels leave {features} features with {channels} channels, fewer than "
                f"out_features = {out_features}; use larger images, more channels, or fewer out_features"
            )
        super().__init__(
            ChannelPadding(3, channels),
            nn.Sequential(*(SLLConv2d(channels, conv_width) for _ in range(depth))),
            ScaledAvgPool2d(4),
            ScaledAvgPool2d(4),
            nn.Flatten(),
            nn.Sequential(*(SLLLinear(features, linear_width) for _ in range(linear_depth))),
            Truncation(out_features),
        )
        self.image_size = image_size
        self.out_features = out_features

    @classmethod
    def from_preset(cls, name: str, image_size: int = 224, out_features: int = 1792) -> Self:
        """One of the published sizes: small, medium, large, xlarge.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise LipsimError(f"expected a preset out of {', '.join(PRESETS)}, got {name!r}")
        depth, channels, linear_depth, linear_width = PRESETS[name]
        return cls(image_size, out_features, channels, depth, linear_depth, linear_width)
