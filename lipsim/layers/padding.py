"""What padding of a convolution its Lipschitz bound covers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lipsim.utils.errors import LipsimError


def check_padding(padding_mode: str, padding: Sequence[int], reach: Sequence[int]) -> None:
    """Refuse what no bound here covers.

    Args:
        padding_mode: "zeros" or "circular".
        padding: pixels that are added along each axis, both sides together.
        reach: how far the kernel reaches beyond its first tap along each axis, (taps − 1)·dilation.

    Raises:
        ValueError: another mode, or circular padding that repeats rows of the operator.
    """
    if padding_mode not in ("zeros", "circular"):
        raise LipsimError(f"expected padding_mode zeros or circular, got {padding_mode!r}")
    if repeats_rows(padding_mode, padding, reach):
        raise LipsimError(
            f"expected circular padding of at most {list(reach)} in all (height, width), got {list(padding)}"
        )


def repeats_rows(padding_mode: str, padding: Sequence[int], reach: Sequence[int]) -> bool:
    """Whether circular padding is so wide that rows of the operator repeat, which the one on the plane has once.

    Arguments as in :func:`check_padding`.
    """
    return padding_mode == "circular" and any(p > r for p, r in zip(padding, reach, strict=True))


def check_sides(x: Tensor, stride: Sequence[int]) -> None:
    """Refuse images ``(N, C, H, W)`` around which a circular convolution with a stride does not close.

    Raises:
        ValueError: a side is no multiple of the stride along it.
    """
    if any(size % step for size, step in zip(x.shape[2:], stride, strict=True)):
        raise LipsimError(f"expected sides that are multiples of {tuple(stride)}, got {tuple(x.shape[2:])}")
