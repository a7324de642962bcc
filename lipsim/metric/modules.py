"""A metric as a plain module for images of any size: what libraries of image quality measures register."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lipsim.metric.files import DEFAULT, load
from lipsim.metric.perceptual_metric import PerceptualMetric, Reduction
from lipsim.utils.checks import check_range
from lipsim.utils.errors import LipsimError


class ImageDistance(nn.Module):
    """Distance between images of any size: ``forward(x, y)`` brings both to the metric's own size first.

    Resizing is what :attr:`lipsim.PerceptualMetric.preprocess` does with a floating-point image, and differentiable, so
    this is a loss for images of any size. Images with one channel are gray.

    Args:
        metric: a metric, or the file or name of one (see :func:`lipsim.load`).
        reduction: "none" (or None), "mean" or "sum".
        normalize: images are in [-1, 1].
        keepdim: distances are ``(N, 1)``, as IQA-PyTorch has them.

    Attributes:
        lower_better: True; with the next two, what IQA-PyTorch asks about a measure.
        metric_mode: "FR", full reference.
        score_range: of distances, as text.

    Example:
        >>> distance = ImageDistance("quickstart")
        >>> distance(torch.rand(2, 3, 90, 120), torch.rand(2, 3, 100, 100)).shape
        torch.Size([2])
    """

    lower_better = True
    metric_mode = "FR"
    score_range = "0, 2"

    def __init__(
        self,
        metric: PerceptualMetric | str | Path = DEFAULT,
        reduction: Reduction | None = "none",
        normalize: bool = False,
        keepdim: bool = False,
    ) -> None:
        super().__init__()
        self.metric = metric if isinstance(metric, nn.Module) else load(metric)
        self.reduction: Reduction | None = reduction
        self.normalize, self.keepdim = normalize, keepdim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(N,)`` in [0, 2] between images ``(N, 3, H, W)`` in [0, 1], or their mean or sum.

        Raises:
            ValueError: other images, or different numbers of them.
        """
        x, y = (to_input(self.metric, images, self.normalize) for images in (x, y))
        distance: Tensor = self.metric(x, y, reduction=self.reduction)
        return distance.unsqueeze(1) if self.keepdim and distance.ndim else distance


def to_input(metric: PerceptualMetric, images: Tensor, normalize: bool = False) -> Tensor:
    """A batch of any size as the input of a metric, differentiably, in its dtype.

    Args:
        metric: whose ``preprocess`` resizes each image that has not its size.
        images: ``(N, 3, H, W)`` or ``(N, 1, H, W)``, floating-point in [0, 1].
        normalize: they are in [-1, 1].

    Raises:
        ValueError: they are not.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise LipsimError(f"expected a floating-point tensor of images, got {what}; metric.read makes one of others")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise LipsimError(
            f"expected images of shape (N, 3, H, W), got {tuple(images.shape)}; metric.read takes other layouts"
        )
    check_range(images, signed=normalize)
    images = images.expand(-1, 3, -1, -1).to(metric.dtype)
    if normalize:
        images = (images + 1) / 2
    if images.shape[2:] == (metric.image_size, metric.image_size):
        return images
    if not len(images):
        return images.new_zeros(0, 3, metric.image_size, metric.image_size)
    return torch.stack([metric.preprocess(image) for image in images]).to(metric.dtype)
