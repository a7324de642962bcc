"""Certificates of image files, exact and smoothed: radii in the pixels of a metric and in those of each file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from lipsim import certificates
from lipsim.data.bit_depth import DeepImage
from lipsim.data.transforms import load_image, read_image, upright_size
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.saturating_sum import SaturatingSum
from lipsim.metric.smoothed import IMAGES, Moving, SmoothedMetric
from lipsim.metric.tiles import TiledMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.terminal import text_table

Picture = Image.Image | DeepImage
Certified = PerceptualMetric | SaturatingSum
# Modes of gray pixels, each of which becomes three equal channels: lengths grow by √3.
_GRAY = ("1", "L", "I", "I;16")


@dataclass(frozen=True)
class FileCertificate:
    """The answer to one triplet of image files, and how far it cannot change. Radii are for values in [0, 1].

    Attributes:
        answer: the image that is more like the reference; "tie": neither, and every radius is 0.
        margin: ``h = d(x, x1) − d(x, x0)``, positive where left is nearer.
        radius: ℓ2, in the pixels that the metric sees: of "reference", "left" or "right", where only that one changes,
            and "joint", where all three do, each by less.
        original_radius: the same in the pixels of each file, see :func:`original_radii`; None where there are none.
        linf_radius: ℓ∞, of the reference that the metric sees.
        pixels: how many pixels of that reference may take any colour.
        image_size: side of what the metric sees.
        lipschitz: the bound that the radii divide by; of a sum of two metrics the larger one.
        feature_error: the error of an embedding that the radii cover; of a sum likewise.
        framing: how the images came to the metric, see :class:`lipsim.data.Preprocess`.
    """

    answer: Literal["left", "right", "tie"]
    margin: float
    radius: dict[str, float]
    original_radius: dict[str, float] | None
    linf_radius: float
    pixels: int
    image_size: int
    lipschitz: float
    feature_error: float
    framing: str

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        size, original = self.image_size, self.original_radius
        headings = ["perturbed image", f"R at {size}×{size}", *([] if original is None else ["R in the file's pixels"])]
        rows = [
            ["all three, each" if name == "joint" else name, f"{radius:.6g}"]
            + ([] if original is None else [f"{original[name]:.6g}"])
            for name, radius in self.radius.items()
        ]
        lines = [
            f"answer: {self.answer} (margin {self.margin:.6g}, positive for left; framing {self.framing})",
            text_table(headings, rows),
            f"ℓ∞ radius of the reference {self.linf_radius:.6g} = {255 * self.linf_radius:.4g}/255",
            f"pixels of the reference that may take any colour: {self.pixels} of {size * size}",
        ]
        if original is None:
            lines.append("none in the file's own pixels: resized in 8 bits, or not plain RGB or gray")
        return "\n".join(lines)


def certify_files(metric: Certified, reference: str | Path, left: str | Path, right: str | Path) -> FileCertificate:
    """Answer one triplet of image files and certify the answer, in the metric's pixels and in those of the files.

    Args:
        metric: a metric with a bound, or a sum of two.
        reference: an image file of any size.
        left: another.
        right: another.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read in full, or the metric has no bound or weights in half precision.
    """
    if not metric.has_bound:
        raise LipsimError(
            "the metric has no Lipschitz bound, nothing about it can be certified but by smoothing (--smooth)"
        )
    pictures, images = _read(metric, reference, left, right)
    # Of one tile, where there are tiles: what the radii divide by and cover.
    part = metric.tile if isinstance(metric, TiledMetric) else metric
    options = part.certificate_options
    certificate = metric.certify(images["reference"], images["left"], images["right"])
    margin = float(certificate.margin)
    radii = {
        "reference": float(certificate.radius),
        "left": float(certificate.left_radius),
        "right": float(certificate.right_radius),
        "joint": float(certificate.joint_radius),
    }
    return FileCertificate(
        answer=nearer(margin),
        margin=0.0 if math.isnan(margin) else margin,
        radius=radii,
        original_radius=original_radii(metric, pictures, radii),
        linf_radius=float(certificates.linf_radius(certificate.radius, images["reference"].numel())),
        pixels=int(certificate.pixels),
        image_size=metric.image_size,
        lipschitz=options["lipschitz"],
        feature_error=options["feature_error"] / 2,  # which counts it twice
        framing=metric.preprocess.framing,
    )


def nearer(margin: float) -> Literal["left", "right", "tie"]:
    """The answer of a margin; NaN, of a reference without a direction, is at distance 1 from both candidates."""
    return "left" if margin > 0 else "right" if margin < 0 else "tie"


@dataclass(frozen=True)
class SmoothedFileCertificate:
    """The answer that a metric gives most often under noise to one triplet of image files, and how far it stays.

    Attributes:
        answer: the image that is more like the reference; "abstains": the draws do not tell, and the radius is 0.
        radius: ℓ2, for values in [0, 1], in the pixels that the metric sees: "reference", "left" or "right", where only
            that one changes; with noise on all images each of these, which are equal, and "joint", where all three
            change, each by less.
        original_radius: the same in the pixels of each file, see :func:`original_radii`; None where there are none.
        p_lower: the answer has at least this probability under noise, with probability ``1 − α``.
        counts: how many draws of ``n`` said "left", "right", and "neither".
        sigma: standard deviation of the noise.
        n: draws that certify the answer.
        n0: other draws, which chose it.
        alpha: probability that the certificate is wrong.
        seed: of the noise.
        passes: images embedded.
        image_size: side of what the metric sees.
    """

    answer: Literal["left", "right", "abstains"]
    radius: dict[str, float]
    original_radius: dict[str, float] | None
    p_lower: float
    counts: dict[str, int]
    sigma: float
    n: int
    n0: int
    alpha: float
    seed: int
    passes: int
    image_size: int

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        size, original = self.image_size, self.original_radius
        said = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        lines = [f"answer of the smoothed metric: {self.answer} ({said} of {self.n} draws, σ = {self.sigma:g})"]
        for name, radius in self.radius.items():
            what = "all three, each" if name == "joint" else name
            line = f"{what}: R = {radius:.6g} at {size}×{size}"
            lines.append(line if original is None else f"{line}, {original[name]:.6g} in the file's pixels")
        lines.append(f"holds with probability {1 - self.alpha:.12g}; p ≥ {self.p_lower:.6g}, {self.passes} passes")
        if original is None:
            lines.append("none in the file's own pixels: resized in 8 bits, or not plain RGB or gray")
        return "\n".join(lines)


def smooth_files(
    metric: PerceptualMetric,
    reference: str | Path,
    left: str | Path,
    right: str | Path,
    *,
    sigma: float,
    samples: int = 1000,
    selection: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
    moving: Moving = "reference",
    advance: Callable[[int], None] | None = None,
) -> SmoothedFileCertificate:
    """Answer one triplet of image files by :class:`SmoothedMetric`; the metric needs no bound.

    Args:
        metric: any metric.
        reference: an image file of any size.
        left: another.
        right: another.
        sigma: as in :class:`SmoothedMetric`, and all that follow.
        samples: draws that certify.
        selection: draws that choose the answer.
        alpha: probability that the certificate is wrong.
        seed: of the noise.
        moving: the image that may change, or "all".
        advance: called with how many more noisy images have been embedded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read in full, an argument is out of range, or weights in half precision.
    """
    smoothed = SmoothedMetric(metric, sigma, samples, selection, alpha, seed, moving)
    pictures, images = _read(metric, reference, left, right)
    found = smoothed.certify(*(images[name] for name in IMAGES), advance=advance)
    radii = dict.fromkeys(IMAGES if moving == "all" else (moving,), float(found.single_radius))
    if moving == "all":
        radii["joint"] = float(found.radius)
    return SmoothedFileCertificate(
        answer="abstains" if bool(found.abstained) else "left" if bool(found.prefers_left) else "right",
        radius=radii,
        original_radius=original_radii(metric, pictures, radii),
        p_lower=float(found.p_lower),
        counts=dict(zip(("left", "right", "neither"), found.counts[0].tolist(), strict=True)),
        sigma=smoothed.sigma,
        n=smoothed.samples,
        n0=smoothed.selection,
        alpha=smoothed.alpha,
        seed=smoothed.seed,
        passes=smoothed.passes,
        image_size=metric.image_size,
    )


def _read(
    metric: Certified, reference: str | Path, left: str | Path, right: str | Path
) -> tuple[dict[str, Picture], dict[str, Tensor]]:
    """The three files as they were decoded, and as the metric sees them, ``(1, 3, H, W)``."""
    files = dict(zip(IMAGES, map(user_path, (reference, left, right)), strict=True))
    contents = {name: _content(file) for name, file in files.items()}
    pictures = {name: read_image(file, contents[name]) for name, file in files.items()}
    images = {
        name: load_image(file, metric.preprocess, contents[name]).to(metric.device, metric.dtype).unsqueeze(0)
        for name, file in files.items()
    }
    return pictures, images


def original_radii(
    metric: Certified, pictures: Mapping[str, Picture], radii: Mapping[str, float]
) -> dict[str, float] | None:
    """Radii in the pixels of files, from those in the pixels that a metric sees.

    A gray pixel becomes three equal channels, which is a factor of √3. There is no norm of the way from the file where
    it is resized in 8 bits, which rounds, nor for palettes, transparency and other colour spaces.

    Args:
        metric: whose ``preprocess`` resizes the pictures.
        pictures: name → image as it was decoded (:func:`lipsim.data.transforms.read_image`).
        radii: name → radius at ``metric.image_size``. What is not named in ``pictures``, such as "joint", is about all
            of them: the smallest.

    Returns:
        The names of ``radii`` → ℓ2 radius for values in [0, 1]; None where one of the pictures has none.
    """
    plain = all(p.mode in ("RGB", *_GRAY) and not p.has_transparency_data for p in pictures.values())
    if metric.preprocess.resize != "float" or not plain:
        return None

    def original(radius: float, picture: Picture) -> float:
        own = metric.preprocess.original_radius(radius, *upright_size(picture))
        return own / ((3**0.5 if picture.mode in _GRAY else 1.0) * (1 + 1e-12))

    return {
        name: original(radius, pictures[name])
        if name in pictures
        else min(original(radius, picture) for picture in pictures.values())
        for name, radius in radii.items()
    }


def _content(file: Path) -> bytes | None:
    """The bytes of a file, read once, a pipe too; None where there are none, which its reader explains."""
    return file.read_bytes() if file.exists() and not file.is_dir() else None
