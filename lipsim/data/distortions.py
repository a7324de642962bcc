"""Distortions of graded strength, for triplets whose answer is known: the weaker one is more alike.

Each is a pure function ``(images, strength, seed=…, index=…)``: images ``(N, 3, H, W)`` float in [0, 1] to the same, a
strength ``(N,)`` in (0, 1] for each, of which 1 is plain to see and leaves the picture recognisable. What is random
about a distortion (its direction, its place, its noise) is a function of ``(seed, index[i])`` alone, whatever else is
in the batch: two strengths of one index lie on one path, the larger one further along.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lipsim.utils.sampling import sample_normal, sample_uniform

Index = Tensor | Sequence[int]

MAX_BLUR = 0.04  # standard deviation, of the side: 2.6 pixels of 64
MAX_NOISE = 0.25  # standard deviation, of the range [0, 1]
JPEG_QUALITIES = (90.0, 4.0)  # at strength 0 and 1, in geometric steps between
MAX_SHIFT = 0.25  # of the side
MAX_ROTATION = 30.0  # degrees
MAX_ZOOM = 1.6  # factor, in or out
MAX_OCCLUSION = 0.5  # side of the square, of the side
MAX_COLOUR = {"brightness": 0.7, "contrast": 0.8, "saturation": 1.0, "hue": 0.25}  # ± factor − 1; hue: of a turn
_GREY = 0.02  # mean difference of the channels below which a picture has no colour to change


class Distortion(Protocol):
    """A function of this file."""

    def __call__(self, images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor: ...


def blur(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """Gaussian blur of standard deviation ``strength × MAX_BLUR`` of the side; nothing is random."""
    from torchvision.transforms.v2.functional import gaussian_blur  # seconds to import

    blurred = []
    for image, sigma in zip(images, (strength * MAX_BLUR * images.shape[-1]).tolist(), strict=True):
        size = 2 * math.ceil(3 * sigma) + 1
        # First along one side, then the other: a kernel of two dimensions costs many times as much.
        rows = gaussian_blur(image, [size, 1], [sigma, sigma])
        blurred.append(gaussian_blur(rows, [1, size], [sigma, sigma]))
    return torch.stack(blurred).clamp(0, 1)


def noise(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """White Gaussian noise of standard deviation ``strength × MAX_NOISE``, clamped; its field is random."""
    field = sample_normal(images, seed=seed, index=index)
    return (images + MAX_NOISE * strength.view(-1, 1, 1, 1) * field).clamp(0, 1)


def jpeg(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """JPEG of a quality from 90 (strength 0) to 4 (strength 1), in geometric steps; nothing is random."""
    best, worst = JPEG_QUALITIES
    qualities = (best * (worst / best) ** strength).round().int().tolist()
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.empty_like(pixels)
    for row, quality in enumerate(qualities):
        with io.BytesIO() as file:
            Image.fromarray(pixels[row]).save(file, "JPEG", quality=quality)
            decoded[row] = np.asarray(Image.open(file))
    return (torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255).to(images).contiguous()


def shift(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """A move by ``strength × MAX_SHIFT`` of the side in a random direction; what comes in is mirrored."""
    (turn,) = _numbers(images, 1, seed, index)
    length = 2 * MAX_SHIFT * strength  # the coordinates of a grid run from -1 to 1
    across, down = length * torch.cos(2 * math.pi * turn), length * torch.sin(2 * math.pi * turn)
    one, zero = torch.ones_like(turn), torch.zeros_like(turn)
    return _warp(images, [one, zero, across, zero, one, down])


def rotation(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """A turn about the centre by ``strength × MAX_ROTATION`` degrees, to a random side; corners are mirrored."""
    (side,) = _numbers(images, 1, seed, index)
    angle = strength * math.radians(MAX_ROTATION) * _sign(side)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return _warp(images, [cos, -sin, zero, sin, cos, zero])


def zoom(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """Scaling about the centre by ``MAX_ZOOM ** strength``, in or out at random; a border is mirrored."""
    (side,) = _numbers(images, 1, seed, index)
    scale = MAX_ZOOM ** (strength * _sign(side))
    zero = torch.zeros_like(scale)
    return _warp(images, [scale, zero, zero, zero, scale, zero])


def colour(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """More or less brightness, contrast or saturation, or another hue, by ``strength × MAX_COLOUR``.

    Which of them, and to which side, is random; a picture without colour has its brightness changed.
    """
    from torchvision.transforms.v2 import functional as v2  # seconds to import

    change = {
        "brightness": v2.adjust_brightness,
        "contrast": v2.adjust_contrast,
        "saturation": v2.adjust_saturation,
        "hue": v2.adjust_hue,
    }
    which, side = _numbers(images, 2, seed, index)
    amounts = (strength * _sign(side)).tolist()
    changed = []
    for image, number, amount in zip(images, (which * len(MAX_COLOUR)).int().tolist(), amounts, strict=True):
        name = list(MAX_COLOUR)[number]
        if float((image.amax(0) - image.amin(0)).mean()) < _GREY:
            name = "brightness"
        change_by = MAX_COLOUR[name] * amount
        changed.append(change[name](image, change_by if name == "hue" else 1 + change_by))
    return torch.stack(changed).clamp(0, 1)


def occlusion(images: Tensor, strength: Tensor, *, seed: int, index: Index) -> Tensor:
    """A square of one colour and of side ``strength × MAX_OCCLUSION`` of the side; place and colour are random.

    Its centre does not depend on the strength: a larger one covers a smaller one.
    """
    across, down, *fill = _numbers(images, 5, seed, index)
    height, width = images.shape[-2:]
    half = MAX_OCCLUSION / 2 * strength.view(-1, 1)
    inside = []
    for place, side in ((down, height), (across, width)):
        centre = MAX_OCCLUSION / 2 + (1 - MAX_OCCLUSION) * place.view(-1, 1)
        pixels = (torch.arange(side, device=images.device) + 0.5) / side
        # At least the pixel of the centre, however weak.
        inside.append((pixels - centre).abs() <= half.clamp(min=0.5 / side))
    covered = (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)
    return torch.where(covered, torch.stack(fill, dim=1).view(-1, 3, 1, 1), images)


DISTORTIONS: dict[str, Distortion] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "shift": shift,
    "rotation": rotation,
    "zoom": zoom,
    "colour": colour,
    "occlusion": occlusion,
}


def distort(images: Tensor, family: Tensor, strength: Tensor, *, seed: int, index: Tensor) -> Tensor:
    """Each image distorted by its own family, ``(N, 3, H, W)``.

    Args:
        images: ``(N, 3, H, W)`` float in [0, 1].
        family: ``(N,)`` int64, positions in :data:`DISTORTIONS`.
        strength: ``(N,)`` in (0, 1].
        seed: of what is random.
        index: ``(N,)`` int64, by which random numbers are drawn.
    """
    distorted = torch.empty_like(images)
    for number, function in enumerate(DISTORTIONS.values()):
        rows = (family == number).nonzero().flatten()
        if len(rows):
            distorted[rows] = function(images[rows], strength[rows], seed=seed, index=index[rows])
    return distorted


def _numbers(images: Tensor, count: int, seed: int, index: Index) -> tuple[Tensor, ...]:
    """Numbers uniform in [0, 1), ``(N,)`` each."""
    return sample_uniform(images.new_empty(len(images), count), seed=seed, index=index).unbind(1)


def _sign(number: Tensor) -> Tensor:
    return torch.where(number < 0.5, -1.0, 1.0).to(number)


def _warp(images: Tensor, matrix: list[Tensor]) -> Tensor:
    """Images under affine maps of their coordinates, given row by row: six entries ``(N,)``."""
    rows = torch.stack(matrix, dim=1).view(-1, 2, 3).to(images)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return warped.clamp(0, 1)
