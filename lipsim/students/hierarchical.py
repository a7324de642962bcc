"""A 1-Lipschitz student that trades full-resolution depth for width: patches first, then few wide blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lipsim.layers import Centering, OrthogonalLinear, SLLConv2d, SLLLinear, SpaceToDepth


class HierarchicalSLL(nn.Sequential):
    """SLL blocks on space-to-depth stages with an orthogonal head, ``(N, 3, S, S) → (N, out_features)``.

    Everything outside the SLL blocks preserves norm, and the blocks start as piecewise reflections, so the network
    contains the best orthonormal linear map of the pixels and costs a small fraction of the published one.

    Args:
        image_size: side ``S`` of the input, a multiple of the product of all blocks.
        out_features: features of the head, the teacher's dimension where it is distilled.
        blocks: side of the space-to-depth block that opens each stage; none: the head sees the pixels themselves.
        depths: SLL convolutions in each stage.
        widths: inner channels of these convolutions, per stage.
        linear_depth: SLL linear blocks after the head.
        linear_width: their inner width.

    Raises:
        ValueError: lists of different lengths, or an image size that the blocks do not divide.
    """

    def __init__(
        self,
        image_size: int = 64,
        out_features: int = 256,
        blocks: Sequence[int] = (4, 2),
        depths: Sequence[int] = (2, 2),
        widths: Sequence[int] = (48, 96),
        linear_depth: int = 2,
        linear_width: int = 256,
    ) -> None:
        if not len(blocks) == len(depths) == len(widths):
            raise ValueError(f"expected blocks, depths and widths of one length, got {blocks}, {depths}, {widths}")
        channels, size = 3, image_size
        layers: list[nn.Module] = [Centering()]
        for block, depth, width in zip(blocks, depths, widths, strict=True):
            if size % block:
                raise ValueError(
                    f"expected an image_size that {list(blocks)} divide one after another, got {image_size}"
                )
            channels, size = channels * block**2, size // block
            layers += [SpaceToDepth(block), nn.Sequential(*(SLLConv2d(channels, width) for _ in range(depth)))]
        layers += [nn.Flatten(), OrthogonalLinear(channels * size**2, out_features)]
        layers += [SLLLinear(out_features, linear_width) for _ in range(linear_depth)]
        super().__init__(*layers)
        self.image_size = image_size
        self.out_features = out_features
        self.config = {
            "image_size": image_size,
            "out_features": out_features,
            "blocks": list(blocks),
            "depths": list(depths),
            "widths": list(widths),
            "linear_depth": linear_depth,
            "linear_width": linear_width,
        }
