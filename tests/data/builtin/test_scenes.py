"""Dead leaves: in range, smooth, the same at any resolution, and every parameter does what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lipsim.data.builtin.scenes import SCENE_FACTORS, SceneParameters, oklab_to_srgb, render_scene

PLAIN = SceneParameters(
    lightness=0.6, green_red=0.0, blue_yellow=0.0, lightness_spread=0.1, tone_cos=0.0, tone_sin=0.0, radius=0.12,
    squareness=0.3, stretch_cos=0.0, stretch_sin=0.0, texture_contrast=0.0, texture_frequency=8.0, layout_seed=5,
)  # fmt: skip


@pytest.mark.parametrize("image_size", [16, 48, 65, 128])
def test_shape_and_range(image_size: int) -> None:
    bright = replace(PLAIN, lightness=0.9, texture_contrast=0.9)
    image = render_scene(bright, image_size)
    assert image.shape == (image_size, image_size, 3)
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1


def test_is_a_function_of_its_parameters() -> None:
    assert np.array_equal(render_scene(PLAIN, 32), render_scene(replace(PLAIN), 32))
    assert not np.array_equal(render_scene(PLAIN, 32), render_scene(replace(PLAIN, layout_seed=6), 32))


def test_is_antialiased() -> None:
    """Two flat colours would give two values; edges that fall between pixels give mixtures."""
    image = render_scene(replace(PLAIN, lightness_spread=0.0, tone_cos=0.12), 64)
    coarse = render_scene(replace(PLAIN, lightness_spread=0.0, tone_cos=0.12), 128).reshape(64, 2, 64, 2, 3)
    assert np.abs(image - coarse.mean(axis=(1, 3))).mean() < 0.01  # the same scene at twice the resolution
    sampled = coarse[:, 0, :, 0]
    assert np.abs(image - sampled).mean() > 2 * np.abs(image - coarse.mean(axis=(1, 3))).mean()


def test_shift_moves_the_leaves() -> None:
    image, moved = render_scene(PLAIN, 64), render_scene(replace(PLAIN, shift_x=0.25, shift_y=-0.125), 64)
    assert np.abs(moved[:56, 16:] - image[8:, :48]).mean() < 0.01
    assert np.abs(moved - image).mean() > 0.03


def test_rearranging_keeps_the_statistics_and_changes_the_pixels() -> None:
    def render(rearranged: float) -> np.ndarray:
        return np.stack([
            render_scene(replace(PLAIN, layout_seed=i, rearranged=rearranged, rearrangement_seed=100 + i), 32)
            for i in range(30)
        ])  # fmt: skip

    images, others, partly = render(0.0), render(1.0), render(0.1)
    assert others.mean() == pytest.approx(images.mean(), abs=0.02)
    assert others.std() == pytest.approx(images.std(), rel=0.15)
    assert 2 * np.abs(partly - images).mean() < np.abs(others - images).mean()


def test_colour_parameters() -> None:
    def mean(**changes: float) -> np.ndarray:
        return render_scene(replace(PLAIN, **changes), 32).mean(axis=(0, 1))

    grey = mean()
    assert (mean(lightness=0.75) > grey + 0.05).all()
    red, green, blue = mean(green_red=0.1) - grey
    assert red > 0.05 and green < 0
    red, green, blue = mean(blue_yellow=-0.1) - grey
    assert blue > 0.05 and red < 0


def test_two_tones_lie_on_the_axis() -> None:
    flat = replace(PLAIN, lightness_spread=0.0)
    image = render_scene(replace(flat, tone_cos=0.12), 64)  # red and green
    red, blue = image[..., 0] - image[..., 1], image[..., 2]
    assert red.min() < -0.1 and red.max() > 0.2
    along_b = render_scene(replace(flat, tone_cos=-0.12), 64)  # blue and yellow
    assert along_b[..., 2].std() > 1.5 * blue.std()


def test_stretch_sets_the_orientation() -> None:
    def slope(**changes: float) -> tuple[float, float]:
        image = render_scene(replace(PLAIN, **changes), 64).mean(axis=2)
        return np.abs(np.diff(image, axis=1)).mean(), np.abs(np.diff(image, axis=0)).mean()

    along_x, along_y = slope(stretch_cos=1.4)
    assert along_y > 2 * along_x  # leaves along x: their edges are met going down
    along_x, along_y = slope(stretch_cos=-1.4)
    assert along_x > 2 * along_y

    image = render_scene(replace(PLAIN, stretch_sin=1.4), 64).mean(axis=2)
    falling, rising = np.abs(image[1:, 1:] - image[:-1, :-1]).mean(), np.abs(image[1:, :-1] - image[:-1, 1:]).mean()
    assert rising > 1.5 * falling  # leaves fall to the right: the other diagonal meets their edges


def test_texture_and_size() -> None:
    def roughness(**changes: float) -> float:
        return float(np.abs(np.diff(render_scene(replace(PLAIN, **changes), 64), axis=1)).mean())

    assert roughness(texture_contrast=0.5) > 2 * roughness()
    assert roughness(texture_contrast=0.5, texture_frequency=12.0) > 1.3 * roughness(
        texture_contrast=0.5, texture_frequency=6.0
    )
    assert roughness(radius=0.08) > 1.3 * roughness(radius=0.2)


def test_oklab_known_colours() -> None:
    """White, black, and the published OKLab coordinates of pure red."""
    oklab = np.array([[1, 0, 0], [0, 0, 0], [0.627955, 0.224863, 0.125846]], dtype=np.float32)
    assert np.allclose(oklab_to_srgb(oklab), [[1, 1, 1], [0, 0, 0], [1, 0, 0]], atol=2e-3)


def test_every_factor_shows() -> None:
    striped = replace(PLAIN, texture_contrast=0.4)
    for factor in SCENE_FACTORS:
        low, high = (render_scene(replace(striped, **{factor.name: v}), 32) for v in (factor.low, factor.high))
        assert np.abs(low - high).mean() > 0.01, factor.name
