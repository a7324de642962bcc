"""Images of every kind that people hold them in, as one batch for a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from lipsim.data.bit_depth import DeepImage
from lipsim.utils.checks import check_range
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

Image = str | Path | PIL.Image.Image | DeepImage | np.ndarray | Tensor

_CHANNELS = (1, 3, 4)  # gray, RGB, and RGB with transparency
_MANY = 16  # images; fewer are read before there is anything to tell


def read(
    images: Image | Iterable[Image], preprocess: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One image or many, ``(N, 3, S, S)`` in [0, 1]; what lasts over two seconds tells how far it is on stderr.

    Args:
        images: see :meth:`lipsim.PerceptualMetric.read`.
        preprocess: from one path, PIL image, 8-bit array ``(H, W, 3)`` or floating-point tensor ``(3, H, W)`` to
            ``(3, S, S)``, see :class:`lipsim.data.Preprocess`.
        device: of the result.
        dtype: of the result.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one cannot be read, or its layout is not clear.
    """
    if isinstance(images, Image):
        return _read(images, preprocess).to(device, dtype)
    if not isinstance(images, Iterable) or isinstance(images, Mapping | Set | bytes):
        raise LipsimError(
            f"expected an image or a list of images: paths, PIL images, arrays or tensors; got {type(images).__name__}"
        )
    items, batches = list(images), []
    if not items:
        raise LipsimError("expected at least one image, got an empty list")
    with Progress("reading images", enabled=len(items) >= _MANY) as say:
        advance = say.counter(len(items), "images")
        for number, item in enumerate(items):
            try:
                batches.append(_read(item, preprocess).to(device, dtype))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"images[{number}]: {error}") from error
            except ValueError as error:
                raise LipsimError(f"images[{number}]: {error}") from error
            advance(1)
    return torch.cat(batches)


def _read(image: Image, preprocess: Callable[..., Tensor]) -> Tensor:
    """One image, or a batch of them in an array or a tensor, ``(N, 3, S, S)``."""
    if isinstance(image, str | Path) and Path(image).is_dir():
        files = "sorted(Path(folder).glob('*.png'))"
        raise LipsimError(f"expected an image file, got the folder {image}; give its files: {files}")
    if isinstance(image, str | Path | PIL.Image.Image | DeepImage):
        return preprocess(image).unsqueeze(0)
    if isinstance(image, Tensor) and image.dtype in (torch.uint8, torch.uint16):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
        if image.dtype in (np.uint8, np.uint16):
            return torch.stack([preprocess(_whole_numbers(one)) for one in _channels_last(image, preprocess)])
        if image.dtype not in (np.float16, np.float32, np.float64):
            raise LipsimError(f"expected values of 8 or 16 bits or floats in [0, 1], got {image.dtype}; {_REMEDY}")
        # Copied where torch would refuse it, for negative strides, or warn, as it may not be written to.
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if not isinstance(image, Tensor):
        raise LipsimError(f"expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    if not image.dtype.is_floating_point:
        raise LipsimError(f"expected values of 8 or 16 bits or floats in [0, 1], got {image.dtype}; {_REMEDY}")
    return torch.stack([preprocess(one) for one in _colours(_channels_first(image, preprocess))])


_REMEDY = "convert those of 0 to 255 to uint8, and others to floats in [0, 1]"


def _channels_last(image: np.ndarray, preprocess: Callable[..., Tensor]) -> np.ndarray:
    """``(N, H, W, C)``."""
    axis = _channel_axis(image.shape, preprocess)
    image = image[..., None] if axis is None else np.moveaxis(image, axis, -1)
    return image if image.ndim == 4 else image[None]


def _channels_first(image: Tensor, preprocess: Callable[..., Tensor]) -> Tensor:
    """``(N, C, H, W)``."""
    axis = _channel_axis(tuple(image.shape), preprocess)
    image = image[None] if axis is None else image.movedim(axis, -3)
    return image if image.ndim == 4 else image[None]


def _channel_axis(shape: tuple[int, ...], preprocess: Callable[..., Tensor]) -> int | None:
    """Where the channels are, -3 or -1; None where there are none, in a gray image.

    Raises:
        ValueError: nowhere, or it is not clear where.
    """
    if 0 in shape:
        raise LipsimError(f"expected images with pixels, got shape {shape}")
    if len(shape) == 2:
        return None
    if len(shape) not in (3, 4):
        raise LipsimError(
            f"expected (H, W), (H, W, C), (C, H, W) or a batch of them with four dimensions, got shape {shape}"
        )
    size = getattr(preprocess, "image_size", None)
    if shape[-3:] == (3, size, size):  # however small
        return -3
    first, last = shape[-3] in _CHANNELS, shape[-1] in _CHANNELS
    if first and last:
        raise LipsimError(
            f"expected (H, W, C) or (C, H, W), got shape {shape}, which may be either; metric.preprocess takes one "
            "image, and reads a tensor as (3, H, W) and an array as (H, W, 3)"
        )
    if not first and not last:
        batch = "; gray images of a batch have a channel: x[:, None]" if len(shape) == 3 else ""
        raise LipsimError(f"expected 1, 3 or 4 channels, first or last, got shape {shape}{batch}")
    return -3 if first else -1


def _whole_numbers(image: np.ndarray) -> np.ndarray | DeepImage:
    """An image ``(H, W, C)`` of 8 or 16 bits as its file would be decoded."""
    if image.dtype == np.uint16:
        return DeepImage(image, (65535,) * image.shape[2])
    return image[..., 0] if image.shape[2] == 1 else image


def _colours(images: Tensor) -> Tensor:
    """RGB of ``(N, C, H, W)`` in [0, 1]: gray in all channels, transparency composited over white."""
    if images.shape[1] == 4:
        check_range(images)
        alpha = images[:, 3:].clamp(0, 1)
        return alpha * images[:, :3] + (1 - alpha)
    return images.expand(-1, 3, -1, -1)
