"""What is compared, attacked and scored: a distance between images, with features and certificates or without."""

from __future__ import annotations

from os import PathLike
from typing import Protocol, TypeGuard

from torch import Tensor

from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError


class Distance(Protocol):
    """Any function of two batches of images: SSIM, LPIPS, a :class:`lipsim.PerceptualMetric`."""

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Distances ``(N,)`` between images ``(N, 3, H, W)``."""
        ...


def has_features(distance: Distance) -> TypeGuard[PerceptualMetric]:
    """Whether a distance is one of features that can be computed once and compared many times."""
    return isinstance(distance, PerceptualMetric)


def require_metric(*values: object) -> None:
    """Refuse what is no metric, above all the name or the file of one.

    Raises:
        ValueError: one is none.
    """
    for value in values:
        if not isinstance(value, PerceptualMetric):
            named = isinstance(value, str | PathLike)
            remedy = f"; lipsim.load({str(value)!r}) gives that of a name or a file" if named else ""
            raise LipsimError(f"expected a PerceptualMetric, got {type(value).__name__}{remedy}")
