"""Random views of whole batches of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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


MAX_SHIFT, MAX_ZOOM, MAX_TURN = 4 / 64, 1.1, math.radians(6)


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, move, zoom and turn each of ``(N, 3, S, S)`` a little, in one bilinear resampling.

    Half of them are mirrored left to right; they are moved by at most a sixteenth of the side along each axis, zoomed
    by at most 1.1 in or out and turned by at most 6 degrees. What comes in is mirrored at the border.

    Args:
        images: in [0, 1], on the CPU.
        generator: of the draws.
    """
    numbers = 2 * torch.rand(5, len(images), generator=generator) - 1
    mirror = torch.where(numbers[0] < 0, -1.0, 1.0)
    scale, turn = MAX_ZOOM ** numbers[1], MAX_TURN * numbers[2]
    cosine, sine = scale * torch.cos(turn), scale * torch.sin(turn)
    move = 2 * MAX_SHIFT * numbers[3:]  # the coordinates of a grid run from -1 to 1
    rows = torch.stack([mirror * cosine, -sine, move[0], mirror * sine, cosine, move[1]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


def augmented(batch: Triplet) -> Triplet:
    """The batch under random reflections and turns, one for each triplet (one for all where triplets share images)."""
    if isinstance(batch, SharedTriplet):
        reflections = random_reflections(1, batch.distinct).expand(len(batch.distinct), -1)
        distinct = reflect(batch.distinct, reflections)
        return SharedTriplet(distinct, batch.ids, batch.right_vote, batch.index)
    reflections = random_reflections(len(batch), batch.reference)
    reference, left, right = (reflect(part, reflections) for part in batch.images())
    return Triplet(reference, left, right, batch.right_vote, batch.index)
