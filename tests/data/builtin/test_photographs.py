"""Photographs: present without a download, in colour, and altered as asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lipsim.data.builtin.photographs import (
    PHOTOGRAPHS,
    PhotographParameters,
    load_photograph,
    photograph_path,
    render_photograph,
)

NAMES = [name for names in PHOTOGRAPHS.values() for name in names]
PLAIN = PhotographParameters(
    photograph="chelsea", centre_x=0.5, centre_y=0.4, scale=0.6, rotation=0.0, warp=0.0, blur=0.0, noise=0.0,
    lightness=0.0, contrast=1.0, saturation=1.0, green_red=0.0, blue_yellow=0.0, seed=3,
)  # fmt: skip


def test_ten_photographs_in_colour() -> None:
    assert len(NAMES) == len(set(NAMES)) == 10
    for name in NAMES:
        image = load_photograph(name)
        assert image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) >= 300
        assert 0 <= image.min() and image.max() <= 1
        assert np.ptp(image, axis=2).max() > 0.2, f"{name} is grey"


@pytest.mark.parametrize("image_size", [16, 48, 65, 224])
def test_shape_and_range(image_size: int) -> None:
    image = render_photograph(replace(PLAIN, noise=0.2, lightness=0.2, contrast=2.0), image_size)
    assert image.shape == (image_size, image_size, 3)
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1


def test_crop_shows_the_photograph() -> None:
    """A crop of 4 x 64 pixels, read at a quarter of the resolution, is its box average."""
    photograph = load_photograph("astronaut")  # 512 x 512
    parameters = replace(PLAIN, photograph="astronaut", centre_x=0.5, centre_y=0.5, scale=0.5)
    expected = photograph[128:384, 128:384].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.allclose(render_photograph(parameters, 64), expected, atol=1e-5)


def test_alterations_do_what_they_say() -> None:
    plain = render_photograph(PLAIN, 64)

    def altered(**changes: float) -> np.ndarray:
        return render_photograph(replace(PLAIN, **changes), 64)

    def roughness(image: np.ndarray) -> float:
        return float(np.abs(np.diff(image, axis=0)).mean())

    assert roughness(altered(blur=0.04)) < 0.5 * roughness(plain)
    assert roughness(altered(noise=0.1)) > 2 * roughness(plain)
    assert altered(lightness=0.1).mean() == pytest.approx(plain.mean() + 0.1, abs=0.02)
    assert altered(contrast=0.5).mean(axis=2).std() == pytest.approx(0.5 * plain.mean(axis=2).std(), rel=0.1)
    assert np.ptp(altered(saturation=0.2), axis=2).mean() < 0.4 * np.ptp(plain, axis=2).mean()
    red, green, _ = (altered(green_red=0.05) - plain).mean(axis=(0, 1))
    assert red > green + 0.05
    red, green, blue = (altered(blue_yellow=0.05) - plain).mean(axis=(0, 1))
    assert red > blue + 0.05 and green > blue + 0.05
    shifted = altered(shift_x=0.25)
    assert np.abs(shifted[:, :48] - plain[:, 16:]).mean() < 0.01
    assert 0.005 < np.abs(altered(warp=0.02) - plain).mean()
    assert 0.005 < np.abs(altered(rotation=0.1) - plain).mean()


def test_quarter_turn() -> None:
    turned = render_photograph(replace(PLAIN, photograph="astronaut", centre_x=0.5, rotation=np.pi / 2), 64)
    plain = render_photograph(replace(PLAIN, photograph="astronaut", centre_x=0.5), 64)
    errors = [np.abs(turned - np.rot90(plain, k)).mean() for k in range(4)]
    assert int(np.argmin(errors)) == 3  # rot90 turns anticlockwise, so 3 is one turn clockwise
    assert errors[3] < 0.01


def test_seed_draws_warp_and_noise() -> None:
    strong = replace(PLAIN, warp=0.03, noise=0.05)
    assert np.array_equal(render_photograph(strong, 32), render_photograph(strong, 32))
    assert not np.array_equal(render_photograph(strong, 32), render_photograph(replace(strong, seed=4), 32))
    assert np.array_equal(render_photograph(PLAIN, 32), render_photograph(replace(PLAIN, seed=4), 32))


def test_unknown_photograph() -> None:
    with pytest.raises(ValueError, match="chelsea"):
        photograph_path("lena")
