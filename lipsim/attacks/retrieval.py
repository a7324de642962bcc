"""What an attack on a search with labels maximises; see :mod:`lipsim.attacks.objectives`."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from lipsim.certificates.neighbours import most_frequent
from lipsim.metric.perceptual_metric import PerceptualMetric

Goal = Literal["recall", "vote"]
GOALS: tuple[Goal, ...] = ("recall", "vote")
_JUST_NOT = -1e-6  # of what looks broken by its surrogate and is not


class RetrievalObjective:
    """Positive where a query has lost its label among the ``k`` nearest items of a gallery.

    "recall": the ``k``-th most similar item of other labels is before every one of the query's label. "vote": its label
    is not the most frequent one among the ``k`` nearest, of equally frequent ones that of the nearest item; what pushes
    there is the lead of one rival, the other label with most of the ``k`` nearest of the clean query (of equally many,
    none say, that of the most similar item), in the mean of the nearest ``⌈k/2⌉`` items of each.

    Args:
        metric: frozen, for speed.
        images: ``(N, 3, H, W)``, the clean queries.
        unit: ``(M, D + 1)``, unit vectors of the gallery, :meth:`lipsim.certificates.gallery.Gallery.unit`.
        labels: of the gallery ``(M,)`` int64.
        own: of the queries ``(N,)`` int64.
        k: number of neighbours.
        goal: "recall" or "vote".
    """

    def __init__(
        self, metric: PerceptualMetric, images: Tensor, unit: Tensor, labels: Tensor, own: Tensor, k: int, goal: Goal
    ) -> None:
        self.metric, self.unit, self.labels = metric, unit.to(images), labels
        self.own, self.k, self.goal = own, k, goal
        with torch.no_grad():
            similarity = self._similarity(images)
            votes = self._votes(similarity)
            others = torch.where(labels == own.unsqueeze(1), -torch.inf, similarity)
            nearest = torch.full_like(votes, -torch.inf, dtype=similarity.dtype)
            nearest = nearest.scatter_reduce(1, labels.expand_as(others), others, "amax")
            self.rival = (3 * votes + nearest).argmax(1)  # cosines lie 2 apart at most

    def __call__(self, x: Tensor) -> Tensor:
        similarity = self._similarity(x)
        same = self.labels == self.own.unsqueeze(1)
        if self.goal == "recall":
            others = torch.where(same, -torch.inf, similarity).topk(self.k, dim=1).values[:, -1]
            return others - torch.where(same, similarity, -torch.inf).amax(1)
        rivals = self.labels == self.rival.unsqueeze(1)
        lead = self._mean_of_nearest(similarity, rivals) - self._mean_of_nearest(similarity, same)
        broken = most_frequent(self._nearest_labels(similarity.detach())) != self.own
        # The sign is that of the vote, the slope that of the lead.
        shift = torch.where(broken, lead.clamp(min=-_JUST_NOT), lead.clamp(max=_JUST_NOT)) - lead
        return lead + shift.detach()

    def select(self, rows: Tensor) -> RetrievalObjective:
        """The objective of some of the queries."""
        part = copy.copy(self)
        part.own, part.rival = self.own[rows], self.rival[rows]
        return part

    def _similarity(self, x: Tensor) -> Tensor:
        """Cosines ``(N, M)``."""
        z = self.metric.embed(x, check_range=False)
        e = torch.cat([z, torch.full_like(z[:, :1], self.metric.anchor)], 1)
        return torch.nn.functional.normalize(e, dim=1) @ self.unit.mT

    def _nearest_labels(self, similarity: Tensor) -> Tensor:
        """Labels of the ``k`` nearest, ``(N, k)``, the nearest first."""
        return self.labels[similarity.topk(self.k, dim=1).indices]

    def _votes(self, similarity: Tensor) -> Tensor:
        """How many of the ``k`` nearest have each label, ``(N, C)``."""
        nearest = self._nearest_labels(similarity)
        size = int(max(self.labels.max(), self.own.max())) + 1
        return nearest.new_zeros(len(nearest), size).scatter_add(1, nearest, torch.ones_like(nearest))

    def _mean_of_nearest(self, similarity: Tensor, mask: Tensor) -> Tensor:
        """Of the items in a mask ``(N, M)``, of whose rows each has one at least, the mean of the most similar."""
        most = (self.k + 1) // 2
        values = torch.where(mask, similarity, -torch.inf).topk(min(most, similarity.shape[1]), dim=1).values
        found = torch.isfinite(values)
        return torch.where(found, values, 0.0).sum(1) / found.sum(1).clamp(min=1)
