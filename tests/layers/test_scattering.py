"""First-order scattering: against its definition in full resolution, and what its bound rests on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipsim.audit import lipschitz_bound
from lipsim.audit.lower_bounds import attack_lipschitz
from lipsim.layers import Centering, Scattering


def _images(count: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=dtype)


def _moduli(image: np.ndarray, scale: int, angle: float, block: int) -> np.ndarray:
    """``|x ⋆ ψ|`` at every pixel, ``ψ`` a Gabor wavelet cut to a block of the spectrum, with no gain."""
    size = len(image)
    frequency = np.fft.fftfreq(size, 1 / size)
    centre = [0.375 * 2.0**-scale * size * part for part in (math.cos(angle), math.sin(angle))]
    window = np.zeros((size, size))
    for i, row in enumerate(frequency):
        for j, column in enumerate(frequency):
            # Of all frequencies that are the same on this grid of pixels the one inside the block.
            inside = [
                (f - round(c) + block // 2) % size - block // 2 + round(c) - c
                for f, c in zip((row, column), centre, strict=True)
            ]
            places = [(f - round(c) + block // 2) % size for f, c in zip((row, column), centre, strict=True)]
            if max(places) < block and (row or column):
                window[i, j] = math.exp(-0.5 * sum(x**2 for x in inside) / (0.1 * 2.0**-scale * size) ** 2)
    return np.abs(np.fft.ifft2(np.fft.fft2(image) * window))


@pytest.mark.parametrize(("size", "grid"), [(32, 8), (32, 4), (16, 8)])
def test_it_is_wavelets_moduli_and_means(size: int, grid: int) -> None:
    layer = Scattering(size, grid, orientations=4).double()
    image = _images(1, size)
    maps = layer(image)[0].numpy()
    energies = []
    for scale in range(layer.scales):
        block = grid * 2 ** max(0, math.ceil(math.log2(size / 2 / grid)) - scale)
        step = size // block
        for number in range(4):
            moduli = _moduli(image[0, 1].numpy(), scale, math.pi * number / 4, block)
            # Sampled once for each place of the block, scaled to keep the norm, then the mean of a cell times its side.
            samples = moduli[::step, ::step] * step
            cell = block // grid
            means = samples.reshape(grid, cell, grid, cell).mean((1, 3)) * cell
            found = maps[3 + 12 * (layer.scales - 1 - scale) + 4 + number]
            energies.append(found / means)
    ratios = np.stack(energies)
    np.testing.assert_allclose(ratios, ratios.flat[0], rtol=1e-5)  # one gain for all; windows are rounded to float32
    assert 0.5 < ratios.flat[0] < 3


@pytest.mark.parametrize("size", [16, 33, 64])
def test_the_low_pass_keeps_the_means_of_smooth_images(size: int) -> None:
    layer = Scattering(size).double()
    constant = torch.full((1, 3, size, size), 0.25, dtype=torch.float64)
    maps = layer(constant)
    torch.testing.assert_close(maps[:, :3], torch.full_like(maps[:, :3], 0.25 * size / 8), rtol=1e-6, atol=0)
    assert maps[:, 3:].abs().max() < 1e-12
    # A wave of a period of the whole side has its sine in the cells, of the length that the wavelets leave.
    place = torch.arange(size, dtype=torch.float64)
    wave = torch.sin(2 * math.pi * place / size).expand(1, 3, size, size)
    cells = torch.sin(2 * math.pi * torch.arange(8, dtype=torch.float64) / 8) * size / 8
    low, moduli = layer(wave).split([3, 3 * (layer.maps - 1)], dim=1)
    kept = float((low[0, 0, 0] @ cells) / (cells @ cells))
    torch.testing.assert_close(low, kept * cells.expand_as(low), rtol=1e-6, atol=1e-9)
    total = (low.square().sum() + moduli.square().sum()) / wave.square().sum()
    assert 0.5 < kept < 1 and total == pytest.approx(1.0, abs=1e-6)
    assert Scattering(size, low=0.0).double()(constant).abs().max() < 1e-12


@pytest.mark.parametrize(("size", "grid"), [(16, 8), (21, 4), (32, 2)])
@pytest.mark.parametrize("low", [0.0, 0.05, 1.0])
def test_squared_windows_add_up_to_the_bound(size: int, grid: int, low: float) -> None:
    """Waves of each frequency, whose moduli are nearly constant, so that means keep their length."""
    layer = Scattering(size, grid, low=low).double()
    place = torch.arange(size, dtype=torch.float64)
    rows, columns = (t.flatten()[:, None, None] for t in torch.meshgrid(place, place, indexing="ij"))
    waves = torch.cos(2 * math.pi * (rows * place[:, None] + columns * place) / size)
    waves = waves / waves.flatten(1).norm(dim=1)[:, None, None]
    longest = float(layer(waves.unsqueeze(1)).flatten(1).norm(dim=1).max())
    bound = layer.lipschitz_bound()
    assert 0.99 * bound < longest <= bound * (1 + 1e-12) and 0.99 < bound < 1 + 1e-6


def test_an_attack_comes_near_to_the_bound() -> None:
    network = nn.Sequential(Centering(), Scattering(32), nn.Flatten())
    total = lipschitz_bound(network, 32).total
    found = attack_lipschitz(network.double(), _images(4, 32), 60)
    assert 0.9 < found <= total <= 1 + 1e-6


def test_texture_counts_and_its_place_in_a_cell_does_not() -> None:
    layer = Scattering(64, low=0.05)
    texture = torch.rand(1, 3, 64, 64)
    moved, other = texture.roll((2, 2), (2, 3)), torch.rand(1, 3, 64, 64) * 0.3
    near, far = (float((layer(x) - layer(texture)).norm()) for x in (moved, other))
    assert near < 0.4 * float((moved - texture).norm()) and near < 0.5 * far


def test_gradients_are_finite_where_moduli_vanish() -> None:
    x = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    Scattering(16)(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_single(dtype: torch.dtype) -> None:
    layer, x = Scattering(16), _images(2, 16, torch.float32)
    found = layer(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), layer(x.to(dtype).float()), rtol=1e-2, atol=1e-2)


def test_beyond_the_coarsest_wavelets_the_low_pass_ends() -> None:
    """What lies between other wavelets is left out, though the grid would hold it."""
    layer = Scattering(64, low=1.0).double()  # the coarsest have 3 waves across the image, the grid holds 4
    place = torch.arange(64, dtype=torch.float64)
    for frequency, passes in ((2, True), (3, False)):
        wave = torch.cos(2 * math.pi * frequency * (place[:, None] + place) / 64).expand(1, 1, 64, 64)
        assert bool(layer(wave)[:, 0].abs().max() > 1e-6) is passes


def test_no_images_have_no_features() -> None:
    assert Scattering(16)(torch.rand(0, 3, 16, 16)).shape == (0, 51, 8, 8)


def test_the_bound_is_of_the_windows_as_they_are() -> None:
    layer = Scattering(16, low=0.0).double()
    wide, narrow = layer.lipschitz_bound(), 1e-170
    for scale in range(layer.scales):
        getattr(layer, f"window_{scale}").mul_(narrow)
    assert layer.lipschitz_bound() == pytest.approx(wide * narrow, rel=1e-12)
    layer.window_low = 3 * torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a window of shape \(8, 8\), got \(1, 1\)"):
        layer.lipschitz_bound()


def test_a_default_device_leaves_the_bound_alone() -> None:
    layer = Scattering(16)
    expected = layer.lipschitz_bound()
    with torch.device("meta"):
        assert layer.lipschitz_bound() == expected
        assert Scattering(16)(torch.rand(2, 3, 16, 16)).shape == (2, 51, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100_000}, "at most 4096 × 4096"),
        ({"image_size": 10**400}, "too large"),
        ({"image_size": 64.0}, "a whole number image_size"),
        ({"grid": 9}, "a grid of 1 to 8 cells for 16 pixels, got 9"),
        ({"grid": 8.0}, "a whole number grid"),
        ({"scales": 0}, "a whole number scales ≥ 1"),
        ({"scales": 6}, "at most 5 scales for 16 pixels, got 6"),
        ({"orientations": 0}, "a whole number orientations ≥ 1"),
        ({"orientations": True}, "a whole number orientations"),
        ({"orientations": 10**8}, "too many"),
        ({"low": 1.1}, "low"),
        ({"low": -0.1}, "low"),
        ({"low": "1"}, "low"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scattering(**{"image_size": 16, **options})


@pytest.mark.parametrize(
    "x",
    [torch.rand(1, 3, 16, 17), torch.rand(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)],
    ids=["size", "no batch", "integers"],
)
def test_other_inputs_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"real images \(N, C, 16, 16\), got"):
        Scattering(16)(x)
