"""`lipsim certify`: certify the answer to a triplet of image files, or to a table of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lipsim.cli.parser import add_metric_argument, add_output, budget, load_metric, natural_int, positive_int
from lipsim.data.sets.matching import read_paths
from lipsim.metric.comparisons import certify_many
from lipsim.metric.files import load
from lipsim.metric.image_files import Certified, FileCertificate, SmoothedFileCertificate, certify_files, smooth_files
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.saturating_sum import SaturatingSum
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress
from lipsim.utils.terminal import print_csv, text_table

EXAMPLES = (
    "lipsim certify reference.png left.png right.png",
    "lipsim certify reference.png left.png right.png --metric quickstart --json",
    "lipsim certify triplets.csv --csv",
    "lipsim certify reference.png left.png right.png --near scattering",
    "lipsim certify reference.png left.png right.png --metric teacher.safetensors --smooth 0.25",
)
IMAGES = ("reference", "left", "right")
# Of --smooth, where they are not given; None until then, so that an option without it is no silent one.
SMOOTHING: dict[str, Any] = {"samples": 1000, "selection": 100, "alpha": 0.001, "seed": 0, "moving": "reference"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim certify` takes."""
    parser.description = (
        "Which of two images is more like a reference, and how far the answer cannot change: ℓ2 radii in "
        "the pixels that the metric sees and in those of each file, values in [0, 1]; the ℓ∞ radius of the reference; "
        "and how many of its pixels may take any colour. One file is a CSV table of triplets, with the columns "
        "reference, left and right, paths relative to its folder; rows with an image that cannot be read are listed on "
        "stderr and left out, with exit status 1. The bundled metric takes a fifth of a second "
        "besides loading torch; LipSim's small network half a minute for its audit, and longer to search for rounding "
        "errors. --near adds a second metric, which decides between images that are near and saturates where they are "
        "far. --smooth certifies by randomized smoothing instead, also metrics without a bound: the answer under "
        "noise, and only with probability 1 − alpha; a thousand passes of the network, a second to a minute."
    )
    parser.add_argument(
        "images", nargs="+", type=user_path, metavar="IMAGE", help="reference, left and right; or a CSV file"
    )
    add_metric_argument(parser, option=True)
    near = parser.add_argument_group("a second metric, of what is near", "d + WEIGHT·(1 − exp(−d_near/SCALE))")
    near.add_argument("--near", metavar="METRIC", help="a .safetensors file, or the name of a bundled metric")
    near.add_argument("--weight", type=float, help="what it adds at most (8)")
    near.add_argument("--scale", type=float, help="its distance where it has added 63 %% of that (0.03)")
    smoothing = parser.add_argument_group("randomized smoothing")
    smoothing.add_argument(
        "--smooth", type=budget, metavar="SIGMA", help="standard deviation of the noise, for example 0.25"
    )
    default = SMOOTHING
    smoothing.add_argument("--samples", type=positive_int, help=f"draws that certify ({default['samples']})")
    smoothing.add_argument("--selection", type=positive_int, help=f"draws that choose ({default['selection']})")
    smoothing.add_argument("--alpha", type=budget, help=f"probability of an error ({default['alpha']})")
    smoothing.add_argument("--seed", type=natural_int, help=f"of the noise ({default['seed']})")
    smoothing.add_argument(
        "--moving",
        choices=("reference", "left", "right", "all"),
        help=f"the image that has noise and may change ({default['moving']}); of all, there is also a radius of one",
    )
    add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given = [name for name in SMOOTHING if getattr(options, name) is not None]
    if given and options.smooth is None:
        raise LipsimError(f"--{given[0]} is of randomized smoothing; give the noise with --smooth SIGMA")
    for name in SMOOTHING.keys() - set(given):
        setattr(options, name, SMOOTHING[name])
    if len(options.images) == 1:
        return _run_table(options)
    if len(options.images) != 3:
        raise LipsimError(
            f"expected three images, reference, left and right, or a CSV file of triplets, got {len(options.images)} "
            "(the metric is --metric FILE)"
        )
    with Progress("certifying") as progress:
        progress("loading and auditing the metric")
        certificate = _certificate(_metric(options), options, progress)
    if options.json:
        print(json.dumps(certificate.facts(), indent=1))
    elif options.csv:
        if not isinstance(certificate, FileCertificate):
            raise LipsimError("smoothed certificates are printed as text or with --json")
        row = _row(options.images, certificate)
        print_csv(list(row), [list(row.values())])
    else:
        print(certificate)
    return 0


def _metric(options: argparse.Namespace) -> Certified:
    numbers = {name: getattr(options, name) for name in ("weight", "scale") if getattr(options, name) is not None}
    if options.near is None:
        if numbers:
            raise LipsimError(f"--{next(iter(numbers))} is of a second metric; name it with --near METRIC")
        return load_metric(options)
    if options.smooth is not None:
        raise LipsimError("--near and --smooth are two ways to certify; leave one out")
    metric = load_metric(options)
    return SaturatingSum(metric, load(options.near, framing=metric.preprocess.framing), **numbers)


def _certificate(
    metric: Certified, options: argparse.Namespace, progress: Progress
) -> FileCertificate | SmoothedFileCertificate:
    reference, left, right = options.images
    if options.smooth is None:
        progress("images and rounding errors")
        return certify_files(metric, reference, left, right)
    assert isinstance(metric, PerceptualMetric)
    images = 3 if options.moving == "all" else 1
    return smooth_files(
        metric,
        reference,
        left,
        right,
        sigma=options.smooth,
        samples=options.samples,
        selection=options.selection,
        alpha=options.alpha,
        seed=options.seed,
        moving=options.moving,
        advance=progress.counter(images * (options.samples + options.selection), "noisy images"),
    )


def _run_table(options: argparse.Namespace) -> int:
    (file,) = options.images
    if options.smooth is not None:
        raise LipsimError("--smooth certifies three images, not a table")
    if file.suffix.lower() != ".csv":
        raise LipsimError(f"expected three images or a CSV file of triplets, got {file} alone")
    triplets = read_paths(file, IMAGES)
    with Progress("certifying") as progress:
        progress("loading and auditing the metric")
        found = certify_many(_metric(options), triplets, progress.counter(len(triplets), "triplets"))
    for place, why in found.broken.items():
        print(f"left out, triplet {place + 1}: {why}", file=sys.stderr)
    if not found.certificates:
        raise LipsimError(f"none of the {len(triplets)} triplets of {file} could be certified")
    rows = [_row(triplets[place], one) for place, one in zip(found.places, found.certificates, strict=True)]
    if options.json:
        content = {
            "metric": str(options.metric),
            "triplets": [
                {**dict(zip(IMAGES, map(str, triplets[place]), strict=True)), **one.facts()}
                for place, one in zip(found.places, found.certificates, strict=True)
            ],
            "left_out": {str(place + 1): why for place, why in found.broken.items()},
        }
        print(json.dumps(content, indent=1))
    elif options.csv:
        print_csv(list(rows[0]), [list(row.values()) for row in rows])
    else:
        shown = ("reference", "answer", "margin", "radius", "left_radius", "right_radius", "joint_radius")
        cells = [[_cell(row[name]) for name in shown] for row in rows]
        print(text_table([name.replace("_", " ") for name in shown], cells))
    return int(bool(found.broken))


def _row(images: tuple[Path, ...] | list[Path], found: FileCertificate) -> dict[str, Any]:
    """One row of a table; the cells of radii in a file's own pixels are empty where there are none."""
    names = {"radius": "reference", "left_radius": "left", "right_radius": "right", "joint_radius": "joint"}
    own = found.original_radius or {}
    return {
        **dict(zip(IMAGES, map(str, images), strict=True)),
        "answer": found.answer,
        "margin": found.margin,
        **{column: found.radius[name] for column, name in names.items()},
        **{f"original_{column}": own.get(name, "") for column, name in names.items()},
        "linf_radius": found.linf_radius,
        "pixels": found.pixels,
    }


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
