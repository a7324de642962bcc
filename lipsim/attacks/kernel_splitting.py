"""A point of a kernel within the bounds on every pixel, for images with many values at their bounds.

There the equations of :func:`lipsim.attacks.kernel_projection.nearest_in_kernel` are too badly conditioned to be solved
exactly. Here no equation knows the bounds: the projection onto the kernel and that onto the bounds take turns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.attacks.kernel_projection import LinearMap, solve_normal_equations
from lipsim.attacks.projections import sample_norm

_MARGIN = 0.02  # of the widest range of a value: what the turns may still be off by when they end
_PENALTY = 3.0  # of being apart, against being off the direction: in favour of being within the bounds soon
_RELAXATION = 1.6  # the usual over-relaxation of the turns
_TURNS = (100, 50)  # in the first round, in the others, at most
_LEAST, _EVERY = 30, 10  # turns before the first look whether all is within the bounds, and from look to look
_ITERATIONS, _MOST = 8, 2000  # of conjugate gradients for a turn, for the exact projection that ends the search
_LOOSE = 1e-4  # relative residual at which a turn's conjugate gradients stop
_ROUNDS = 12
_FITS = 0.8  # share of each value that has to be within the bounds, before and after the exact projection
_OPEN = 2  # windows, the side of the squares of which what is free has to consist


@torch.no_grad()
def split_in_kernel(linear: LinearMap, v: Tensor, low: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """A point of ``ker A`` within bounds near to ``v``, by the alternating direction method of multipliers.

    The bounds of the turns are narrower by a margin, so that an exact projection onto the kernel, which ends them,
    stays within the true ones: it is as well conditioned as ``A`` is. Where no turn helps, as in larger regions of
    saturated pixels, the pixels of the windows concerned are frozen, together with those that are left between frozen
    ones, as narrow places make the projection badly conditioned again.

    Args:
        linear: ``A``, of one image.
        v: ``(1, 3, H, W)``, to come near to.
        low: of the result, at most 0, like ``v``.
        high: of the result, at least 0, like ``v``.
        tolerance: of ``‖A δ‖/‖A v‖``.

    Returns:
        ``δ`` like ``v``, within the bounds; 0 where nothing was found. How exact it is, is left to the caller to check.
    """
    scale = float(sample_norm(linear(v)))
    margin = _MARGIN * float((high - low).max())
    window = _window(linear, v)
    free = (low < high).to(v)
    best = torch.zeros_like(v)
    near, price = torch.zeros_like(v), torch.zeros_like(v)
    dual = torch.zeros_like(linear(v))
    for number in range(_ROUNDS):
        least, most = torch.minimum(low + margin, (low + high) / 2), torch.maximum(high - margin, (low + high) / 2)
        for turn in range(_TURNS[min(number, 1)]):
            if turn >= _LEAST and turn % _EVERY == 0 and bool((_fitting(near, low, high) >= _FITS).all()):
                break
            clipped = free * ((v + _PENALTY * (near - price)) / (1 + _PENALTY)).clamp(least, most)
            relaxed = _RELAXATION * clipped + (1 - _RELAXATION) * near
            near, dual = _onto_kernel(linear, free, relaxed + price, dual, _LOOSE * scale, _ITERATIONS)
            price = price + relaxed - near
        outside = _fitting(near, low, high) < _FITS
        if not outside.any():
            found, _ = _onto_kernel(linear, free, near, torch.zeros_like(dual), tolerance * scale, _MOST)
            share = _fitting(found, low, high)
            inside = (share.min() * found).clamp(low, high)  # of rounding
            best = torch.where(sample_norm(inside) > sample_norm(best), inside, best)
            outside = share < _FITS
            if not outside.any():
                break
        free = _opened(free * ~_read_with(linear, outside.to(v)), _OPEN * window)
        near, price = free * near, free * price
    return best


def _onto_kernel(
    linear: LinearMap, free: Tensor, q: Tensor, dual: Tensor, goal: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The projection of ``q`` onto what of the kernel is 0 where nothing is free, and its ``y``, from that before."""
    left = linear(free * (q - linear.adjoint(dual)))
    size = sample_norm(left)
    if float(size) > goal:
        dual = dual + solve_normal_equations(linear, free, left, 0 * size, goal / size, iterations)
    return free * (q - linear.adjoint(dual)), dual


def _fitting(delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The share, at most 1, of each value that is within its bounds."""
    return torch.where(delta < low, low / delta, torch.where(delta > high, high / delta, 1.0))


def _read(linear: LinearMap, mask: Tensor) -> Tensor:
    """The outputs, zeros and ones, that read any of the values of a mask: random ones do not cancel."""
    generator = torch.Generator().manual_seed(0)
    image = linear(mask * (1 + torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(mask))).abs()
    reads: Tensor = image > torch.finfo(mask.dtype).eps ** 0.5 * image.max()
    return reads.to(mask)


def _readers(linear: LinearMap, outputs: Tensor) -> Tensor:
    """The values that any of these outputs reads, the same."""
    generator = torch.Generator().manual_seed(0)
    noise = 1 + torch.rand(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    pulled = linear.adjoint(outputs * noise).abs()
    read: Tensor = pulled > torch.finfo(outputs.dtype).eps ** 0.5 * pulled.max()
    return read.to(outputs)


def _read_with(linear: LinearMap, mask: Tensor) -> Tensor:
    """Bool, like ``mask``: pixels, of all channels, that are read together with any of the mask."""
    together = torch.maximum(mask, _readers(linear, _read(linear, mask)))
    return (together.amax(1, keepdim=True) > 0).expand_as(mask)


def _window(linear: LinearMap, like: Tensor) -> int:
    """The larger side, in pixels, of what one output in the middle reads."""
    height, width = like.shape[-2:]
    reach, one = 0, torch.zeros(())
    # With a stride beyond its kernel a convolution skips pixels, the one in the middle perhaps.
    while not one.any() and reach < max(height, width):
        middle = torch.zeros_like(like)
        top, left = max(height // 2 - reach, 0), max(width // 2 - reach, 0)
        middle[..., top : height // 2 + reach + 1, left : width // 2 + reach + 1] = 1
        one, reach = _read(linear, middle).flatten(), 2 * reach + 1
    one[int(one.argmax()) + 1 :] = 0
    rows, columns = _readers(linear, one.view_as(linear(like)))[0].amax(0).nonzero().T
    return int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1


def _opened(free: Tensor, side: int) -> Tensor:
    """What squares inside the free pixels cover (their opening); beyond the border of the image everything is free."""
    pixels = F.pad(free.amin(1, keepdim=True), [side] * 4, value=1.0)
    corners = -F.max_pool2d(-pixels, side, stride=1)
    covered = F.max_pool2d(F.pad(corners, [side - 1] * 4), side, stride=1)
    return free * covered[..., side:-side, side:-side]
