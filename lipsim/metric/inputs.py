"""What a metric refuses to embed or to certify, with the remedy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipsim.layers.encoder import first_weight
from lipsim.utils.checks import check_images, check_range
from lipsim.utils.errors import LipsimError


def check_embeddable(encoder: nn.Module, image_size: int, x: Tensor) -> None:
    """Refuse what an encoder does not take: another shape, or another dtype than that of its weights.

    Raises:
        ValueError: ``x`` is not ``(N, 3, image_size, image_size)`` in the dtype of the weights.
    """
    check_images(x, image_size)
    weight = first_weight(encoder)
    if weight is not None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise LipsimError(f"expected images in {weight.dtype}, as the weights are, got {x.dtype}: x.to({weight.dtype})")


def check_paired(x: Tensor, y: Tensor) -> None:
    """Refuse images that no pairs can be made of.

    Raises:
        ValueError: their numbers differ, and neither is one.
    """
    if len(x) != len(y) and 1 not in (len(x), len(y)):
        raise LipsimError(f"expected as many images on both sides, or one on either, got {len(x)} and {len(y)}")


def check_precision(module: nn.Module, *inputs: Tensor) -> None:
    """Refuse weights that nothing can be certified with, and images or features that an encoder without any passes.

    Raises:
        ValueError: a parameter, a buffer or one of the inputs in half precision.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if _is_half(tensor):
            raise LipsimError(
                f"{name} is stored in half precision; certify with weights in float32 or float64 (metric.float(), or a "
                "trainer's precision 32-true or bf16-mixed)"
            )
    for tensor in inputs:
        if _is_half(tensor):
            raise LipsimError(
                f"expected images or features in float32 or float64 to certify, got {tensor.dtype}, half "
                "precision, whose rounding no certificate covers; convert the images with .float() and embed again"
            )


def check_certifiable_range(x: Tensor, *, asked: bool) -> None:
    """Refuse images outside [0, 1] for a certificate that covers the error of float32, which is known inside.

    Args:
        x: images.
        asked: whether the caller had the range checked; else the message says why it is all the same.

    Raises:
        ValueError: values outside [0, 1].
    """
    try:
        check_range(x)
    except ValueError as error:
        if asked:
            raise
        raise LipsimError(
            f"{error} (check_range=False certifies points outside [0, 1] only where feature_error is 0: the "
            "error of float32 is known inside)"
        ) from error


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
