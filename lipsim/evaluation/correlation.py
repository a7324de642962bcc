"""How well distances agree with opinion scores: SRCC, KRCC, PLCC, and what of it is certain when images change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lipsim import certificates
from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.sets.pairs import PairTable
from lipsim.data.transforms import Preprocess
from lipsim.metric import PerceptualMetric
from lipsim.metric.distance import Distance, has_features
from lipsim.metric.distances import pixel_l2
from lipsim.metric.pairs import PairGeometry
from lipsim.results import eps_label
from lipsim.results.tables import Row, number
from lipsim.utils.errors import LipsimError

Moves = Literal["distorted", "reference", "both"]
INTERVALS = {
    "srcc": certificates.spearman_interval,
    "krcc": certificates.kendall_interval,
    "plcc": certificates.pearson_interval,
}
# Parameters of the logistic function, which as many pairs would be fitted by exactly.
_PARAMETERS = 4
_SLACK = 1e-12  # of a pixel distance in float64, relative


@dataclass(frozen=True)
class Correlations:
    """Agreement of distances with opinion scores, 1 where they order the pairs as people do.

    Attributes:
        srcc: Spearman's rank correlation; like the others None where all distances are equal.
        krcc: Kendall's τ_b.
        plcc: Pearson's correlation of distances and scores.
        plcc_logistic: the same after the usual fit, see :func:`fit_logistic`, negative where that falls with the
            distance; None where there is none.
        certified: budget → "srcc", "krcc" and "plcc" → the interval that holds the coefficient for all changes within
            the budget; empty for distances without a certificate.
    """

    srcc: float | None
    krcc: float | None
    plcc: float | None
    plcc_logistic: float | None
    certified: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)


def correlate(
    metrics: Mapping[str, Distance],
    table: PairTable,
    *,
    eps: Sequence[float] = (),
    moves: Moves = "distorted",
    batch_size: int = 32,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Correlations]:
    """Correlate distances with the opinion scores of a table, naturally and for every change of the images up to ε.

    Each distance lies in its certified interval (:func:`lipsim.certificates.distance_interval`), on its own; between
    which values a coefficient lies then is :mod:`lipsim.certificates.rank_correlation`. The pixel distance is certified
    too, as it changes by no more than the image.

    Args:
        metrics: name → metric or other distance. Every metric sees the images as it expects them, other distances see
            them as the first metric does.
        table: the pairs.
        eps: ℓ2 budgets, in the pixels that the metric sees, values in [0, 1].
        moves: which image of each pair may change by ε: the distorted one, the reference, or both, each by ε.
        batch_size: images embedded at a time.
        progress: told what runs next.

    Returns:
        Name → correlations.

    Raises:
        ValueError: no metric, an unreadable image, bad budgets, fewer than two pairs, or equal scores.
    """
    first = next((metric for metric in metrics.values() if has_features(metric)), None)
    if first is None:
        raise LipsimError("expected at least one metric, which says how images are resized")
    if moves not in get_args(Moves):
        raise LipsimError(f"expected moves to be one of {', '.join(get_args(Moves))}, got {moves!r}")
    check_count("batch_size", batch_size)
    budgets = [check_number("eps", value) for value in eps]
    if len(table) < 2 or len(set(table.scores.tolist())) < 2:
        raise LipsimError(f"expected at least two pairs of different scores to correlate with, got {len(table)} pairs")
    found = {}
    for name, metric in metrics.items():
        say = progress or (lambda message: None)
        say(name)
        if has_features(metric):
            natural, intervals = _of_features(metric, table, budgets, moves, batch_size)
        else:
            natural, intervals = _of_images(metric, table, first.preprocess, budgets, moves, batch_size)
        say(f"{name}: correlations")
        found[name] = correlations(natural, table.difference, intervals)
    return found


def correlations(
    distances: np.ndarray, difference: np.ndarray, intervals: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> Correlations:
    """Correlations of distances with scores that are high where people see a difference.

    Args:
        distances: ``(N,)``.
        difference: ``(N,)`` scores.
        intervals: budget → least and largest distances, ``(N,)`` each.

    Raises:
        ValueError: fewer than two pairs, or equal scores.
    """
    from scipy import stats  # seconds to import

    certified = {
        budget: {name: interval(torch.as_tensor(difference), *ends) for name, interval in INTERVALS.items()}
        for budget, ends in (intervals or {}).items()
    }
    if (distances == distances[0]).all():
        return Correlations(None, None, None, None, certified)
    fitted, plcc_logistic = fit_logistic(distances, difference), None
    if fitted is not None:
        rises = fitted[distances.argmax()] > fitted[distances.argmin()]
        plcc_logistic = float(stats.pearsonr(fitted, difference).statistic) * (1 if rises else -1)
    return Correlations(
        srcc=float(stats.spearmanr(distances, difference).statistic),
        krcc=float(stats.kendalltau(distances, difference).statistic),
        plcc=float(stats.pearsonr(distances, difference).statistic),
        plcc_logistic=plcc_logistic,
        certified=certified,
    )


def fit_logistic(distances: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
    """Scores ``(N,)`` that the best monotonic logistic function of the distances gives.

    ``b2 + (b1 − b2)/(1 + exp(−(d − b3)/|b4|))`` by least squares, as the Video Quality Experts Group fits (VQEG 2000):
    a metric need not be linear in opinion, only monotonic.

    Returns:
        The fitted scores; None for no more pairs than parameters, where the search fails, or where the best function is
        a constant.
    """
    from scipy import optimize, special  # seconds to import

    if len(distances) <= _PARAMETERS:
        return None
    spread = distances.std()
    d, y = (distances - distances.mean()) / spread, (scores - scores.mean()) / scores.std()

    def curve(b: np.ndarray) -> np.ndarray:
        fitted: np.ndarray = b[1] + (b[0] - b[1]) * special.expit((d - b[2]) / max(abs(b[3]), 1e-9))
        return fitted

    # Rising and falling: from the wrong one of these, the search may end in a constant.
    starts = (np.array([*ends, 0.0, 1.0]) for ends in ((y.max(), y.min()), (y.min(), y.max())))
    tried = [optimize.least_squares(lambda b: curve(b) - y, start, max_nfev=2000) for start in starts]
    solved = min(tried, key=lambda found: (not found.success, found.cost))
    fitted = curve(solved.x)
    return fitted if solved.success and np.ptp(fitted) > 1e-9 else None


def correlation_rows(found: Mapping[str, Correlations]) -> dict[str, list[Row]]:
    """The tables: title → rows."""
    natural: list[Row] = [
        {
            "metric": name,
            "SRCC": number(one.srcc, ".3f"),
            "KRCC": number(one.krcc, ".3f"),
            "PLCC": number(one.plcc, ".3f"),
            "PLCC, fitted": number(one.plcc_logistic, ".3f"),
        }
        for name, one in found.items()
    ]
    certified: list[Row] = [
        {
            "metric": name,
            "ε": budget,
            **{kind.upper(): f"{low:.3f} to {high:.3f}" for kind, (low, high) in ends.items()},
        }
        for name, one in found.items()
        for budget, ends in one.certified.items()
    ]
    tables = {"Correlation with opinion scores": natural}
    if certified:
        tables["Certified: what the correlation is within, for every change up to ε"] = certified
    return tables


@torch.no_grad()
def _of_features(
    metric: PerceptualMetric, table: PairTable, eps: Sequence[float], moves: Moves, batch_size: int
) -> tuple[np.ndarray, dict[str, tuple[Tensor, Tensor]]]:
    """Distances of a metric, and their intervals where it has a bound; every distinct image is embedded once."""
    if metric.has_bound and eps:
        metric.check_precision()
    # By the directions of all tiles, where there are tiles: their own interval is of one image that moves.
    compare = PairGeometry(metric)
    z, y = compare.embed_all(table.load, len(table.images), batch_size)[table.pairs].unbind(1)
    natural = compare.distance(z, y).numpy()
    if not metric.has_bound or not eps:
        return natural, {}
    if moves == "distorted":
        z, y = y, z
    options = metric.certificate_options
    return natural, {
        eps_label(budget): certificates.distance_interval(
            z, y, budget, eps_other=budget if moves == "both" else 0.0, **options
        )
        for budget in eps
    }


@torch.no_grad()
def _of_images(
    distance: Distance, table: PairTable, preprocess: Preprocess, eps: Sequence[float], moves: Moves, batch_size: int
) -> tuple[np.ndarray, dict[str, tuple[Tensor, Tensor]]]:
    """Distances of a function of two images; intervals of the pixel distance."""
    found = []
    for pairs in table.pairs.split(batch_size):
        used, places = torch.unique(pairs, return_inverse=True)
        images = table.load(used.tolist(), preprocess)
        if distance is pixel_l2:
            images = images.double()
        found.append(distance(images[places[:, 0]], images[places[:, 1]]).double())
    distances = torch.cat(found)
    if distance is not pixel_l2:
        return distances.numpy(), {}
    intervals = {}
    for budget in eps:
        change = budget * (2 if moves == "both" else 1) + _SLACK * (distances + budget)
        intervals[eps_label(budget)] = ((distances - change).clamp(min=0), distances + change)
    return distances.numpy(), intervals
