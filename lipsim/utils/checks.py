"""Checks of images where they enter: expected, got, and what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lipsim.utils.errors import LipsimError

# What undoing a normalisation by mean and standard deviation may leave above 1 in float32.
RANGE_TOLERANCE = 1e-5


def check_tensor(images: Tensor) -> None:
    """Refuse what is no tensor, such as the path of an image.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(images, Tensor):
        raise LipsimError(
            f"expected a tensor of images, got {type(images).__name__}; metric.read makes one of paths, PIL images, "
            "arrays, tensors and lists of them"
        )


def check_images(images: Tensor, image_size: int) -> None:
    """Refuse a tensor that is no batch of images ``(N, 3, S, S)`` of floating-point numbers.

    Raises:
        ValueError: it is not.
    """
    check_tensor(images)
    expected = (3, image_size, image_size)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise LipsimError(
            f"expected images of shape (N, {', '.join(map(str, expected))}), got {tuple(images.shape)}; "
            f"{_shape_remedy(images, image_size)}"
        )
    if not images.dtype.is_floating_point:
        remedy = "divide 8-bit images by 255, as metric.read does" if images.dtype == torch.uint8 else "convert them"
        raise LipsimError(f"expected floating-point images in [0, 1], got {images.dtype}; {remedy}")


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


def check_range(images: Tensor, where: str = "", *, signed: bool = False) -> None:
    """Refuse images with values outside [0, 1], which a metric answers for with plausible numbers all the same.

    While torch compiles or exports, when there are no values, nothing is checked: a graph has to be given images in
    the range.

    Args:
        images: of any shape, floating-point.
        where: which images they are, for the message.
        signed: the range is [-1, 1]; images without a value below 0, which are likely to be in [0, 1], raise a warning.

    Raises:
        ValueError: NaN or infinite values, or values more than 1e-5 outside the range.
    """
    if not images.numel() or torch.compiler.is_compiling():
        return
    # One transfer from the device; under the transforms of torch.func, torch 2.9 has item() and no tolist().
    low, high = (end.item() for end in torch.stack(torch.aminmax(images.detach())).cpu())
    if low >= -signed - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
        if signed and low >= 0:
            warnings.warn(
                f"normalize=True takes images in [-1, 1], and none of these has a value below 0{where}; images in "
                "[0, 1] come without it",
                stacklevel=5,  # the caller of the metric, behind torch.nn.Module
            )
        return
    if not (low > -math.inf and high < math.inf):  # NaN fails every comparison
        bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
        raise LipsimError(f"images {bad[:8]} of the batch have NaN or infinite pixels{where}; repair or remove them")
    expected, remedy = ("[-1, 1]", _signed_remedy(low, high)) if signed else ("[0, 1]", _remedy(low, high))
    raise LipsimError(f"expected images in {expected}, got values from {low:.4g} to {high:.4g}{where}; {remedy}")


def _shape_remedy(images: Tensor, image_size: int) -> str:
    shape, size = tuple(images.shape), (image_size, image_size)
    if shape == (3, *size):
        return "one image is a batch of one: x.unsqueeze(0)"
    if shape == (*size, 3):
        return "one image is a batch of one, and channels come before rows: x.permute(2, 0, 1).unsqueeze(0)"
    if shape in (size, (1, *size)):
        return "one gray image needs three channels and is a batch of one: x.expand(3, -1, -1).unsqueeze(0)"
    if shape[1:] == size:
        return "gray images need three channels: x.unsqueeze(1).expand(-1, 3, -1, -1)"
    if shape[1:] == (*size, 3):
        return "channels come before rows: x.permute(0, 3, 1, 2)"
    if shape[1:] == (1, *size):
        return "gray images need three channels: x.expand(-1, 3, -1, -1)"
    if shape[1:] in ((4, *size), (*size, 4)):
        return "a channel too many, such as transparency, which metric.read(x) composites over white"
    return "metric.read(x) brings images of any size and layout there"


def _remedy(low: float, high: float) -> str:
    """What was most likely done to images with these extremes."""
    if low >= 0:
        if 2 < high <= 255:
            return "divide 8-bit images by 255"
        return "divide 16-bit images by 65535" if 255 < high <= 65535 else "clamp them: x.clamp(0, 1)"
    if -1 <= low <= -0.5 and high <= 1:
        return "images in [-1, 1] become (x + 1) / 2, which a metric does with normalize=True"
    if low >= -0.5 and high <= 1.5:
        return "clamp them: x.clamp(0, 1)"
    return "undo a normalisation by x * std + mean, and a range of [-1, 1] by (x + 1) / 2"


def _signed_remedy(low: float, high: float) -> str:
    if low >= 0 and high > 2:
        return f"divide them by {255 if high <= 255 else 65535}, and leave normalize=True out"
    if low >= -1.5 and high <= 1.5:
        return "clamp them: x.clamp(-1, 1)"
    return "undo a normalisation by x * std + mean, and leave normalize=True out"
