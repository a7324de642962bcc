"""Certificates of a device against those of the CPU, however the precision of products is set around them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from device_figures import TOLERANCE, Figure, Scale, say

import lipsim
from lipsim import certificates
from lipsim.analysis.level_set_certificates import answer_radius_of
from lipsim.certificates import Gallery
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.data.eight_bit import as_float
from lipsim.data.loading import fetch
from lipsim.data.triplet import collate_triplets
from lipsim.layers import freeze
from lipsim.metric import PerceptualMetric, TiledMetric
from lipsim.metric.smoothed import SmoothedMetric
from lipsim.students import (
    OrthogonalProjection,
    OrthogonalShiftNetwork,
    ScatteringNetwork,
    ScatteringTransform,
    SLLNetwork,
    TorchlipNetwork,
)
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import sample_normal

PART = "certificates"
PLAIN = "as torch has it"
BUNDLED = ("quickstart", "photos", "photos_wide", "scattering")
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "OrthogonalShiftNetwork": lambda: OrthogonalShiftNetwork(32, 64, grid=4, widths=(32, 64), depths=(1, 1)),
    "OrthogonalProjection": lambda: OrthogonalProjection(32, 64),
    "ScatteringTransform": lambda: ScatteringTransform(32),
    "ScatteringNetwork": lambda: ScatteringNetwork(32, 64, widths=(32, 64), depths=(1, 1), linear_width=64),
    "SLLNetwork": lambda: SLLNetwork(32, 64, channels=16, depth=2, linear_depth=1, linear_width=64),
    "TorchlipNetwork": lambda: TorchlipNetwork(32, 64, blocks=(4, 2), depths=(1, 1), widths=(32, 64)),
}
COUNTS = ("pixels", "smoothing counts")  # whole numbers, which a digit at the edge moves by one
AUTOCASTS = {"": None, "autocast float16": torch.float16, "autocast bfloat16": torch.bfloat16}


@contextlib.contextmanager
def _old_switches() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # torch's defaults


@contextlib.contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def _new_switches() -> Iterator[None]:
    torch.backends.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "TF32 by allow_tf32": _old_switches,
    "matmul precision high": lambda: _matmul_precision("high"),
    "matmul precision medium": lambda: _matmul_precision("medium"),
    "TF32 by fp32_precision": _new_switches,
}


def metrics() -> Iterator[tuple[str, PerceptualMetric]]:
    """The bundled metrics, a metric of tiles, and a random student of each family, on the CPU."""
    for name in BUNDLED:
        yield name, lipsim.load(name)
    yield "quickstart, tiles 2 × 2", TiledMetric(lipsim.load(BUNDLED[0]), 2)
    for name, make in STUDENTS.items():
        torch.manual_seed(0)
        metric = PerceptualMetric(make().eval().requires_grad_(False), 32)
        freeze(metric)
        yield f"{name}, random", metric


@torch.no_grad()
def certify(metric: PerceptualMetric, triplets: Triplet) -> dict[str, Tensor]:
    """Everything that is proved of some triplets, on the CPU in float64, by name."""
    images = tuple(part.to(metric.device) for part in triplets.images())
    reference, left, _ = images
    certificate = metric.certify(*images)
    found = {name.replace("_", " "): value for name, value in vars(certificate).items()}
    found["distance from"], found["distance to"] = metric.distance_bounds(reference, left, 0.25)
    with full_precision():
        z, z0, z1 = (metric.embed(part) for part in images)
    options = metric.certificate_options
    constants = {"lipschitz": options["lipschitz"], "feature_error": options["feature_error"]}
    if isinstance(metric, TiledMetric):
        found["threshold radius"] = metric.threshold_radius(reference, left, 0.05)
    else:
        found["threshold radius"] = certificates.threshold_radius(z, z0, 0.05, **options)
    ranking = certificates.rank(z, Gallery(torch.cat([z0, z1]), options["anchor"]), k=2, **constants)
    # Where two items are equally near, either may come first.
    found["rank"] = torch.where(ranking.rank_radius > TOLERANCE, ranking.items.double(), -1.0)
    found["rank radius"], found["set radius"] = ranking.rank_radius, ranking.set_radius
    smoothed = SmoothedMetric(metric, 0.25, samples=20, selection=5).certify(*(part[:1] for part in images))
    found["smoothing counts"] = smoothed.counts
    segments = certificates.certify_segments(answer_radius_of(metric, *images), reference, left, most=8)
    found["segment proved"], found["segment radius"] = segments.proved, segments.radius
    return {name: value.double().cpu() for name, value in found.items()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, as a share of the largest value of its kind, and what it is of."""
    worst, what = 0.0, "nothing"
    for name, value in found.items():
        other = expected[name]
        same = (value == other) | (value.isnan() & other.isnan())
        difference = torch.where(same, 0.0, (value - other).abs())
        if name in COUNTS:
            difference = torch.where(difference <= 1, 0.0, difference)
        finite = other[other.isfinite()]
        scale = max(float(finite.abs().max()) if finite.numel() else 1.0, 1.0)
        if (share := float(difference.max()) / scale) > worst or share != share:
            worst, what = share, name
    return worst, what


def images_for(metric: PerceptualMetric, count: int) -> Triplet:
    """Triplets of the size that a metric takes."""
    batch = fetch(BuiltinTriplets("test", count, image_size=metric.image_size), list(range(count)))
    return collate_triplets(batch)


def settings(device: torch.device) -> Iterator[str]:
    """Names of all ways to set the precision of products and autocast, each in force until the next is asked for."""
    for switch, lower in SETTINGS.items():
        for cast, dtype in AUTOCASTS.items():
            with lower(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                yield ", ".join(filter(None, (switch, cast))) or PLAIN


def certificate_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """A figure of every metric: the largest difference from the CPU's certificates over all settings."""
    for name, metric in metrics():
        triplets = images_for(metric, scale.triplets)
        if metric.declared_feature_error:  # that of a file is searched for on each device, and would be another
            _of_tile(metric).feature_error = _of_tile(metric).feature_error
        expected = certify(metric, triplets)
        double = metric.frozen_copy(torch.float64)
        _of_tile(double).lipschitz = _of_tile(metric).lipschitz  # not of weights that are derived more exactly
        exact = certify(double, triplets.to(torch.float64))
        away = metric.frozen_copy(device=device)
        worst, where, plain = 0.0, "", 0.0
        for setting in settings(device):
            difference, what = largest_difference(certify(away, triplets), expected)
            if setting == PLAIN:
                plain = largest_difference(certify(away, triplets), exact)[0]
            if difference >= worst or difference != difference:
                worst, where = difference, f"{what} under {setting}"
        note = f"{where}; from float64 on the CPU {plain:.1e}" if worst else f"from float64 on the CPU {plain:.1e}"
        ways = len(SETTINGS) * len(AUTOCASTS)
        yield Figure(PART, f"{name}, {ways} settings", f"{worst:.1e}", worst, "", passed=worst <= TOLERANCE, note=note)
        say(f"{name}: {worst:.1e}")


def _of_tile(metric: PerceptualMetric) -> PerceptualMetric:
    """The metric itself, or that of a tile, which what is declared of a metric of tiles has to be declared of."""
    return metric.tile if isinstance(metric, TiledMetric) else metric


def arithmetic_figures(device: torch.device) -> Iterator[Figure]:
    """What has to be the same numbers on every device to the last digit."""
    pixels = torch.arange(256, dtype=torch.uint8)
    same = torch.equal(as_float(pixels.to(device)).cpu(), pixels.float() / 255)
    yield Figure(PART, "8-bit images as floats", "equal" if same else "other", passed=same)
    noise = [sample_normal(torch.zeros(3, 5, device=place), seed=1).cpu() for place in (device, torch.device("cpu"))]
    yield Figure(PART, "noise of attacks", "equal" if torch.equal(*noise) else "other", passed=torch.equal(*noise))
    metric = lipsim.load(BUNDLED[0]).to(device)
    found = [metric.frozen_copy().feature_error for _ in settings(device)]
    equal = max(found) == min(found)
    yield Figure(PART, "error found of float32 features", f"{found[0]:.1e}", found[0], passed=equal and found[0] < 1e-3)
