"""What an ℓ2 radius implies: in other norms, for single pixels, in the pixels of a file."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates.errors import LipsimError
from lipsim.certificates.numbers import check_count
from lipsim.certificates.rounding import EPS, round_down

# More than rounding to float32 changes a number in [0, 1], after a resize in float64 as well.
_FLOAT32_STEP = 2.0**-25 * (1 + 1e-6)


def linf_radius(radius: Tensor, num_elements: int) -> Tensor:
    """ℓ∞ radius ``R/√n`` that an ℓ2 radius implies on inputs of ``num_elements = 3·H·W`` values, rounded down.

    Example:
        >>> linf_radius(torch.tensor([6.0]), num_elements=36)
        tensor([1.0000])
    """
    return round_down(radius.double() / math.sqrt(check_count("num_elements", num_elements)), radius.dtype)


def l1_radius(radius: Tensor) -> Tensor:
    """ℓ1 radius that an ℓ2 radius implies: the same number, because ``‖δ‖₂ ≤ ‖δ‖₁``.

    Example:
        >>> l1_radius(torch.tensor([0.5]))
        tensor([0.5000])
    """
    return radius


def certified_pixels(x: Tensor, radius: Tensor) -> Tensor:
    """Number of pixels of ``x`` that may take any colour in [0, 1] without changing the answer, ``(N,)`` int64.

    Pixel ``u`` can move ``x`` by at most ``c_u = Σ_channels max(x_u, 1 − x_u)²`` in squared ℓ2; the certified number is
    the largest ``k`` whose ``k`` largest ``c_u`` sum to less than ``R²``. A radius above √3 proves that no one-pixel
    attack (Su et al. 2017) can flip the answer.

    Args:
        x: images ``(N, 3, H, W)`` in [0, 1].
        radius: ``(N,)`` ℓ2 radii; none where it is negative or NaN.

    Raises:
        ValueError: the images are no floating-point numbers.

    Example:
        >>> gray = torch.full((1, 3, 4, 4), 0.5)  # one pixel changes by at most √0.75
        >>> certified_pixels(gray, torch.tensor([1.3]))
        tensor([2])
    """
    if not x.dtype.is_floating_point:
        raise LipsimError(f"expected floating-point images in [0, 1], got {x.dtype}; divide 8-bit images by 255")
    # Rounded up; no pixel costs less than a quarter a channel, so few are ever certified and only those are sorted.
    # ½ + |x − ½| = max(x, 1 − x), where torch.maximum is an order of magnitude slower.
    cost = (x - 0.5).abs_().add_(0.5).square_().sum(1).flatten(1)
    square = radius.double().nan_to_num(nan=0.0, posinf=math.inf).clamp(min=0).square()
    most = float(square.max()) / (x.shape[1] / 4) if len(square) else 0.0
    count = int(min(cost.shape[1], most + 2))
    largest = cost.topk(count, dim=-1).values * (1 + 8 * torch.finfo(x.dtype).eps)
    total = largest.double().cumsum(-1) * (1 + count * EPS)
    return (total < square.unsqueeze(-1)).sum(-1)


def resize_norm(original: tuple[int, int], resized: int | tuple[int, int]) -> float:
    """ℓ2 operator norm of the antialiased bicubic resize from ``(H, W)`` to ``(h, w)``, rounded up.

    The resize is linear and separable, so its norm is the product of those of two one-dimensional maps, each from an
    SVD in float64. :class:`lipsim.data.Preprocess` resizes in float64, too; that of float32 has a norm of its own, up
    to 4e-6 larger. See :func:`original_radius` for what the norm is worth in the pixels of a file.

    Args:
        original: height and width before.
        resized: height and width after, or the side of a square.

    Example:
        >>> print(f"{resize_norm((64, 64), 64):.4f}")  # nothing is resized
        1.0000
    """
    return math.prod(map(_axis_norm, original, _pair(resized)))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@lru_cache
def _axis_norm(size: int, resized: int) -> float:
    rows = []
    for start in range(0, size, 256):  # of the identity, which for a large photograph is too large as a whole
        basis = torch.eye(min(256, size - start), size - start, dtype=torch.float64)
        basis = F.pad(basis, (start, 0)).unsqueeze(1).unsqueeze(1)
        rows.append(F.interpolate(basis, size=(1, resized), mode="bicubic", antialias=True).flatten(1))
    # An SVD is off by a modest multiple of n roundings.
    return float(torch.linalg.matrix_norm(torch.cat(rows), ord=2)) * (1 + 8 * (size + resized) * EPS)


def original_radius(radius: float, original: tuple[int, int], resized: int | tuple[int, int]) -> float:
    """Radius in the pixels of an RGB file that one in the metric's input implies.

    The file's values over 255 (or 65535) are exact in the file, and rounded to float32 twice on their way: when read,
    and when resized (in float64; images of the right size are not). Both roundings count twice, for the file and for
    the changed one.

    Args:
        radius: in the space of the encoder's input.
        original: height and width of the part of the file that is seen, which may be all of it.
        resized: height and width that this part is resized to, or the side of a square, by
            :class:`lipsim.data.Preprocess` with the resize "float". What it adds around is constant and has no part.

    Returns:
        The radius, at least 0.

    Example:
        >>> print(f"{original_radius(0.5, (64, 64), 64):.4f}")
        0.5000
    """
    size = _pair(resized)
    read = 2 * _FLOAT32_STEP * math.sqrt(3 * math.prod(original))
    if tuple(original) == size:
        return max(0.0, radius - read) * (1 - 4 * EPS)
    made = 2 * _FLOAT32_STEP * math.sqrt(3 * math.prod(size))
    return max(0.0, max(0.0, radius - made) / resize_norm(original, size) - read) * (1 - 4 * EPS)
