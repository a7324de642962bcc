"""What ``torch.hub`` loads: the metrics that come with the package, and files of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lipsim.metric import ImageDistance, PerceptualMetric

dependencies = ["torch", "torchvision", "torchmetrics", "timm", "numpy", "PIL", "imagecodecs", "safetensors", "rich"]


def lipsim(name: str | Path = "photos") -> PerceptualMetric:
    """A metric, in evaluation mode, with its certificates: ``metric(x, y)``, ``metric.certify(x, left, right)``.

    Args:
        name: "photos", "photos_wide", "scattering" or "quickstart", which come with the package, or a ``.safetensors``
            file.
    """
    from lipsim.metric import load

    return load(name)


def lipsim_distance(name: str | Path = "photos", normalize: bool = False) -> ImageDistance:
    """A plain module for images of any size: ``distance(x, y)``, ``(N,)``.

    Args:
        name: as for :func:`lipsim`.
        normalize: images are in [-1, 1].
    """
    from lipsim.metric import ImageDistance

    return ImageDistance(name, normalize=normalize)
