"""What becomes of a batch on the device: eight bits to floats, and random transforms in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipsim.data.eight_bit import as_float
from lipsim.data.triplet import SharedTriplet, Triplet
from lipsim.utils.errors import LipsimError

_GROUPS = 16  # parts of a batch with draws of their own


def batch_as_float(batch: Any) -> Any:
    """A batch whose images are float32 in [0, 1], those in eight bits by :func:`lipsim.data.eight_bit.as_float`."""
    return _map_images(batch, as_float)


class BatchTransforms:
    """Random transforms of training batches, such as torchvision's v2, on whichever device the batch is.

    Modules are called one after the other on ``(N, 3, S, S)`` float images in [0, 1] and have to return as many of the
    same size; what leaves [0, 1] is clamped. As v2 draws once a call, a batch is cut into up to 16 parts, each with
    draws of its own. The three images of a triplet are in one part: they are cut, mirrored and recoloured alike, so
    that the vote stays. A batch of triplets that share images is one part. Modules that draw for each image
    (``GaussianNoise``) give the three different ones.

    Draws are a function of the ``key`` of a batch. Torch's generators are left as they were.

    Args:
        transforms: the modules.
    """

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        self.transforms = list(transforms)

    def __call__(self, batch: Any, key: Sequence[int]) -> Any:
        """The batch as its images are now.

        Args:
            batch: triplets, images, or images with more.
            key: numbers that tell it from all others: seed, epoch, number of the batch, process.

        Raises:
            ValueError: a module returns another size or type.
        """
        device = _device_of(batch)
        if device is None:
            return batch
        accelerators = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(accelerators, device_type="cuda" if device.type == "cpu" else device.type):
            seed = int(np.random.SeedSequence([number % 2**64 for number in key]).generate_state(1, np.uint64)[0] >> 1)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed devices of other processes as well
            if accelerators:
                torch.get_device_module(device).manual_seed(seed)
            if isinstance(batch, SharedTriplet):
                return _map_images(batch, self._part)
            if isinstance(batch, Triplet):
                parts = zip(*(images.chunk(_GROUPS) for images in batch.images()), strict=True)
                moved = [self._part(torch.cat(part)).chunk(3) for part in parts]
                reference, left, right = (torch.cat(images) for images in zip(*moved, strict=True))
                return Triplet(reference, left, right, batch.right_vote, batch.index)
            return _map_images(batch, lambda images: torch.cat([self._part(part) for part in images.chunk(_GROUPS)]))

    def _part(self, images: Tensor) -> Tensor:
        shape, dtype = images.shape, images.dtype
        for transform in self.transforms:
            images = transform(images)
            if images.shape != shape or images.dtype != dtype:
                raise LipsimError(
                    f"expected {type(transform).__name__} to return {dtype} images of shape {tuple(shape)}, got "
                    f"{images.dtype} of {tuple(images.shape)}; transforms on the device keep size and range"
                )
        return images.clamp(0, 1)


def _device_of(batch: Any) -> torch.device | None:
    """Where the images of a batch are; None where it is none of :func:`_map_images`."""
    if isinstance(batch, Triplet):
        return batch.index.device
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return images.device if isinstance(images, Tensor) else None


def _map_images(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch of triplets, of images, or of images and more in a tuple, with a function of its images; others as is."""
    if isinstance(batch, Triplet):
        return batch.map_images(function)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        rest = [function(batch[0]), *batch[1:]]
        return type(batch)(*rest) if hasattr(batch, "_fields") else type(batch)(rest)
    return function(batch) if isinstance(batch, Tensor) else batch
