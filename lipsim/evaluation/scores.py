"""torchmetrics for 2AFC data. Each counts a sample once, however often a distributed sampler repeats it.

A sample is told from others by ``index``, ``(N,)`` whole numbers: its position in the data set, or anything else that
no other sample has. Indices of several sets collide; ``(N, K)`` rows of numbers, such as set and index, do not.

:func:`triplet_metrics` has all of them in one collection. Keyword arguments that are not named go to
``torchmetrics.Metric`` (``sync_on_compute``, …).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat

from lipsim.data import Triplet
from lipsim.metric.distance import Distance
from lipsim.results import eps_label
from lipsim.results.schema import NaturalScores
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import unique_first


class _PerSample(Metric):
    """Keeps one row of numbers for each sample; the first row of a repeated index counts."""

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def _append(self, index: Tensor, *columns: Tensor) -> None:
        if index.ndim not in (1, 2) or len(index) != len(columns[0]) or index.is_floating_point():
            raise LipsimError(
                f"expected an index of whole numbers (N,) or (N, K) for {len(columns[0])} samples, got "
                f"{tuple(index.shape)} {index.dtype}"
            )
        self.index.append(index)
        self.rows.append(torch.stack([column.double() for column in columns], dim=1))

    def _samples(self) -> Tensor:
        """``(N, columns)`` in the order of the sample index, without repetitions."""
        if not len(self.index):
            raise LipsimError("no triplet was seen; the data loader is empty")
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        _, first = unique_first(index)
        return rows[first]


class TwoAFCScore(_PerSample):
    """Agreement of a metric with human votes on 2AFC triplets, in [0, 1].

    Args:
        kind: "majority", the share of the triplets without a tied vote on which the metric agrees with the majority; or
            "vote", the mean vote share of the chosen side, 0.5 where the metric is tied: the published score of BAPPS.
    """

    higher_is_better = True

    def __init__(self, kind: Literal["majority", "vote"] = "majority", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in ("majority", "vote"):
            raise LipsimError(f"expected kind 'majority' or 'vote', got {kind!r}")
        self.kind = kind

    def update(self, margin: Tensor, right_vote: Tensor, index: Tensor) -> None:
        """Add triplets, all (N,): ``margin`` is positive where left is nearer, ``right_vote`` in [0, 1]."""
        if self.kind == "majority":
            self._append(index, agrees(margin, right_vote), right_vote != 0.5)
        else:
            share = torch.where(margin > 0, 1 - right_vote, torch.where(margin < 0, right_vote, 0.5))
            self._append(index, share, torch.ones_like(share))

    def compute(self) -> Tensor:
        """The score; NaN where every vote is tied."""
        score, weight = self._samples().unbind(1)
        return score.sum() / weight.sum()


class _CertifiedShares(_PerSample):
    """Share of the triplets without a tied vote on which the metric agrees with the majority and ``radius > ε``."""

    def __init__(self, eps: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if any(not e >= 0 for e in eps):
            raise LipsimError(f"expected every eps ≥ 0, got {list(eps)}")
        self.eps = tuple(eps)

    def update(self, margin: Tensor, radius: Tensor, right_vote: Tensor, index: Tensor) -> None:
        """Add triplets with their certified ``radius`` (N,)."""
        self._append(index, agrees(margin, right_vote), radius, right_vote != 0.5)

    def _shares(self) -> Tensor:
        agree, radius, untied = self._samples().unbind(1)
        eps = torch.tensor(self.eps, dtype=radius.dtype, device=radius.device)
        held = (agree > 0).unsqueeze(1) & (radius.unsqueeze(1) > eps)
        return held.sum(0) / untied.sum()


class CertifiedScore(_CertifiedShares):
    """Share of the triplets without a tied vote on which the metric agrees with the majority *and* ``radius > ε``.

    Args:
        eps: budgets, each at least 0.
    """

    higher_is_better = True

    def compute(self) -> dict[str, Tensor]:
        """Scores in [0, 1] by budget, ``certified_36/255`` and so on."""
        return {f"certified_{eps_label(eps)}": s for eps, s in zip(self.eps, self._shares(), strict=True)}


class CertifiedCurve(_CertifiedShares):
    """:class:`CertifiedScore` over a grid of budgets, as something to plot.

    Args:
        eps: the grid.
    """

    def compute(self) -> Tensor:
        """``(2, len(eps))``: the budgets, and the scores there."""
        shares = self._shares()
        return torch.stack([torch.tensor(self.eps, dtype=shares.dtype, device=shares.device), shares])


class RadiusStatistics(_PerSample):
    """Mean, median and extremes of the certified radii."""

    def update(self, radius: Tensor, index: Tensor) -> None:
        """Add radii (N,)."""
        self._append(index, radius)

    def compute(self) -> dict[str, Tensor]:
        """``radius_mean``, ``radius_median``, ``radius_min``, ``radius_max``."""
        radius = self._samples()[:, 0].sort().values
        median = (radius[(len(radius) - 1) // 2] + radius[len(radius) // 2]) / 2
        return {
            "radius_mean": radius.mean(),
            "radius_median": median,
            "radius_min": radius[0],
            "radius_max": radius[-1],
        }


def triplet_metrics(eps: Sequence[float], prefix: str | None = None, **kwargs: Any) -> MetricCollection:
    """All scores of certified triplets: ``majority_score``, ``vote_score``, ``certified_36/255``, ``radius_mean``, ….

    Update it by name, each metric takes what it needs: ``update(margin=…, radius=…, right_vote=…, index=…)``.

    Args:
        eps: budgets of the certified scores.
        prefix: put before each name, such as "test/".
        kwargs: of each metric.
    """
    metrics: dict[str, Metric] = {
        "majority_score": TwoAFCScore("majority", **kwargs),
        "vote_score": TwoAFCScore("vote", **kwargs),
        "certified": CertifiedScore(eps, **kwargs),
        "radius": RadiusStatistics(**kwargs),
    }
    # No compute groups: they share states, and these differ.
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)  # type: ignore[arg-type]


def agrees(margin: Tensor, right_vote: Tensor) -> Tensor:
    """``(N,)`` bool: the metric is not tied, nor the vote, and both are on the same side."""
    return ((margin > 0) & (right_vote < 0.5)) | ((margin < 0) & (right_vote > 0.5))


def score_distance(distance: Distance, loader: Iterable[Triplet]) -> NaturalScores:
    """Natural scores, "majority" and "vote", of a plain distance on batches of triplets.

    Args:
        distance: of two batches of images, ``(N,)``.
        loader: every triplet once.
    """
    majority, vote = TwoAFCScore("majority", sync_on_compute=False), TwoAFCScore("vote", sync_on_compute=False)
    seen = 0
    for batch in loader:
        position = torch.arange(seen, seen + len(batch))
        seen += len(batch)
        with torch.no_grad():
            margin = distance(batch.reference, batch.right) - distance(batch.reference, batch.left)
        for score in (majority, vote):
            score.update(margin, batch.right_vote, position)
    return {"majority": float(majority.compute()), "vote": float(vote.compute())}
