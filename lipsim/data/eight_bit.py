"""Images in eight bits, a quarter of the bytes of floats, where they are the same numbers to the last digit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rounded(image: Tensor) -> tuple[Tensor, bool]:
    """An image in [0, 1] in eight bits, and whether it is, to the last digit, what these give back."""
    pixels = (image * 255).round().to(torch.uint8)
    return pixels, torch.equal(as_float(pixels), image)


def eight_bit(image: Tensor) -> Tensor:
    """An image in [0, 1] in eight bits where nothing is lost, else as it is."""
    pixels, exact = rounded(image)
    return pixels if exact else image


def as_float(images: Tensor) -> Tensor:
    """Images in eight bits as float32 in [0, 1], on every device what a CPU gives; floats as they are."""
    if images.dtype != torch.uint8:
        return images
    # By a tensor on the device: a number, CUDA kernels turn into a multiplication with its rounded inverse, which gives
    # other floats than the division does.
    return images.float().div_(torch.full((), 255.0, dtype=torch.float32, device=images.device))


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Images as a batch: in eight bits if all are, else in float."""
    if len({image.dtype for image in images}) > 1:
        images = [as_float(image) for image in images]  # torch.stack would take 255 for 255.0
    return torch.stack(list(images))
