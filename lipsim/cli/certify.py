"""`lipsim certify`: certify the answer to one triplet of image files."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from lipsim import certificates
from lipsim.data.bit_depth import DeepImage
from lipsim.data.transforms import load_image, read_image
from lipsim.metric import PerceptualMetric, load
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim certify` takes."""
    parser.description = (
        "Which of two images is more like a reference, and how far the answer cannot change: ℓ2 radii in "
        "the pixels that the metric sees and in those of each file, values in [0, 1]; the ℓ∞ radius of the reference; "
        "and how many of its pixels may take any colour."
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    for name in ("reference", "left", "right"):
        parser.add_argument(name, type=user_path, help="an image file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    metric = load(options.checkpoint)
    if not math.isfinite(metric.lipschitz):
        raise LipsimError(f"{options.checkpoint} has no Lipschitz bound, nothing about it can be certified")
    files = {name: getattr(options, name) for name in ("reference", "left", "right")}
    pictures = {name: read_image(file) for name, file in files.items()}
    dtype = next(metric.parameters()).dtype
    images = {name: load_image(file, metric.preprocess).to(dtype).unsqueeze(0) for name, file in files.items()}
    found = metric.certify(images["reference"], images["left"], images["right"])
    margin = float(found.margin)
    radii = {
        "reference": float(found.radius),
        "left": float(found.left_radius),
        "right": float(found.right_radius),
        "joint": float(found.joint_radius),
    }
    elements = images["reference"].numel()
    facts = {
        "answer": "tie" if margin == 0 else "left" if margin > 0 else "right",
        "margin": margin,
        "radius": radii,
        "original_radius": _original_radii(metric, pictures, radii),
        "linf_radius": float(certificates.linf_radius(found.radius, elements)),
        "pixels": int(found.pixels),
        "image_size": metric.image_size,
        "lipschitz": metric.lipschitz,
        "feature_error": metric.feature_error,
    }
    print(json.dumps(facts, indent=1) if options.json else _certificate(facts))
    return 0


def _original_radii(
    metric: PerceptualMetric, pictures: Mapping[str, Image.Image | DeepImage], radii: dict[str, float]
) -> dict[str, float] | None:
    """Radii in the pixels of the files; None where the way from there has no norm, as resizing in 8 bits rounds.

    A gray pixel becomes three equal channels, which is a factor of √3; palettes, transparency and other colour spaces
    are no map of a norm at all.
    """
    gray = {"1": 3**0.5, "L": 3**0.5, "I": 3**0.5, "I;16": 3**0.5}
    plain = all(p.mode in ("RGB", *gray) and not p.has_transparency_data for p in pictures.values())
    if metric.preprocess.resize != "float" or not plain:
        return None

    def original(radius: float, picture: Image.Image | DeepImage) -> float:
        # Its height and width in whichever order: the norm is symmetric in them.
        found = certificates.original_radius(radius, (picture.height, picture.width), metric.image_size)
        return found / (gray.get(picture.mode, 1.0) * (1 + 1e-12))

    return {
        name: original(radius, pictures[name])
        if name in pictures
        else min(original(radius, picture) for picture in pictures.values())
        for name, radius in radii.items()
    }


def _certificate(facts: dict[str, Any]) -> str:
    original = facts["original_radius"]
    size = facts["image_size"]
    none = "(none in the file's own pixels: resized in 8 bits, or not plain RGB or gray)"
    title = none if original is None else "R in the file's own pixels"
    rows = [
        f"answer: {facts['answer']} (margin {facts['margin']:.6g}, positive for left)",
        f"{'perturbed image':<18}{f'R at {size}×{size}':<16}{title}",
    ]
    for name, radius in facts["radius"].items():
        title = "all three, each" if name == "joint" else name
        rows.append(f"{title:<18}{radius:<16.6g}" + ("" if original is None else f"{original[name]:.6g}"))
    rows.append(f"ℓ∞ radius of the reference {facts['linf_radius']:.6g} = {255 * facts['linf_radius']:.4g}/255")
    rows.append(f"pixels of the reference that may take any colour: {facts['pixels']} of {size * size}")
    return "\n".join(rows)
