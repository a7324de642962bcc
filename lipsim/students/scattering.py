"""Students that see the moduli of wavelets: one that is not trained at all, and a network on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lipsim.certificates.numbers import check_count
from lipsim.layers import Centering, Scattering
from lipsim.students.sequence import LayerSequence
from lipsim.students.stages import check_features, check_stages, orthogonal_stages, smooth_head
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError


@records_arguments()
class ScatteringTransform(LayerSequence):
    """First-order scattering as features, ``(N, 3, S, S) → (N, D)``: a certified metric that nobody has to train.

    It agrees with votes of people about materials a little more often than SSIM, and as often as a network with
    ImageNet weights or more (``docs/scattering.md``). It compares what oriented texture of each octave there is in each
    cell of a grid, and little of the colours.

    Args:
        image_size: side ``S`` of the input.
        grid: cells along a side.
        scales: octaves, by default as many as reach the cells.
        orientations: wavelets of each octave.
        low: factor of the coarse colours, in [0, 1]; see :class:`lipsim.layers.Scattering`.
    """

    config: dict[str, Any]

    def __init__(
        self, image_size: int = 64, grid: int = 8, scales: int | None = None, orientations: int = 8, low: float = 0.05
    ) -> None:
        moduli = Scattering(image_size, grid, scales, orientations, low)
        super().__init__(Centering(), moduli, nn.Flatten())
        self.image_size = image_size
        self.out_features = 3 * moduli.maps * grid**2


@records_arguments()
class ScatteringNetwork(LayerSequence):
    """Orthogonal stages on first-order scattering, ``(N, 3, S, S) → (N, out_features)``.

    The stages are those of :class:`lipsim.students.OrthogonalShiftNetwork`, which reads patches of pixels in place of
    moduli.

    Args:
        image_size: side ``S`` of the input.
        out_features: features of the head, at most ``widths[-1]·(grid/2^(stages − 1))²``.
        grid: cells along a side, a multiple of ``2^(stages − 1)``.
        scales: octaves of wavelets, by default as many as reach the cells.
        orientations: wavelets of each octave.
        low: factor of the coarse colours, in [0, 1]; see :class:`lipsim.layers.Scattering`.
        widths: channels of each stage, even.
        depths: blocks of each stage.
        linear_depth: SLL blocks after the head.
        linear_width: their inner width.

    Raises:
        ValueError: lists of different lengths or none, an odd width, a grid that the stages do not divide, more
            features than the last stage holds, or what :class:`lipsim.layers.Scattering` refuses.
    """

    config: dict[str, Any]

    def __init__(
        self,
        image_size: int = 64,
        out_features: int = 256,
        grid: int = 8,
        scales: int | None = None,
        orientations: int = 8,
        low: float = 1.0,
        widths: Sequence[int] = (100, 192),
        depths: Sequence[int] = (2, 2),
        linear_depth: int = 2,
        linear_width: int = 256,
    ) -> None:
        check_stages(widths, depths)
        grid = check_count("grid", grid)
        size, left = divmod(grid, 2 ** (len(widths) - 1))
        if left or not size:
            raise LipsimError(f"expected a grid that {len(widths)} stages divide, got {grid}")
        check_features(widths, size, out_features)
        moduli = Scattering(image_size, grid, scales, orientations, low)
        super().__init__(
            Centering(),
            moduli,
            *orthogonal_stages(3 * moduli.maps, widths, depths, of_pixels=False),
            *smooth_head(widths[-1], size, out_features, linear_depth, linear_width),
        )
        self.image_size = image_size
        self.out_features = out_features
