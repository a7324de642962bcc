"""The colour photographs inside the scikit-image and scikit-learn wheels, cropped and altered: nothing is downloaded.

The files are opened by path, because ``skimage.data.*`` may fetch what the wheel lacks. Every photograph belongs to one
split only.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lipsim.data.builtin.factors import Factor
from lipsim.data.triplet import Split
from lipsim.utils.errors import LipsimError

FloatArray = NDArray[np.float32]

# Names per split. Left and right motorcycle are one scene, so only one of them is here.
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": ("astronaut", "coffee", "hubble_deep_field", "ihc", "motorcycle_left", "china"),
    "val": ("rocket", "retina"),
    "test": ("chelsea", "flower"),
}
_FOLDERS = {"china": ("sklearn", "datasets/images"), "flower": ("sklearn", "datasets/images")}
_WARP_WAVES = 4  # plane waves in a random warp

# Luma and two colour differences of an RGB colour (rows), and back: linear, so that averages keep their meaning.
_TO_OPPONENT = np.array([[0.299, 0.587, 0.114], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]], dtype=np.float32)
_FROM_OPPONENT = np.linalg.inv(_TO_OPPONENT)


@dataclass(frozen=True)
class PhotographParameters:
    """How a picture is made from a photograph.

    Attributes:
        photograph: name, one of :data:`PHOTOGRAPHS`.
        centre_x: centre of the crop, a fraction of the photograph's width.
        centre_y: centre of the crop, a fraction of the height.
        scale: side of the crop, a fraction of the photograph's shorter side.
        rotation: radians, clockwise as seen.
        warp: root mean square displacement of a smooth random warp, a fraction of the crop.
        blur: standard deviation of a Gaussian blur, a fraction of the image side.
        noise: standard deviation of white noise, in [0, 1] grey levels.
        lightness: added to luma, in [0, 1] grey levels.
        contrast: factor on luma about its mean.
        saturation: factor on the colour differences.
        green_red: added to (red - green) / 2.
        blue_yellow: added to yellow minus blue, halved.
        seed: of warp and noise.
        shift_x: displacement of the crop to the right, a fraction of its side.
        shift_y: displacement down.
    """

    photograph: str
    centre_x: float
    centre_y: float
    scale: float
    rotation: float
    warp: float
    blur: float
    noise: float
    lightness: float
    contrast: float
    saturation: float
    green_red: float
    blue_yellow: float
    seed: int
    shift_x: float = 0.0
    shift_y: float = 0.0


PHOTOGRAPH_FACTORS = (
    Factor("scale", 0.15, 0.95, step=0.2, log=True, start=(0.3, 0.7), weight=0.7),
    Factor("rotation", -1.2, 1.2, step=0.3, start=(0.0, 0.0), weight=0.4),
    Factor("warp", 0.0, 0.1, step=0.022, start=(0.0, 0.0), weight=0.3),
    Factor("blur", 0.0, 0.07, step=0.014, start=(0.0, 0.0), weight=0.4),
    Factor("noise", 0.0, 0.2, step=0.035, start=(0.0, 0.02), weight=0.4),
    Factor("lightness", -0.3, 0.3, step=0.06, start=(-0.05, 0.05), weight=0.7),
    Factor("contrast", 0.4, 2.0, step=0.18, log=True, start=(0.85, 1.15), weight=1.3),
    Factor("saturation", 0.2, 2.2, step=0.3, log=True, start=(0.8, 1.2), weight=1.3),
    Factor("green_red", -0.2, 0.2, step=0.035, start=(-0.02, 0.02), weight=0.7),
    Factor("blue_yellow", -0.2, 0.2, step=0.035, start=(-0.02, 0.02), weight=0.7),
)


def photograph_path(name: str) -> Path:
    """Where the wheel keeps a photograph.

    Raises:
        ValueError: if it is none of :data:`PHOTOGRAPHS`.
        FileNotFoundError: if this version of the wheel lacks it.
    """
    names = [known for names in PHOTOGRAPHS.values() for known in names]
    if name not in names:
        raise LipsimError(f"expected one of the photographs {', '.join(names)}, got {name!r}")
    package, folder = _FOLDERS.get(name, ("skimage", "data"))
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"photograph {name!r} ships inside {package}, which is not installed")
    for suffix in (".png", ".jpg"):
        path = Path(spec.origin).parent / folder / (name + suffix)
        if path.is_file():
            return path
    raise FileNotFoundError(f"photograph {name!r} is not in the installed {package}; reinstall it from its wheel")


@functools.lru_cache(maxsize=16)
def load_photograph(name: str) -> FloatArray:
    """A photograph, ``(H, W, 3)`` float32 in [0, 1]; cached, so do not write to it.

    Raises:
        ValueError: if it is none of :data:`PHOTOGRAPHS`.
        FileNotFoundError: if this version of the wheel lacks it.
    """
    with Image.open(photograph_path(name)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


@functools.lru_cache(maxsize=16)
def _pyramid(name: str) -> tuple[FloatArray, ...]:
    """The photograph at full, 1/2, 1/4, ... resolution by box averages, so that reading it coarsely does not alias."""
    levels = [load_photograph(name)]
    while min(levels[-1].shape[:2]) >= 32:
        h, w = (side // 2 * 2 for side in levels[-1].shape[:2])
        levels.append(levels[-1][:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3)))
    return tuple(levels)


def render_photograph(parameters: PhotographParameters, image_size: int) -> FloatArray:
    """Crop, warp, blur, recolour and add noise, in this order.

    Args:
        parameters: what to do to which photograph. Crops that reach over the border see it mirrored.
        image_size: side of the result in pixels.

    Returns:
        ``(H, W, 3)`` float32 in [0, 1], H = W = ``image_size``.

    Raises:
        ValueError: if the photograph is unknown.
    """
    warp_rng, noise_rng = np.random.default_rng(parameters.seed).spawn(2)
    image = _crop(parameters, image_size, warp_rng)
    if parameters.blur * image_size > 0.1:  # below a tenth of a pixel the kernel is a delta
        from scipy.ndimage import gaussian_filter  # slow to import, for photographs alone

        image = gaussian_filter(image, sigma=parameters.blur * image_size, axes=(0, 1), mode="reflect")
    opponent = image @ _TO_OPPONENT.T
    mean = opponent[..., 0].mean()
    opponent[..., 0] = (opponent[..., 0] - mean) * parameters.contrast + mean + parameters.lightness
    opponent[..., 1:] *= parameters.saturation
    opponent[..., 1] += parameters.green_red
    opponent[..., 2] -= parameters.blue_yellow
    image = opponent @ _FROM_OPPONENT.T
    if parameters.noise > 0:
        image += parameters.noise * noise_rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1)


def _crop(parameters: PhotographParameters, image_size: int, rng: np.random.Generator) -> FloatArray:
    """Read the rotated and warped crop by bilinear interpolation, at the resolution nearest to the image's."""
    levels = _pyramid(parameters.photograph)
    height, width = levels[0].shape[:2]
    side = parameters.scale * min(height, width)
    level = min(max(round(math.log2(side / image_size)), 0), len(levels) - 1)

    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    x, y = np.meshgrid(axis + parameters.shift_x, axis + parameters.shift_y)
    # Plane waves of one or two periods per crop. A unit wave has mean square 1/2, so this amplitude makes it warp^2.
    angle, phase = 2 * np.pi * rng.random((2, _WARP_WAVES))
    period = 2 * np.pi * rng.uniform(0.8, 1.8, _WARP_WAVES)
    direction = 2 * np.pi * rng.random(_WARP_WAVES)
    dx, dy = np.zeros_like(x), np.zeros_like(y)
    for k in range(_WARP_WAVES):
        wave = np.sin(period[k] * (math.cos(angle[k]) * x + math.sin(angle[k]) * y) + phase[k])
        dx += math.cos(direction[k]) * wave
        dy += math.sin(direction[k]) * wave
    amplitude = parameters.warp * math.sqrt(2 / _WARP_WAVES)
    x, y = x + amplitude * dx, y + amplitude * dy

    cos, sin = math.cos(parameters.rotation), math.sin(parameters.rotation)
    column = (parameters.centre_x * width + side * (cos * x + sin * y)) / 2**level - 0.5
    row = (parameters.centre_y * height + side * (cos * y - sin * x)) / 2**level - 0.5
    return _bilinear(levels[level], row, column)


def _bilinear(image: FloatArray, row: NDArray[np.floating], column: NDArray[np.floating]) -> FloatArray:
    """Values ``(..., 3)`` of an image mirrored at its borders, at fractional positions."""
    row, column = (_mirror(position, side) for position, side in zip((row, column), image.shape[:2], strict=True))
    top = np.clip(row.astype(int), 0, image.shape[0] - 2)
    left = np.clip(column.astype(int), 0, image.shape[1] - 2)
    down, across = (row - top)[..., None], (column - left)[..., None]
    upper = image[top, left] * (1 - across) + image[top, left + 1] * across
    lower = image[top + 1, left] * (1 - across) + image[top + 1, left + 1] * across
    values: FloatArray = (upper * (1 - down) + lower * down).astype(np.float32)
    return values


def _mirror(position: NDArray[np.floating], side: int) -> NDArray[np.floating]:
    """Positions folded into [0, side - 1]."""
    folded = np.abs(position) % (2 * (side - 1))
    mirrored: NDArray[np.floating] = np.minimum(folded, 2 * (side - 1) - folded)
    return mirrored
