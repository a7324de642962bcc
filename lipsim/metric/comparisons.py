"""Image files compared: distances with their certified intervals, one image against many, the same or different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.transforms import load_image, load_images, read_image
from lipsim.metric.image_files import Certified, FileCertificate, certify_files, original_radii
from lipsim.metric.pairs import PairGeometry, pair_geometry
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path


@dataclass(frozen=True)
class FileDistance:
    """The distance between two image files.

    Attributes:
        left: the file.
        right: the other.
        distance: in [0, 2].
        interval: what the distance is within, for every change of the left image up to ε; None without an ε.
    """

    left: Path
    right: Path
    distance: float
    interval: tuple[float, float] | None = None

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        ends = {} if self.interval is None else dict(zip(("lower", "upper"), self.interval, strict=True))
        return {"left": str(self.left), "right": str(self.right), "distance": self.distance, **ends}


@dataclass(frozen=True)
class Comparison:
    """Distances of pairs of image files.

    Attributes:
        distances: of the pairs whose files could both be read, in their order.
        places: where each of them was among the pairs.
        broken: file that cannot be read → why.
    """

    distances: tuple[FileDistance, ...]
    places: tuple[int, ...]
    broken: dict[Path, str]

    @property
    def mean(self) -> float:
        """The mean distance; NaN of none."""
        return sum(one.distance for one in self.distances) / len(self.distances) if self.distances else float("nan")


def compare_files(
    metric: PerceptualMetric,
    pairs: Sequence[tuple[str | Path, str | Path]],
    *,
    eps: float | None = None,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Distances of pairs of image files, in full precision; geometry runs in float64.

    Images are read a batch at a time, each as often as pairs that are far apart need it: an image that occurs again
    leaves its features, nothing leaves its pixels.

    Args:
        metric: any metric; with a bound where there is an ``eps``.
        pairs: files, left and right.
        eps: ℓ2 budget of the left image in the pixels that the metric sees, values in [0, 1]; None: no intervals.
        batch_size: pairs at a time.
        advance: called with how many more pairs are done.

    Raises:
        ValueError: a negative budget, or one for a metric without a bound or with weights in half precision.
    """
    check_count("batch_size", batch_size)
    compare = pair_geometry(metric)
    if eps is not None:
        eps = check_number("eps", eps)
        if not metric.has_bound:
            raise LipsimError("the metric has no Lipschitz bound, its distances have no certified interval: no eps")
        metric.check_precision()
    files = [(user_path(left), user_path(right)) for left, right in pairs]
    left_over = Counter(file for pair in files for file in pair)
    known: dict[Path, Tensor] = {}
    broken: dict[Path, str] = {}
    found: dict[int, FileDistance] = {}
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        _embed(compare, [file for pair in chunk for file in pair], known, broken)
        whole = [i for i, pair in enumerate(chunk) if not broken.keys() & set(pair)]
        if whole:
            z, y = (torch.stack([known[chunk[i][side]] for i in whole]) for side in (0, 1))
            distances = compare.distance(z, y).tolist()
            intervals: list[tuple[float, float] | None] = [None] * len(whole)
            if eps is not None:
                lower, upper = compare.interval(z, y, eps)
                intervals = list(zip(lower.tolist(), upper.tolist(), strict=True))
            for i, distance, interval in zip(whole, distances, intervals, strict=True):
                found[start + i] = FileDistance(*chunk[i], distance, interval)
        left_over.subtract(file for pair in chunk for file in pair)
        known = {file: features for file, features in known.items() if left_over[file] > 0}
        if advance is not None:
            advance(len(chunk))
    return Comparison(tuple(found.values()), tuple(found), broken)


def rank_files(
    metric: PerceptualMetric,
    reference: str | Path,
    files: Sequence[str | Path],
    *,
    eps: float | None = None,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Image files by their distance from a reference, the nearest first, equal ones by name.

    ``eps`` is the budget of the reference; arguments as of :func:`compare_files`.

    Raises:
        ValueError: the reference cannot be read; a bad budget.
    """
    compared = compare_files(
        metric, [(reference, file) for file in files], eps=eps, batch_size=batch_size, advance=advance
    )
    if (why := compared.broken.get(user_path(reference))) is not None:
        raise LipsimError(why)
    order = sorted(
        range(len(compared.distances)), key=lambda i: (compared.distances[i].distance, compared.distances[i].right)
    )
    return Comparison(
        tuple(compared.distances[i] for i in order), tuple(compared.places[i] for i in order), compared.broken
    )


@dataclass(frozen=True)
class TripletAnswers:
    """Certificates of triplets of image files.

    Attributes:
        certificates: of the triplets whose files could be read, in their order.
        places: where each of them was among the triplets.
        broken: place of a triplet that could not be → why.
    """

    certificates: tuple[FileCertificate, ...]
    places: tuple[int, ...]
    broken: dict[int, str]


def certify_many(
    metric: Certified,
    triplets: Sequence[tuple[str | Path, ...]],
    advance: Callable[[int], None] | None = None,
) -> TripletAnswers:
    """Certify triplets of image files one after the other, as :func:`lipsim.metric.certify_files` does.

    Args:
        metric: a metric with a bound, or a sum of two.
        triplets: files, reference, left and right.
        advance: called with how many more are done.

    Raises:
        ValueError: the metric has no bound, or weights in half precision.
    """
    if not metric.has_bound:
        raise LipsimError("the metric has no Lipschitz bound, nothing about it can be certified")
    metric.check_precision()
    found: dict[int, FileCertificate] = {}
    broken: dict[int, str] = {}
    for place, (reference, left, right) in enumerate(triplets):
        try:
            found[place] = certify_files(metric, reference, left, right)
        except (LipsimError, OSError) as error:
            broken[place] = str(error)
        if advance is not None:
            advance(1)
    return TripletAnswers(tuple(found.values()), tuple(found), broken)


@dataclass(frozen=True)
class SameCertificate:
    """Whether two image files are the same to a metric, and how far either may change before that can change.

    Attributes:
        same: ``distance ≤ threshold``.
        distance: in [0, 2].
        threshold: the largest distance that counts as the same.
        radius: ℓ2, values in [0, 1], in the pixels that the metric sees: of "left" or "right", where only that image
            changes; None where the metric has no bound.
        original_radius: the same in the pixels of each file, see :func:`lipsim.metric.original_radii`; None where there
            are none.
        image_size: side of what the metric sees.
    """

    same: bool
    distance: float
    threshold: float
    radius: dict[str, float] | None
    original_radius: dict[str, float] | None
    image_size: int

    @property
    def answer(self) -> Literal["same", "different"]:
        """The answer as a word."""
        return "same" if self.same else "different"

    def facts(self) -> dict[str, Any]:
        """Every field, and the answer, for JSON."""
        return {"answer": self.answer, **asdict(self)}

    def __str__(self) -> str:
        sign = "≤" if self.same else ">"
        lines = [f"{self.answer} (distance {self.distance:.6g} {sign} threshold {self.threshold:.6g})"]
        for name, radius in (self.radius or {}).items():
            line = f"certified while the {name} image changes by less than {radius:.6g} at {self.image_size}×"
            line += f"{self.image_size}"
            if self.original_radius is not None:
                line += f", {self.original_radius[name]:.6g} in the file's pixels"
            lines.append(line)
        if self.radius is None:
            lines.append("not certified: the metric has no Lipschitz bound")
        elif self.original_radius is None:
            lines.append("none in the file's own pixels: resized in 8 bits, or not plain RGB or gray")
        return "\n".join(lines)


def same_files(
    metric: PerceptualMetric, left: str | Path, right: str | Path, threshold: float | None = None
) -> SameCertificate:
    """Tell whether two image files are the same, and certify the answer where the metric has a bound.

    Args:
        metric: any metric.
        left: an image file of any size.
        right: another.
        threshold: the largest distance that counts as the same; None: that of the metric's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read, the metric has no threshold, or weights in half precision.
    """
    value = threshold_of(metric, threshold)
    files = {"left": user_path(left), "right": user_path(right)}
    compare = pair_geometry(metric)
    z, y = compare.embed(load_images(files.values(), metric.preprocess)).unsqueeze(1)
    (same,), (radius,), (other_radius,) = compare.decide(z, y, value)
    radii = {"left": float(radius), "right": float(other_radius)} if metric.has_bound else None
    pictures = {name: read_image(file) for name, file in files.items()}
    return SameCertificate(
        same=bool(same),
        distance=float(compare.distance(z, y)),
        threshold=value,
        radius=radii,
        original_radius=None if radii is None else original_radii(metric, pictures, radii),
        image_size=metric.image_size,
    )


def threshold_of(metric: PerceptualMetric, threshold: float | None = None) -> float:
    """A threshold that is given, or else that of a metric.

    Raises:
        ValueError: there is none, or it is outside [0, 2].
    """
    if threshold is not None:
        return check_number("threshold in [0, 2], the range of the distance,", threshold, 0, 2)
    if metric.threshold is None:
        raise LipsimError(
            "the metric has no threshold; `lipsim calibrate PAIRS --output FILE.safetensors` finds one on labelled "
            "pairs, --threshold names one"
        )
    return metric.threshold.value


def _embed(compare: PairGeometry, files: Sequence[Path], known: dict[Path, Tensor], broken: dict[Path, str]) -> None:
    """Add the features of files that are in neither; what cannot be read goes to ``broken``."""
    images: dict[Path, Tensor] = {}
    for file in dict.fromkeys(files):
        if file in known or file in broken:
            continue
        try:
            images[file] = load_image(file, compare.metric.preprocess)
        except (LipsimError, OSError) as error:
            broken[file] = str(error)
    if images:
        known.update(zip(images, compare.embed(torch.stack(list(images.values()))), strict=True))
