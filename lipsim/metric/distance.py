"""What is compared, attacked and scored: a distance between images, with features and certificates or without."""

from __future__ import annotations

from typing import Protocol, TypeGuard

from torch import Tensor

from lipsim.metric.perceptual_metric import PerceptualMetric


class Distance(Protocol):
    """Any function of two batches of images: SSIM, LPIPS, a :class:`lipsim.PerceptualMetric`."""

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Distances ``(N,)`` between images ``(N, 3, H, W)``."""
        ...


def has_features(distance: Distance) -> TypeGuard[PerceptualMetric]:
    """Whether a distance is one of features that can be computed once and compared many times."""
    return isinstance(distance, PerceptualMetric)
