"""Checks of images where they enter: expected, got, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lipsim.utils.errors import LipsimError

# What undoing a normalisation by mean and standard deviation may leave above 1 in float32.
RANGE_TOLERANCE = 1e-5


def check_images(images: Tensor, image_size: int) -> None:
    """Refuse a tensor that is no batch of images ``(N, 3, S, S)`` of floating-point numbers.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(images, Tensor):
        raise LipsimError(
            f"expected a tensor of images, got {type(images).__name__}; metric.preprocess makes one of an image"
        )
    expected = (3, image_size, image_size)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise LipsimError(
            f"expected images of shape (N, {', '.join(map(str, expected))}), got {tuple(images.shape)}; "
            f"{_shape_remedy(images, image_size)}"
        )
    if not images.dtype.is_floating_point:
        eight = "; divide 8-bit images by 255" if images.dtype == torch.uint8 else "; convert them"
        raise LipsimError(f"expected floating-point images in [0, 1], got {images.dtype}{eight}")


@contextmanager
def taking_images(who: str, images: Tensor) -> Iterator[None]:
    """Around a model's first pass: say that it does not take images of this shape, if it fails on them.

    Args:
        who: name of the model.
        images: what it is given within.

    Raises:
        ValueError: it failed.
    """
    try:
        yield
    except LipsimError:  # which says itself what is wrong
        raise
    # What models raise for images of another size or number of channels.
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LipsimError(
            f"{who} does not take images of shape {tuple(images.shape)} ({reason}); give the size that it was built for"
        ) from error


def check_range(images: Tensor, where: str = "") -> None:
    """Refuse images with values outside [0, 1], which a metric answers for with plausible numbers all the same.

    While torch compiles or exports, when there are no values, nothing is checked: a graph has to be given images in
    the range.

    Args:
        images: of any shape, floating-point.
        where: which images they are, for the message.

    Raises:
        ValueError: NaN or infinite values, or values more than 1e-5 outside [0, 1].
    """
    if not images.numel() or torch.compiler.is_compiling():
        return
    # One transfer from the device.
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
        return
    if not (low > -math.inf and high < math.inf):  # NaN fails every comparison
        bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
        raise LipsimError(f"images {bad[:8]} of the batch have NaN or infinite pixels{where}; repair or remove them")
    raise LipsimError(
        f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}{where}; {_remedy(low, high)}"
    )


def _shape_remedy(images: Tensor, image_size: int) -> str:
    shape = tuple(images.shape)
    if images.ndim == 3 and shape[0] == 3:
        return "one image is a batch of one: x.unsqueeze(0)"
    if images.ndim == 4 and shape[3] == 3 != shape[1]:
        return "channels come before rows: x.permute(0, 3, 1, 2)"
    if images.ndim == 4 and shape[1:] == (1, image_size, image_size):
        return "gray images need three channels: x.expand(-1, 3, -1, -1)"
    if images.ndim == 4 and shape[1:] == (4, image_size, image_size):
        return "a channel too many, such as transparency; metric.preprocess composites it over white"
    return "metric.preprocess brings an image to this size"


def _remedy(low: float, high: float) -> str:
    """What was most likely done to images with these extremes."""
    if low >= 0:
        if 2 < high <= 255:
            return "divide 8-bit images by 255"
        return "divide 16-bit images by 65535" if 255 < high <= 65535 else "clamp them: x.clamp(0, 1)"
    if -1 <= low <= -0.5 and high <= 1:
        return "images in [-1, 1] become (x + 1) / 2"
    if low >= -0.5 and high <= 1.5:
        return "clamp them: x.clamp(0, 1)"
    return "undo a normalisation by x * std + mean, and a range of [-1, 1] by (x + 1) / 2"
