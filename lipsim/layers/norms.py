"""Upper bounds on the operator norms of matrices and convolutions. No power iteration: it bounds from below.

Weights are scaled by a power of two before they are squared, so the bounds hold from the smallest to the largest
numbers; a norm that exceeds those is infinite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_UNIT = 2.3e-16  # above the unit roundoff of float64
_CHUNK = 2**24  # elements of a batch of frequency responses


def matrix_norm_bound(weight: Tensor) -> float:
    """Upper bound in float64 on the largest singular value of ``(…, rows, columns)``, over all leading dimensions.

    From the eigenvalues of the smaller Gram matrix; what rounding can have hidden is added.
    """
    weight = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
    if not torch.isfinite(weight).all():
        return math.inf
    weight, scale = scaled(weight)
    if not scale:
        return 0.0
    rows, columns = weight.shape[-2:]
    gram = weight @ weight.mH if rows <= columns else weight.mH @ weight
    largest = float(torch.linalg.eigvalsh(gram)[..., -1].max())
    return _times(_with_rounding(largest, weight), scale)


def conv_norm_bound(
    kernel: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    num_frequencies: int | None = None,
) -> float:
    """Upper bound in float64 on the norm of a convolution, for every image size, with zero or circular padding.

    A stride ``s`` becomes stride 1 on the ``s × s`` polyphase components, a permutation of the input. The operator on
    the whole plane dominates the padded ones, and its norm is the largest singular value ``σ(ω)`` of the frequency
    response. For fixed ``u``, ``uᴴ(σ² − c)u`` is a real trigonometric polynomial of degree ``d`` (taps − 1) in each
    frequency, which between ``n`` equispaced samples exceeds them by a factor of at most ``1/cos(πd/n)`` (Ehlich and
    Zeller 1964; Wunder and Boche 2003). Nothing is lost where ``σ`` is constant, as for orthogonal convolutions.

    Args:
        kernel: ``(out, in/groups, height, width)``.
        stride: of the convolution, (vertical, horizontal).
        dilation: of the kernel.
        groups: blocks of channels that do not mix.
        num_frequencies: samples per axis; default 64, or 32 for more than 64 channels, which is within 0.3 % or 1.1 %
            for 3 × 3 kernels.
    """
    kernel = kernel.detach().double()
    if not torch.isfinite(kernel).all():
        return math.inf
    kernel, scale = scaled(kernel)
    if not scale:
        return 0.0
    bound = max(
        _plane_norm_bound(polyphase(dilate(block, dilation), stride), num_frequencies) for block in kernel.chunk(groups)
    )
    return _times(bound, scale)


def padded_conv_norm_bound(
    kernel: Tensor,
    input_size: tuple[int, int],
    padding: tuple[int, int, int, int],
    padding_mode: str = "zeros",
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> float:
    """Upper bound on the norm of a convolution with any padding mode, on inputs ``(N, C, *input_size)``.

    Args:
        kernel: ``(out, in/groups, height, width)``.
        input_size: height and width of the input.
        padding: left, right, top, bottom, as in ``torch.nn.functional.pad``.
        padding_mode: zeros, circular, reflect or replicate.
        stride: of the convolution, (vertical, horizontal).
        dilation: of the kernel.
        groups: blocks of channels that do not mix.
    """
    bound = conv_norm_bound(kernel, stride, dilation, groups)
    if padding_mode == "zeros":
        return bound
    gain = 1.0
    for axis, pads in ((0, padding[2:]), (1, padding[:2])):
        size, reach = input_size[axis], (kernel.shape[2 + axis] - 1) * dilation[axis]
        if padding_mode == "circular" and sum(pads) <= reach and size % stride[axis] == 0:
            continue  # distinct rows of the circular operator, which the one on the plane dominates
        # Padding copies pixels; its norm is the root of how often the most copied one appears.
        index = torch.arange(size, dtype=torch.float32).view(1, 1, size)
        gain *= float(F.pad(index, pads, mode=padding_mode).flatten().long().bincount().max()) ** 0.5
    return _times(bound, gain * (1 + 4 * _UNIT))


def gram_iteration_bound(kernel: Tensor, stride: int = 1, iterations: int = 4) -> Tensor:
    """Differentiable upper bound on the norm of a convolution (Delattre et al. 2023, "Gram iteration"), a scalar.

    ``‖W‖^(2^t) ≤ ‖(W Wᵀ)^(2^(t−1))‖_∞``, the largest absolute row sum, for every image size. The products are those
    of frequency responses on a torus that is large enough for the last kernel, so they are the ones on the plane.

    Args:
        kernel: ``(out, in, height, width)``; a matrix is a kernel of one tap.
        stride: of the convolution.
        iterations: ``t``; the bound exceeds the norm by a factor of at most ``n^(1/2^t)`` for ``n`` entries in a row of
            the last product, and by nothing for orthonormal rows.
    """
    with torch.autocast(kernel.device.type, enabled=False):
        half = kernel.dtype in (torch.float16, torch.bfloat16)
        kernel = polyphase(kernel.float() if half else kernel, (stride, stride))
        size = [2**iterations * (taps - 1) + 1 for taps in kernel.shape[2:]]
        tiny = torch.finfo(kernel.dtype).tiny ** 0.5
        largest = kernel.detach().abs().amax().clamp(min=torch.finfo(kernel.dtype).tiny)
        spectrum = torch.fft.rfft2(kernel / largest, s=size).permute(2, 3, 0, 1)
        gram = spectrum @ spectrum.mH if kernel.shape[0] <= kernel.shape[1] else spectrum.mH @ spectrum
        # Scaled before each squaring: the powers would overflow, or vanish.
        log_scale = gram.new_zeros((), dtype=kernel.dtype)
        for _ in range(iterations - 1):
            scale = gram.abs().amax().detach().clamp(min=tiny)
            gram = gram / scale
            gram = gram @ gram
            log_scale = 2 * (log_scale + scale.log())
        power = torch.fft.irfft2(gram.permute(2, 3, 0, 1), s=size)
        rows = power.abs().sum((1, 2, 3)).amax()
        return largest * torch.exp((rows.clamp(min=tiny).log() + log_scale) / 2**iterations)


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean norms of the rows of a matrix, scaled: squares of small numbers vanish, and large ones overflow."""
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    scale = torch.where(largest > 0, largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(weight / scale.unsqueeze(1), dim=1) * scale
    return norms


def polyphase(kernel: Tensor, stride: tuple[int, int]) -> Tensor:
    """Kernel at stride 1 on the ``s_h × s_w`` phases of the input, ``(out, in·s_h·s_w, ⌈h/s_h⌉, ⌈w/s_w⌉)``."""
    stride_h, stride_w = stride
    kernel = F.pad(kernel, (0, -kernel.shape[3] % stride_w, 0, -kernel.shape[2] % stride_h))
    out_channels, in_channels, height, width = kernel.shape
    kernel = kernel.view(out_channels, in_channels, height // stride_h, stride_h, width // stride_w, stride_w)
    return kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def dilate(kernel: Tensor, dilation: tuple[int, int]) -> Tensor:
    """The kernel with zeros between its taps, at dilation 1."""
    if dilation == (1, 1):
        return kernel
    height, width = (1 + (taps - 1) * step for taps, step in zip(kernel.shape[2:], dilation, strict=True))
    dilated = kernel.new_zeros(*kernel.shape[:2], height, width)
    dilated[:, :, :: dilation[0], :: dilation[1]] = kernel
    return dilated


def _plane_norm_bound(kernel: Tensor, num_frequencies: int | None) -> float:
    default = 64 if min(kernel.shape[:2]) <= 64 else 32
    degrees = [taps - 1 for taps in kernel.shape[2:]]
    # One tap has one response; else well above the 2d + 1 samples that determine the polynomial.
    counts = [1 if not degree else max(num_frequencies or default, 8 * degree) for degree in degrees]
    rows, columns = (
        torch.exp(-2j * math.pi * torch.outer(torch.arange(count), torch.arange(degree + 1)).double() / count)
        for count, degree in zip(counts, degrees, strict=True)
    )
    # A real kernel has conjugate responses at ω and −ω.
    columns = columns[: counts[1] // 2 + 1].to(kernel.device)
    taps = kernel.permute(2, 3, 0, 1).to(columns.dtype)
    lowest, highest, frobenius = math.inf, 0.0, 0.0
    for row in rows.to(kernel.device):
        partial = torch.einsum("h,hwoc->woc", row, taps)
        for chunk in columns.split(max(1, _CHUNK // max(1, partial[0].numel()))):
            response = torch.einsum("fw,woc->foc", chunk, partial)
            gram = response @ response.mH if response.shape[1] <= response.shape[2] else response.mH @ response
            eigenvalues = torch.linalg.eigvalsh(gram)
            lowest = min(lowest, float(eigenvalues[:, 0].min()))
            highest = max(highest, float(eigenvalues[:, -1].max()))
            frobenius = max(frobenius, float(gram.diagonal(dim1=1, dim2=2).real.sum(1).max()))
    # A few ulp for the products, taken of the largest trace, which bounds every eigenvalue.
    rounding = _UNIT * (sum(kernel.shape) + kernel[0, 0].numel()) * frobenius
    lowest, highest = lowest - rounding, highest + rounding
    excess = math.prod(1 / math.cos(math.pi * degree / count) for degree, count in zip(degrees, counts, strict=True))
    square = (highest + lowest) / 2 + (highest - lowest) / 2 * excess
    return math.sqrt(max(square, 0.0)) * (1 + 4 * _UNIT)


def scaled(weight: Tensor) -> tuple[Tensor, float]:
    """The weight over a power of two that brings its largest entry into [1, 2), and this power; 0 where all vanish."""
    parts = torch.view_as_real(weight) if weight.is_complex() else weight
    largest = float(parts.abs().max()) if weight.numel() else 0.0
    if not largest:
        return weight, 0.0
    exponent = math.frexp(largest)[1] - 1
    # In two steps: the inverse of the smallest numbers overflows.
    return weight * 2.0 ** -(exponent // 2) * 2.0 ** (exponent // 2 - exponent), 2.0**exponent


def _times(bound: float, scale: float) -> float:
    """Rounded up: below the normal numbers a product loses digits."""
    return math.nextafter(bound * scale, math.inf) if bound else 0.0


def _with_rounding(largest: float, weight: Tensor) -> float:
    frobenius = float(weight.abs().square().sum((-2, -1)).max())
    rounding = _UNIT * 2 * sum(weight.shape[-2:]) * frobenius
    return math.sqrt(max(largest, 0.0) + rounding) * (1 + 4 * _UNIT)
