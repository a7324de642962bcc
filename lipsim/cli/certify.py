"""`lipsim certify`: certify the answer to one triplet of image files."""

from __future__ import annotations

import argparse
import json

from lipsim.cli.parser import add_metric_argument, load_metric, natural_int, positive_int
from lipsim.metric.image_files import FileCertificate, SmoothedFileCertificate, certify_files, smooth_files
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim certify` takes."""
    parser.description = (
        "Which of two images is more like a reference, and how far the answer cannot change: ℓ2 radii in "
        "the pixels that the metric sees and in those of each file, values in [0, 1]; the ℓ∞ radius of the reference; "
        "and how many of its pixels may take any colour. The bundled metric takes a fifth of a second "
        "besides loading torch; LipSim's small network half a minute for its audit, and longer to search for rounding "
        "errors. --smooth certifies by randomized smoothing instead, also metrics without a bound: the answer under "
        "noise, and only with probability 1 − alpha; a thousand passes of the network, a second to a minute."
    )
    add_metric_argument(parser)
    for name in ("reference", "left", "right"):
        parser.add_argument(name, type=user_path, help="an image file")
    smoothing = parser.add_argument_group("randomized smoothing")
    smoothing.add_argument(
        "--smooth", type=float, metavar="SIGMA", help="standard deviation of the noise, for example 0.25"
    )
    smoothing.add_argument("--samples", type=positive_int, default=1000, help="draws that certify (%(default)s)")
    smoothing.add_argument("--selection", type=positive_int, default=100, help="draws that choose (%(default)s)")
    smoothing.add_argument("--alpha", type=float, default=0.001, help="probability of an error (%(default)s)")
    smoothing.add_argument("--seed", type=natural_int, default=0, help="of the noise (%(default)s)")
    smoothing.add_argument(
        "--moving",
        default="reference",
        choices=("reference", "left", "right", "all"),
        help="the image that may change (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    files = options.reference, options.left, options.right
    certificate: FileCertificate | SmoothedFileCertificate
    with Progress("certifying") as progress:
        progress("loading and auditing the metric")
        metric = load_metric(options)
        if options.smooth is None:
            progress("images and rounding errors")
            certificate = certify_files(metric, *files)
        else:
            images = 3 if options.moving == "all" else 1
            certificate = smooth_files(
                metric,
                *files,
                sigma=options.smooth,
                samples=options.samples,
                selection=options.selection,
                alpha=options.alpha,
                seed=options.seed,
                moving=options.moving,
                advance=progress.counter(images * (options.samples + options.selection), "noisy images"),
            )
    print(json.dumps(certificate.facts(), indent=1) if options.json else certificate)
    return 0
