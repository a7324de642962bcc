"""Random views of whole batches of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.data.order import JITTER, REFLECTION
from lipsim.data.triplet import SharedTriplet, Triplet
from lipsim.utils.sampling import key_uniform, subkeys

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTERED, GRAYSCALE = 0.8, 0.2  # probabilities
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


class ColorJitter(nn.Module):
    """The paper's second view: ColorJitter(.4, .4, .2, .1) with probability .8, grayscale with probability .2.

    Distributed as torchvision's transforms of these names are, of which each image has its own draws: factors, the
    order of the four operations, and whether there are any.
    """

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [0, 1] to the same.

        Args:
            images: the images.
            keys: ``(N,)`` int64, on which alone the draws of each depend.
        """
        # On the CPU, whence a graphics processor need not be waited for: it is told which rows to change.
        draws = key_uniform(subkeys(keys.cpu(), JITTER), 10)
        factors = torch.stack(
            [
                1 + BRIGHTNESS * (2 * draws[:, 0] - 1),
                1 + CONTRAST * (2 * draws[:, 1] - 1),
                1 + SATURATION * (2 * draws[:, 2] - 1),
                HUE * (2 * draws[:, 3] - 1),
            ]
        ).to(images.device, images.dtype)
        operations = draws[:, 4:8].argsort(1)
        operations[draws[:, 8] >= JITTERED] = -1
        views = images.clone()
        for turn in operations.unbind(1):
            for number, operation in enumerate((brightened, contrasted, saturated, hue_turned)):
                rows = (turn == number).nonzero().flatten().to(images.device)
                if len(rows):
                    views[rows] = operation(views[rows], factors[number, rows].view(-1, 1, 1, 1))
        rows = (draws[:, 9] < GRAYSCALE).nonzero().flatten().to(images.device)
        views[rows] = gray(views[rows]).expand(-1, 3, -1, -1)
        return views


def gray(images: Tensor) -> Tensor:
    """Luma of ``(N, 3, H, W)``, ``(N, 1, H, W)``."""
    red, green, blue = images.split(1, 1)
    luma: Tensor = red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]
    return luma


def brightened(images: Tensor, factor: Tensor) -> Tensor:
    """Images ``(N, 3, H, W)`` in [0, 1] times their factors ``(N, 1, 1, 1)``."""
    return (images * factor).clamp_(0, 1)


def contrasted(images: Tensor, factor: Tensor) -> Tensor:
    """Differences from the mean of an image's luma times its factor."""
    return _blended(images, gray(images).mean((1, 2, 3), keepdim=True), factor)


def saturated(images: Tensor, factor: Tensor) -> Tensor:
    """Differences from the luma of each pixel times the image's factor."""
    return _blended(images, gray(images), factor)


def hue_turned(images: Tensor, share: Tensor) -> Tensor:
    """Hues, of HSV, turned by a share of the circle."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    scale = chroma.clamp(min=torch.finfo(images.dtype).tiny).reciprocal_()  # grays have no hue, and need none
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = hue + 6 * share.squeeze(1)  # in sixths of the circle
    channels = [value - chroma * _distance_from_cyan((hue + offset) % 6) for offset in (5, 3, 1)]
    return torch.stack(channels, 1)


def _distance_from_cyan(hue: Tensor) -> Tensor:
    """How much of the chroma a channel lacks at a hue in sixths counted from its own complement, in [0, 1]."""
    return torch.minimum(hue, 4 - hue).clamp_(0, 1)


def _blended(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, factor).clamp_(0, 1)


def random_reflections(keys: Tensor) -> Tensor:
    """One of the 8 symmetries of the square for :func:`reflect` for each of ``(N,)`` keys, ``(N, 3)`` bool."""
    return key_uniform(subkeys(keys, REFLECTION), 3) < 0.5


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
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp_(0, 1)


def augmented(batch: Triplet, keys: Tensor, shared_key: int) -> Triplet:
    """The batch under random reflections and turns, one for each triplet (one for all where triplets share images).

    Args:
        batch: the triplets.
        keys: ``(N,)`` int64, on which alone the draw of each triplet depends.
        shared_key: on which the draw for all depends.
    """
    if isinstance(batch, SharedTriplet):
        reflections = random_reflections(torch.tensor([shared_key])).to(batch.distinct.device)
        distinct = reflect(batch.distinct, reflections.expand(len(batch.distinct), -1))
        return SharedTriplet(distinct, batch.ids, batch.right_vote, batch.index)
    reflections = random_reflections(keys).to(batch.reference.device)
    reference, left, right = (reflect(part, reflections) for part in batch.images())
    return Triplet(reference, left, right, batch.right_vote, batch.index)
