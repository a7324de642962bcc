"""Scores of the answers to a set of triplets, from rows that callbacks have gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lipsim.evaluation.scores import CertifiedCurve, CertifiedScore, RadiusStatistics, TwoAFCScore
from lipsim.results import eps_label
from lipsim.results.schema import RadiusSummary, Scores

CURVE_POINTS = 121  # from 0 to 1.5 times the largest ε


class Answers:
    """Answers to the triplets of a set.

    Args:
        choice: ``(N,)``, positive for left, 0 where there is no answer: margins, or choices.
        votes: share of the votes for right, ``(N,)``.
        index: what tells the triplets apart, ``(N,)``.
    """

    def __init__(self, choice: Tensor, votes: Tensor, index: Tensor) -> None:
        self.choice, self.votes, self.index = choice, votes.double(), index

    def natural(self, kind: Literal["majority", "vote"]) -> float:
        """Score without a perturbation, see :class:`lipsim.evaluation.scores.TwoAFCScore`."""
        score = TwoAFCScore(kind, sync_on_compute=False)
        score.update(self.choice, self.votes, self.index)
        return float(score.compute())

    def certified(self, radii: Tensor, eps: Sequence[float]) -> Scores:
        """Certified scores of radii ``(N,)`` by the label of each budget."""
        scores = CertifiedScore(list(eps), sync_on_compute=False)
        scores.update(self.choice, radii, self.votes, self.index)
        return dict(zip(map(eps_label, eps), map(float, scores.compute().values()), strict=True))

    def curve(self, radii: Tensor, grid: Sequence[float]) -> list[float | None]:
        """Certified scores of radii ``(N,)`` over a grid of budgets."""
        scores = CertifiedCurve(list(grid), sync_on_compute=False)
        scores.update(self.choice, radii, self.votes, self.index)
        return list(scores.compute()[1].tolist())

    def radius(self, radii: Tensor) -> RadiusSummary:
        """Mean, median, least and largest of radii ``(N,)``."""
        statistics = RadiusStatistics(sync_on_compute=False)
        statistics.update(radii, self.index)
        found = {name.removeprefix("radius_"): float(value) for name, value in statistics.compute().items()}
        return RadiusSummary(mean=found["mean"], median=found["median"], min=found["min"], max=found["max"])

    @property
    def num_tied_votes(self) -> int:
        """How many votes are tied."""
        return int((self.votes == 0.5).sum())


def curve_grid(eps: Sequence[float]) -> list[float]:
    """Budgets of the curves that belong to a table with the budgets ``eps``."""
    grid: list[float] = torch.linspace(0, 1.5 * (eps[-1] or 1.0), CURVE_POINTS, dtype=torch.float64).tolist()
    return grid
