"""Moduli of wavelet coefficients: energies of oriented texture, 1-Lipschitz without anything learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates.numbers import check_count, check_number
from lipsim.layers.base import LipschitzLayer
from lipsim.utils.errors import LipsimError

# Cycles per pixel of the finest wavelets and the standard deviation of their windows; both halve from scale to scale.
_CENTRE, _WIDTH = 0.375, 0.1
_LARGEST = 2**24  # elements of the spectrum, and of all windows of one scale


class Scattering(LipschitzLayer):
    """First-order scattering ``(N, C, S, S) → (N, C·(1 + scales·orientations), grid, grid)`` (Bruna & Mallat 2013).

    Each channel is filtered by Gabor wavelets on a periodic image, what is left of the phase is dropped by the modulus,
    and moduli are averaged over the cells of a grid, as ``block·mean``, whose rows are orthonormal. The first channels
    are the low-pass of each input channel, then come scales from coarse to fine.

    It is 1-Lipschitz because nothing in it expands: squared windows, that of the low-pass included, add up to at most 1
    (but for their rounding, which the bound counts) at every pair of opposite frequencies, which real images weigh
    alike, and neither modulus nor mean lengthens a difference. A wavelet is a window in frequency around its centre,
    cut to a block of the spectrum; the inverse transform of the block alone is the filtered image, sampled and shifted
    in frequency, which the modulus does not see. So coarse wavelets cost little, and Parseval's identity holds for each
    of them to the last digit.

    Args:
        image_size: side ``S``; other sizes are refused, the bound is for this one.
        grid: cells along a side.
        scales: octaves of wavelets; by default as many as it takes for the low-pass to fit on the grid.
        orientations: wavelets of each scale, in half a turn.
        low: factor of the low-pass in [0, 1]. 0 makes constant images collide, 1 leaves nine tenths of the distance
            between photographs to their coarse colours.

    Raises:
        ValueError: a grid that is larger than half of the image, no scales or orientations, more of them than an image
            of this size has or than memory is for, or a factor outside [0, 1].
    """

    window_low: Tensor

    def __init__(
        self, image_size: int, grid: int = 8, scales: int | None = None, orientations: int = 8, low: float = 1.0
    ) -> None:
        super().__init__()
        # Before anything is made of them: sizes may come from the header of a file.
        image_size, grid = check_count("image_size", image_size, 2), check_count("grid", grid)
        if image_size**2 > _LARGEST:
            raise LipsimError(f"images of {image_size} × {image_size} are too large, at most 4096 × 4096")
        if grid > image_size // 2:
            raise LipsimError(f"expected a grid of 1 to {image_size // 2} cells for {image_size} pixels, got {grid}")
        octaves = 1 + math.ceil(math.log2(image_size))
        if scales is None:
            scales = max(1, 1 + math.ceil(math.log2(2 * _CENTRE * image_size / grid)))
        scales, orientations = check_count("scales", scales), check_count("orientations", orientations)
        if scales > octaves:
            raise LipsimError(f"expected at most {octaves} scales for {image_size} pixels, got {scales}")
        self.image_size, self.grid, self.low = image_size, grid, check_number("low", low, 0.0, 1.0)
        self.scales, self.orientations = scales, orientations
        if orientations * self._block(0) ** 2 > _LARGEST:
            raise LipsimError(f"{orientations} wavelets of {self._block(0)}² frequencies each are too many")
        # The lowest row and column of each wavelet's block of the spectrum, by scale.
        self._corners = [self._blocks(scale) for scale in range(scales)]
        windows = [self._windows(scale) for scale in range(scales)]
        energy = self._energy(windows)
        gain = energy.max().rsqrt()
        kept = self._cut((1 - energy * gain**2).clamp(min=0).sqrt(), -(grid // 2), -(grid // 2), grid)
        # Beyond the centre of the coarsest wavelets is what lies between the others, which is left out.
        frequency = self._distances(grid // 2, grid // 2, grid)
        kept = torch.where(frequency < _CENTRE * 2.0 ** (1 - scales) * image_size, low * kept, 0.0)
        self.register_buffer("window_low", kept.to(torch.get_default_dtype()))
        for scale, window in enumerate(windows):
            self.register_buffer(f"window_{scale}", (window * gain).to(torch.get_default_dtype()))

    @property
    def maps(self) -> int:
        """Maps of each input channel."""
        return 1 + self.scales * self.orientations

    def forward(self, x: Tensor) -> Tensor:
        side = self.image_size
        if x.ndim != 4 or tuple(x.shape[2:]) != (side, side) or not x.is_floating_point():
            raise LipsimError(f"expected real images (N, C, {side}, {side}), got {x.dtype} of shape {tuple(x.shape)}")
        if not x.shape[0]:  # which transforms of some libraries do not take
            return x.new_zeros(0, x.shape[1] * self.maps, self.grid, self.grid)
        images = x if x.dtype in (torch.float32, torch.float64) else x.float()
        # As pairs of real numbers: exporters and half of the devices know no arithmetic of complex ones.
        spectrum = torch.view_as_real(torch.fft.fft2(images, norm="ortho"))
        half = self.grid // 2
        low = self._cut(spectrum, -half, -half, self.grid, dim=2) * self.window_low.to(spectrum.dtype).unsqueeze(-1)
        maps = [_inverse(low.roll((-half, -half), (2, 3)))[..., 0]]
        for scale in reversed(range(self.scales)):
            window = getattr(self, f"window_{scale}").to(spectrum.dtype)
            parts = [self._cut(spectrum, *corner, window.shape[-1], dim=2) for corner in self._corners[scale]]
            modulus = torch.linalg.vector_norm(_inverse(torch.stack(parts, 2) * window.unsqueeze(-1)), dim=-1)
            block = modulus.shape[-1] // self.grid
            maps.append(F.avg_pool2d(modulus.flatten(1, 2), block) * block)
        return torch.cat(maps, dim=1).to(x.dtype)

    def lipschitz_bound(self) -> float:
        windows = [getattr(self, f"window_{scale}").detach().double().cpu() for scale in range(self.scales)]
        low = self.window_low.detach().double().cpu()
        for window, shape in zip([low, *windows], self._shapes(), strict=True):
            if tuple(window.shape) != shape:
                raise LipsimError(f"expected a window of shape {shape}, got {tuple(window.shape)}")
        # By the largest, whose square may be too small for a number.
        largest = max(float(window.abs().max()) for window in (low, *windows))
        if not largest:
            return 0.0
        energy = self._energy([window / largest for window in windows], low / largest)
        # Each sum of squares is off by half a unit in the last place for each term and each operation.
        terms = 1 + self.scales * self.orientations
        return float(energy.max().sqrt()) * largest * (1 + (terms + 8) * torch.finfo(torch.float64).eps)

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the windows: of the low-pass, then of each scale."""
        blocks = [self._block(scale) for scale in range(self.scales)]
        return [(self.grid, self.grid), *((self.orientations, block, block) for block in blocks)]

    def _blocks(self, scale: int) -> list[tuple[int, int]]:
        block = self._block(scale)
        return [(round(row) - block // 2, round(column) - block // 2) for row, column in self._centres(scale)]

    def _block(self, scale: int) -> int:
        """Some two and a half standard deviations to each side of the centre, and whole cells of the grid."""
        return self.grid << max(0, math.ceil(math.log2(self.image_size / (2 * self.grid)) - scale))

    def _centres(self, scale: int) -> list[tuple[float, float]]:
        """Row and column in the spectrum, of each orientation."""
        radius = _CENTRE * 2.0**-scale * self.image_size
        angles = (math.pi * number / self.orientations for number in range(self.orientations))
        return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]

    def _windows(self, scale: int) -> Tensor:
        """Gaussians around the centres, ``(orientations, block, block)`` in float64; none passes the mean."""
        deviation, block = _WIDTH * 2.0**-scale * self.image_size, self._block(scale)
        windows = []
        for (row, column), (top, left) in zip(self._centres(scale), self._corners[scale], strict=True):
            window = torch.exp(-0.5 * (self._distances(row - top, column - left, block) / deviation) ** 2)
            windows.append(window * (1 - self._cut(self._mean, top, left, block)))
        return torch.stack(windows)

    @property
    def _mean(self) -> Tensor:
        """1 at frequency 0, ``(S, S)``."""
        return F.pad(torch.ones(1, 1, dtype=torch.float64), (0, self.image_size - 1, 0, self.image_size - 1))

    @staticmethod
    def _distances(row: float, column: float, block: int) -> Tensor:
        """From a place, given in places of the block."""
        place = torch.arange(block, dtype=torch.float64)
        return torch.hypot(place[:, None] - row, place - column)

    def _cut(self, spectrum: Tensor, top: int, left: int, block: int, dim: int = 0) -> Tensor:
        """A block of a periodic spectrum, whose rows and columns are dimensions ``dim`` and the next."""
        for axis, start in ((dim, top % self.image_size), (dim + 1, left % self.image_size)):
            inside = min(block, self.image_size - start)
            part = spectrum.narrow(axis, start, inside)
            # A block is no larger than the spectrum, so it passes its end once at most.
            spectrum = part if inside == block else torch.cat([part, spectrum.narrow(axis, 0, block - inside)], axis)
        return spectrum

    def _energy(self, windows: list[Tensor], low: Tensor | None = None) -> Tensor:
        """Squared windows at each frequency, ``(S, S)`` in float64, mean of that and the opposite one."""
        side = self.image_size
        device = windows[0].device
        energy = torch.zeros(side, side, dtype=torch.float64, device=device)
        parts = [
            (corner, one)
            for corners, window in zip(self._corners, windows, strict=True)
            for corner, one in zip(corners, window, strict=True)
        ]
        if low is not None:
            parts.append(((-(self.grid // 2), -(self.grid // 2)), low))
        for (top, left), window in parts:
            rows, columns = ((start + torch.arange(window.shape[-1], device=device)) % side for start in (top, left))
            energy[rows[:, None], columns] += window**2
        return (energy + energy.flip(0, 1).roll((1, 1), (0, 1))) / 2

    def extra_repr(self) -> str:
        return (
            f"{self.image_size}, grid={self.grid}, scales={self.scales}, orientations={self.orientations}, "
            f"low={self.low}"
        )


def _inverse(part: Tensor) -> Tensor:
    """Inverse transform of blocks ``(…, block, block, 2)`` of a spectrum, real and imaginary part last."""
    return torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(part.contiguous()), norm="ortho"))
