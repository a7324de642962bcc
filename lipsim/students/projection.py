"""One learned orthonormal linear map of the pixels: the baseline that every table carries."""

from __future__ import annotations

from typing import Any

from torch import nn

from lipsim.layers import Centering, OrthogonalLinear
from lipsim.students.sequence import LayerSequence
from lipsim.utils.arguments import records_arguments


@records_arguments()
class OrthogonalProjection(LayerSequence):
    """Affine map with orthonormal rows, ``(N, 3, S, S) → (N, out_features)``, 1-Lipschitz and no network at all.

    Args:
        image_size: side ``S`` of the input.
        out_features: features, at most ``3·S²``.
    """

    config: dict[str, Any]

    def __init__(self, image_size: int = 64, out_features: int = 256) -> None:
        super().__init__(Centering(), nn.Flatten(), OrthogonalLinear(3 * image_size**2, out_features))
        self.image_size = image_size
        self.out_features = out_features
