"""Random views of whole batches of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from lipsim.data.triplet import SharedTriplet, Triplet


class ColorJitter(nn.Module):
    """The paper's second view: ColorJitter(.4, .4, .2, .1) with probability .8, grayscale with probability .2.

    Parameters are drawn for ``groups`` parts of a batch rather than for each image: the conversion to HSV of a whole
    part costs little more than that of one image.
    """

    def __init__(self, groups: int = 16) -> None:
        super().__init__()
        self.groups = groups
        self.transform = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [0, 1] to the same."""
        return torch.cat([self.transform(part) for part in images.chunk(self.groups)]).clamp(0, 1)


def random_reflections(num: int, like: Tensor) -> Tensor:
    """Draw ``num`` of the 8 symmetries of the square for :func:`reflect`, ``(num, 3)`` bool."""
    return torch.rand(num, 3, device=like.device) < 0.5


def reflect(images: Tensor, reflections: Tensor) -> Tensor:
    """Flip and transpose ``(N, 3, S, S)``, each image by its own row ``(horizontal, vertical, transposed)``.

    The answer to "which is more alike?" stays where all images of a triplet undergo the same.
    """
    horizontal, vertical, transposed = reflections.view(-1, 3, 1, 1, 1).unbind(1)
    images = torch.where(horizontal, images.flip(3), images)
    images = torch.where(vertical, images.flip(2), images)
    images = torch.where(transposed, images.transpose(2, 3), images)
    return images


def augmented(batch: Triplet) -> Triplet:
    """The batch under random reflections and turns, one for each triplet (one for all where triplets share images)."""
    if isinstance(batch, SharedTriplet):
        reflections = random_reflections(1, batch.distinct).expand(len(batch.distinct), -1)
        distinct = reflect(batch.distinct, reflections)
        return SharedTriplet(distinct, batch.ids, batch.right_vote, batch.index)
    reflections = random_reflections(len(batch), batch.reference)
    reference, left, right = (reflect(part, reflections) for part in batch.images())
    return Triplet(reference, left, right, batch.right_vote, batch.index)
