"""A threshold for "the same" chosen on labelled pairs: how often it is right, of itself, certified and under attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lipsim.attacks import DistanceObjective, auto
from lipsim.certificates import binomial_lower_bound
from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.sets.labelled import LabelledPairs
from lipsim.metric.pairs import PairGeometry, pair_geometry
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.thresholds import Threshold, choose_threshold
from lipsim.results import eps_label
from lipsim.results.tables import Row, percent, percents
from lipsim.utils.precision import full_precision

EPS = (36 / 255, 72 / 255, 108 / 255, 1.0)
ATTACKS = ("apgd", "minimal_norm")
CONFIDENCE = 0.95  # of the interval of the false-accept rate
_ROUNDING = 1e-6  # of a distance in float32, absolute


@dataclass(frozen=True)
class Rates:
    """Shares of some pairs that are answered right: same ones as the same, different ones as different.

    Attributes:
        pairs: how many.
        natural: share that is right.
        certified: ε → share that is right for every change of the left image up to ε; None without a bound.
        attacked: ε → share that is still right after attacks within ε; None where nothing was attacked. Never below
            the certified share of the same pairs.
    """

    pairs: int
    natural: float
    certified: dict[str, float] | None
    attacked: dict[str, float] | None = None


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it does on the pairs that it was chosen on.

    Attributes:
        threshold: the threshold.
        false_accepts: share of the different pairs that it takes for the same.
        interval: of the false-accept rate, of Clopper and Pearson, at 95 % in both directions; for pairs that are
            independent of each other. The upper end is exact also for a threshold that was chosen on them: distances
            that are independent lie below the ``k + 1``-th smallest of them with a probability of the distribution
            Beta(k + 1, n − k), which this bound is a quantile of.
        same: rates of the same pairs; ``natural`` is the true-accept rate.
        different: rates of the different pairs.
        attacked_same: rates of those that were attacked too; None where none were.
        attacked_different: the same of the different pairs.
        violations: how many attacked pairs were broken at an ε that they are certified at; 0, or a certificate is none.
    """

    threshold: Threshold
    false_accepts: float
    interval: tuple[float, float]
    same: Rates
    different: Rates
    attacked_same: Rates | None
    attacked_different: Rates | None
    violations: int

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """The threshold and its rates, in words."""
        low, high = self.interval
        return (
            f"threshold {self.threshold.value:.6g}: accepts {percent(self.same.natural)} % of {self.same.pairs} same "
            f"pairs and {percent(self.false_accepts, 2)} % of {self.different.pairs} different ones "
            f"(95 %: {percent(low, 2)} to {percent(high, 2)} %)"
        )

    def rows(self) -> list[Row]:
        """Shares of right answers in %, for a table."""
        rows: list[Row] = []
        for kind, rates in (("same", self.same), ("different", self.different)):
            if rates.certified is not None:
                rows.append(_row(f"{kind}, certified", rates, rates.certified))
        for kind, part in (("same", self.attacked_same), ("different", self.attacked_different)):
            if part is not None and part.attacked is not None:
                if part.certified is not None:
                    rows.append(_row(f"attacked {kind}, certified", part, part.certified))
                rows.append(_row(f"attacked {kind}, attacked", part, part.attacked))
        return rows or [_row("same", self.same, {}), _row("different", self.different, {})]


def calibrate(
    metric: PerceptualMetric,
    data: LabelledPairs,
    *,
    far: float = 0.01,
    eps: Sequence[float] = EPS,
    attack_pairs: int = 50,
    steps: int = 50,
    restarts: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Choose the largest threshold with a false-accept rate of at most ``far``, and measure what it does.

    A pair is the same where ``d ≤ threshold``. Its right answer is certified at ε where
    :func:`lipsim.certificates.threshold_radius` of the left image is above ε, in the pixels that the metric sees. The
    attacks, APGD and the minimal-norm attack, move the left image of pairs that are answered right across the
    threshold, with values in [0, 1]. What they find counts where the answer to it is wrong as
    :func:`lipsim.metric.same_files` gives it.

    Args:
        metric: any metric.
        data: labelled pairs.
        far: share of different pairs that may be taken for the same.
        eps: ℓ2 budgets.
        attack_pairs: how many pairs of each kind are attacked, drawn by ``seed``; 0: none.
        steps: of each attack.
        restarts: runs of each attack.
        batch_size: images at a time.
        seed: of draws and attacks.
        progress: told what runs next.

    Raises:
        ValueError: an unreadable image, bad numbers, pairs that no threshold can tell apart, or a metric with a bound
            and weights in half precision.
    """
    say = progress or (lambda _: None)
    check_count("attack_pairs", attack_pairs, 0)
    check_count("batch_size", batch_size)
    check_number("false-accept rate", far, 0, 1)
    budgets = sorted({check_number("eps", budget) for budget in eps})
    compare = pair_geometry(metric)
    say(f"embedding {len(data.images)} images")
    embedded = 0

    def advance(more: int) -> None:
        nonlocal embedded
        embedded += more
        say(f"embedding, {embedded} of {len(data.images)} images done")

    z, y = compare.embed_all(data.load, len(data.images), batch_size, advance)[data.pairs].unbind(1)
    distances = compare.distance(z, y)
    value = choose_threshold(distances[~data.same], far)
    say("hashing the images")
    num_same = int(data.same.sum())
    threshold = Threshold(value, far, num_same, len(data) - num_same, data.sha256())
    same, radius, _ = compare.decide(z, y, value)
    right = same == data.same
    radius = torch.where(right, radius, -1.0)  # what is wrong is certified at no ε
    broken_at = torch.full_like(radius, math.inf)
    chosen = torch.zeros_like(right)
    for kind in (True, False):
        those = (data.same == kind).nonzero().flatten()
        order = torch.randperm(len(those), generator=torch.Generator().manual_seed(seed))
        chosen[those[order[:attack_pairs]]] = True
    if chosen.any() and any(budgets):
        rows = (chosen & right).nonzero().flatten()
        for batch in rows.split(batch_size):
            done = f"attacking, {int((rows < batch[0]).sum())} of {len(rows)} pairs done"

            def tell(what: str, done: str = done) -> None:
                say(f"{done}, {what}")

            broken_at[batch] = _broken_at(compare, data, batch, value, budgets, steps, restarts, seed, tell)

    def rates(which: Tensor, attacked: bool) -> Rates:
        def shares(limit: Tensor) -> dict[str, float]:
            return {eps_label(budget): float((limit[which] > budget).double().mean()) for budget in budgets}

        return Rates(
            pairs=int(which.sum()),
            natural=float(right[which].double().mean()),
            certified=shares(radius) if metric.has_bound else None,
            attacked=shares(torch.where(right, broken_at, -1.0)) if attacked else None,
        )

    accepted = int((same & ~data.same).sum())
    return Calibration(
        threshold=threshold,
        false_accepts=accepted / threshold.different_pairs,
        interval=_interval(accepted, threshold.different_pairs),
        same=rates(data.same, False),
        different=rates(~data.same, False),
        attacked_same=rates(data.same & chosen, True) if attack_pairs else None,
        attacked_different=rates(~data.same & chosen, True) if attack_pairs else None,
        violations=int((chosen & right & (broken_at < radius)).sum()),
    )


def _broken_at(
    compare: PairGeometry,
    data: LabelledPairs,
    rows: Tensor,
    threshold: float,
    budgets: Sequence[float],
    steps: int,
    restarts: int,
    seed: int,
    progress: Callable[[str], None],
) -> Tensor:
    """The smallest budget within which an attack turns the right answers of some pairs around, ``(M,)``; else ∞."""
    metric = compare.metric
    images = [
        data.load(data.pairs[rows, side].tolist(), metric.preprocess).to(metric.device, metric.dtype) for side in (0, 1)
    ]
    found = torch.full((len(rows),), math.inf, dtype=torch.float64)
    for kind in (True, False):
        part = (data.same[rows] == kind).nonzero().flatten()
        if not len(part):
            continue
        x, other = (side[part.to(side.device)] for side in images)
        # A little beyond the threshold: the objective computes in float32 what the answer has in float64.
        beyond = threshold + _ROUNDING if kind else max(threshold - _ROUNDING, 0.0)
        with full_precision():
            objective = DistanceObjective(metric, other, beyond, increase=kind)
            attack = auto(
                objective,
                x,
                eps=budgets,
                attacks=ATTACKS,
                steps=steps,
                restarts=restarts,
                seed=seed,
                index=rows[part],
                progress=progress,
            )
        # By the answer that counts: distances of the objective are those of its own dtype.
        same, _, _ = compare.decide(compare.embed(attack.x_adv), compare.embed(other), threshold)
        found[part] = torch.where(same != kind, attack.broken_at.cpu(), math.inf)
    return found


def _interval(count: int, of: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a probability, two-sided."""
    alpha = (1 - CONFIDENCE) / 2
    counts = torch.tensor([count, of - count])
    low, rest = binomial_lower_bound(counts, of, alpha).tolist()
    return low, 1 - rest


def _row(name: str, rates: Rates, shares: dict[str, float]) -> Row:
    return {"pairs": name, "n": str(rates.pairs), "natural": percent(rates.natural), **percents(shares)}
