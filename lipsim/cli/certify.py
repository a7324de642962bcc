"""`lipsim certify`: certify the answer to one triplet of image files."""

from __future__ import annotations

import argparse
import json

from lipsim.metric import load
from lipsim.metric.image_files import certify_files
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim certify` takes."""
    parser.description = (
        "Which of two images is more like a reference, and how far the answer cannot change: ℓ2 radii in "
        "the pixels that the metric sees and in those of each file, values in [0, 1]; the ℓ∞ radius of the reference; "
        "and how many of its pixels may take any colour. The bundled metric takes a fifth of a second "
        "besides loading torch; LipSim's small network half a minute for its audit, and longer to search for rounding "
        "errors."
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of a bundled metric")
    for name in ("reference", "left", "right"):
        parser.add_argument(name, type=user_path, help="an image file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Progress("certifying") as progress:
        progress("loading and auditing the metric")
        metric = load(options.checkpoint)
        progress("images and rounding errors")
        certificate = certify_files(metric, options.reference, options.left, options.right)
    print(json.dumps(certificate.facts(), indent=1) if options.json else certificate)
    return 0
