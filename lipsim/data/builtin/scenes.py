"""Procedural "dead leaves" scenes: overlapping textured leaves, as statistically natural as simple images get.

A scene is a stack of leaves that hide each other (Matheron 1968; Lee, Mumford and Huang 2001 show that its statistics
are close to those of photographs). All lengths are fractions of the side of the image, so a scene looks the same at any
resolution. Colours live in OKLab (Ottosson 2020), where equal distances look about equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lipsim.data.builtin.factors import Factor

FloatArray = NDArray[np.float32]

# Expected number of leaves over a point: exp(-3) of the area shows the background leaf.
_COVERAGE = 3.0
# Leaf radii are log-normal with this sigma, cut at two sigma.
_RADIUS_SIGMA = 0.25
# Orientations of the leaves of a scene scatter by this many radians about their mean.
_ORIENTATION_SIGMA = 0.2
# Leaves of one tone and lightness scatter by these standard deviations of OKLab L, a and b.
_SCATTER = np.array([0.03, 0.015, 0.015], dtype=np.float32)
# Supersampled images are at least this wide, so that small ones are smooth too.
_MIN_SAMPLES = 128


@dataclass(frozen=True)
class SceneParameters:
    """Generative parameters of a dead leaves scene.

    Attributes:
        lightness: mean OKLab lightness of the leaves, 0 (black) to 1 (white).
        green_red: mean OKLab a of the leaves, about -0.15 (green) to 0.15 (magenta red).
        blue_yellow: mean OKLab b, about -0.15 (blue) to 0.15 (yellow).
        lightness_spread: half the difference in lightness of the light and the dark leaves; either tone has both.
        tone_cos: the leaves come in two complementary tones, a distance c to either side of the mean colour along an
            axis at angle t in the plane of a and b; this is c cos 2t: positive for red and green leaves.
        tone_sin: c sin 2t.
        radius: median radius of the leaves, a fraction of the image side.
        squareness: 0 for ellipses, 1 for rectangles, blends between.
        stretch_cos: the leaves' length over width has the natural logarithm s, and they lie at angle t; this is
            s cos 2t: positive for leaves along x, negative along y.
        stretch_sin: s sin 2t: positive for leaves that fall to the right.
        texture_contrast: amplitude of the stripes on a leaf relative to its colour, 0 to 1.
        texture_frequency: stripes per image side.
        layout_seed: seed of positions, order and everything else that varies from leaf to leaf.
        rearranged: fraction of the leaves replaced by others of the same statistics, 0 to 1.
        rearrangement_seed: seed of the leaves that replace them.
        shift_x: displacement of all leaves to the right, a fraction of the image side, within [-0.5, 0.5].
        shift_y: displacement down.
    """

    lightness: float
    green_red: float
    blue_yellow: float
    lightness_spread: float
    tone_cos: float
    tone_sin: float
    radius: float
    squareness: float
    stretch_cos: float
    stretch_sin: float
    texture_contrast: float
    texture_frequency: float
    layout_seed: int
    rearranged: float = 0.0
    rearrangement_seed: int = 0
    shift_x: float = 0.0
    shift_y: float = 0.0


SCENE_FACTORS = (
    Factor("lightness", 0.42, 0.78, step=0.065, weight=0.7),
    Factor("green_red", -0.09, 0.09, step=0.035, weight=0.7),
    Factor("blue_yellow", -0.09, 0.09, step=0.035, weight=0.7),
    Factor("lightness_spread", 0.02, 0.20, step=0.04, weight=1.0),
    Factor("tone_cos", -0.14, 0.14, step=0.045, weight=1.6),
    Factor("tone_sin", -0.14, 0.14, step=0.045, weight=1.6),
    Factor("radius", 0.09, 0.26, step=0.28, log=True, weight=0.5),
    Factor("stretch_cos", -1.6, 1.6, step=0.7, weight=0.3),
    Factor("stretch_sin", -1.6, 1.6, step=0.7, weight=0.3),
    Factor("texture_contrast", 0.0, 0.7, step=0.12, weight=0.7),
    Factor("texture_frequency", 3.0, 9.0, step=0.3, log=True, weight=0.4),
)


@dataclass(frozen=True)
class _Leaves:
    """Random numbers of ``n`` leaves, the topmost first, before the parameters give them a scale."""

    position: FloatArray  # (n, 2) in [0, 1): within the area that can be shifted into view
    normal: FloatArray  # (n, 5) standard normal: radius, orientation, lightness, a, b
    texture: FloatArray  # (n, 2) in [0, 1): direction and phase of the stripes
    sign: FloatArray  # (n, 2) -1 or 1: dark or light, one tone or the other


def render_scene(parameters: SceneParameters, image_size: int) -> FloatArray:
    """Draw a scene, antialiased by supersampling.

    Args:
        parameters: the scene.
        image_size: side of the image in pixels.

    Returns:
        ``(H, W, 3)`` float32 in [0, 1], H = W = ``image_size``.
    """
    radius_scale = math.exp(2 * _RADIUS_SIGMA**2)  # E[r^2] = median^2 exp(2 sigma^2)
    margin = 0.5 + 2 * parameters.radius  # leaves centred out here can still be shifted into view
    extent = 1 + 2 * margin
    num_leaves = math.ceil(_COVERAGE * extent**2 / (math.pi * parameters.radius**2 * radius_scale))
    leaves = _draw_leaves(parameters, num_leaves)

    supersampling = max(2, -(-_MIN_SAMPLES // image_size))
    side = image_size * supersampling
    centres = (leaves.position * extent - margin + (parameters.shift_x, parameters.shift_y)).astype(np.float32)
    owner = _paint(parameters, leaves, centres, side)
    pixels = _shade(parameters, leaves, owner)
    blocks = pixels.reshape(image_size, supersampling, image_size, supersampling, 3)
    image = np.zeros((image_size, image_size, 3), dtype=np.float32)
    for i, j in np.ndindex(supersampling, supersampling):  # several times faster than blocks.mean(axis=(1, 3))
        image += blocks[:, i, :, j]
    image /= supersampling**2
    return np.minimum(image, 1, out=image)  # a sum of ones can round up


def _draw_leaves(parameters: SceneParameters, num_leaves: int) -> _Leaves:
    """Random numbers per leaf; each leaf's are the same whatever the scene's statistics and the number of leaves."""
    table = _leaf_table(np.random.default_rng(parameters.layout_seed), num_leaves)
    if parameters.rearranged > 0:
        other = np.random.default_rng(parameters.rearrangement_seed)
        replaced = other.random(num_leaves, dtype=np.float32) < parameters.rearranged
        table = np.where(replaced[:, None], _leaf_table(other, num_leaves), table)
    uniform, normal = table[:, :6], table[:, 6:]
    sign = np.where(uniform[:, 4:] < 0.5, np.float32(-1), np.float32(1))
    return _Leaves(position=uniform[:, :2], normal=np.clip(normal, -2, 2), texture=uniform[:, 2:4], sign=sign)


def _leaf_table(rng: np.random.Generator, num_leaves: int) -> FloatArray:
    """``(n, 11)``: 6 uniform and 5 standard normal columns."""
    first, second = rng.spawn(2)
    uniform = first.random((num_leaves, 6), dtype=np.float32)
    return np.concatenate([uniform, second.standard_normal((num_leaves, 5), dtype=np.float32)], axis=1)


def _paint(parameters: SceneParameters, leaves: _Leaves, centres: FloatArray, side: int) -> NDArray[np.intp]:
    """``(side, side)``: which leaf each sample shows. Every leaf touches its bounding box only."""
    radius = parameters.radius * np.exp(_RADIUS_SIGMA * leaves.normal[:, 0])
    stretch = 0.5 * math.hypot(parameters.stretch_cos, parameters.stretch_sin)
    mean_angle = 0.5 * math.atan2(parameters.stretch_sin, parameters.stretch_cos)
    angle = mean_angle + _ORIENTATION_SIGMA * leaves.normal[:, 1]
    length, width = radius * math.exp(stretch), radius * math.exp(-stretch)  # same area whatever the stretch
    cos, sin = np.cos(angle), np.sin(angle)
    half = np.stack(  # half the bounding box of the rotated rectangle, which contains the ellipse
        [length * abs(cos) + width * abs(sin), length * abs(sin) + width * abs(cos)], axis=1
    )
    lower = np.clip(np.floor((centres - half) * side), 0, side).astype(int)
    upper = np.clip(np.ceil((centres + half) * side), 0, side).astype(int)
    visible = np.flatnonzero((lower < upper).all(axis=1))[::-1]  # the topmost is painted last

    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    square = np.float32(parameters.squareness)
    round_ = np.float32(1 - parameters.squareness)
    # In coordinates u, v the leaf is a unit ball. Columns: how u grows with x and with y, and v likewise.
    forms = np.stack([cos / length, sin / length, -sin / width, cos / width], axis=1)
    offset_u = forms[:, 0] * centres[:, 0] + forms[:, 1] * centres[:, 1]
    offset_v = forms[:, 2] * centres[:, 0] + forms[:, 3] * centres[:, 1]
    owner = np.full((side, side), len(radius) - 1, dtype=np.intp)
    for i, (x0, y0), (x1, y1), (ux, uy, vx, vy), ou, ov in zip(
        visible.tolist(), lower[visible].tolist(), upper[visible].tolist(), forms[visible], offset_u[visible],
        offset_v[visible], strict=True,
    ):  # fmt: skip
        x, y = grid[x0:x1], grid[y0:y1, None]
        u = ux * x - ou + uy * y
        v = vx * x - ov + vy * y
        u *= u
        v *= v
        inside = round_ * (u + v) + square * np.maximum(u, v) < 1
        owner[y0:y1, x0:x1][inside] = i
    return owner


def _shade(parameters: SceneParameters, leaves: _Leaves, owner: NDArray[np.intp]) -> FloatArray:
    """``(side, side, 3)`` in [0, 1]: colour and stripes of the leaf that each sample shows."""
    strength = math.hypot(parameters.tone_cos, parameters.tone_sin)
    axis = 0.5 * math.atan2(parameters.tone_sin, parameters.tone_cos)
    oklab = _SCATTER * leaves.normal[:, 2:]
    oklab[:, 0] += parameters.lightness + parameters.lightness_spread * leaves.sign[:, 0]
    oklab[:, 1] += parameters.green_red + strength * math.cos(axis) * leaves.sign[:, 1]
    oklab[:, 2] += parameters.blue_yellow + strength * math.sin(axis) * leaves.sign[:, 1]
    colour = oklab_to_srgb(oklab)

    angle = 2 * np.pi * leaves.texture[:, 0]
    frequency = 2 * np.pi * parameters.texture_frequency
    wave_x, wave_y = frequency * np.cos(angle), frequency * np.sin(angle)
    side = len(owner)
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    phase = wave_x[owner] * grid + wave_y[owner] * grid[:, None] + (2 * np.pi * leaves.texture[:, 1])[owner]
    stripes = 1 + np.float32(parameters.texture_contrast) * np.sin(phase, dtype=np.float32)
    image: FloatArray = np.clip(colour[owner] * stripes[..., None], 0, 1)
    return image


def oklab_to_srgb(oklab: FloatArray) -> FloatArray:
    """Colours ``(..., 3)`` from OKLab (L in [0, 1]) to sRGB in [0, 1], clipped to what a screen can show."""
    cone = (oklab @ _OKLAB_TO_CONE) ** 3
    linear = np.clip(cone @ _CONE_TO_LINEAR, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)


# Björn Ottosson, "A perceptual color space for image processing" (2020), transposed for row vectors.
_OKLAB_TO_CONE = np.array(
    [[1.0, 1.0, 1.0], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]],
    dtype=np.float32,
)
_CONE_TO_LINEAR = np.array(
    [
        [4.0767416621, -1.2684380046, -0.0041960863],
        [-3.3077115913, 2.6097574011, -0.7034186147],
        [0.2309699292, -0.3413193965, 1.7076147010],
    ],
    dtype=np.float32,
)
