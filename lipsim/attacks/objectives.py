"""What an attack maximises: a scalar per sample that is positive where the sample is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from lipsim.geometry import cosine_distance, project
from lipsim.metric import PerceptualMetric

Distance = Callable[[Tensor, Tensor], Tensor]
Target = Literal["reference", "left", "right"]
TARGETS: tuple[Target, ...] = ("reference", "left", "right")


class Objective(Protocol):
    """A per-sample scalar to maximise; ``> 0`` means broken."""

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N,)``, differentiable."""
        ...

    def select(self, rows: Tensor) -> Objective:
        """The same objective on some of the samples, given as ``(M,)`` indices (attacks drop samples once broken)."""
        ...


class TwoAFCObjective:
    """The negated margin of the side to break: positive where the metric strictly prefers the other candidate.

    The two images that do not move are embedded once, here. A metric without features (SSIM, LPIPS, any callable
    ``(x, y) → (N,)`` distances) is evaluated on the moving image's two distances.

    Args:
        metric: a :class:`lipsim.PerceptualMetric` or a callable that returns distances.
        reference: ``(N, 3, H, W)``.
        left: ``(N, 3, H, W)``.
        right: ``(N, 3, H, W)``.
        target: which image the attack moves.
        chosen_left: ``(N,)`` bool, the answer to break. None: the metric's own answer on the clean triplet.
    """

    def __init__(
        self,
        metric: PerceptualMetric | Distance,
        reference: Tensor,
        left: Tensor,
        right: Tensor,
        target: Target = "reference",
        chosen_left: Tensor | None = None,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"expected target to be one of {', '.join(TARGETS)}, got {target!r}")
        self.metric = metric
        self.target = target
        self.clean = {"reference": reference, "left": left, "right": right}
        self.features: dict[str, Tensor] = {}
        if isinstance(metric, PerceptualMetric):
            still = [name for name in TARGETS if name != target]
            with torch.no_grad():
                embedded = metric.embed(torch.cat([self.clean[name] for name in still])).chunk(2)
            self.features = dict(zip(still, embedded, strict=True))
        if chosen_left is None:
            with torch.no_grad():
                chosen_left = self._margin(self.clean[target]) > 0
        self.sign = torch.where(chosen_left, -1.0, 1.0).to(reference)

    def __call__(self, x: Tensor) -> Tensor:
        return self.sign * self._margin(x)

    def select(self, rows: Tensor) -> TwoAFCObjective:
        """The objective of some of the triplets."""
        part = object.__new__(TwoAFCObjective)
        part.metric, part.target = self.metric, self.target
        part.clean = {name: images[rows] for name, images in self.clean.items()}
        part.features = {name: z[rows] for name, z in self.features.items()}
        part.sign = self.sign[rows]
        return part

    def _margin(self, x: Tensor) -> Tensor:
        """``h = d(reference, right) − d(reference, left)`` with ``x`` in the place of the target."""
        if isinstance(self.metric, PerceptualMetric):
            z = {**self.features, self.target: self.metric.embed(x)}
            return _feature_margin(z["reference"], z["left"], z["right"], self.metric.anchor)
        images = {**self.clean, self.target: x}
        return self.metric(images["reference"], images["right"]) - self.metric(images["reference"], images["left"])


class DistanceObjective:
    """Push ``d(x + δ, other)`` above a threshold, or below it.

    Args:
        metric: a :class:`lipsim.PerceptualMetric` or a callable that returns distances.
        other: images ``(N, 3, H, W)`` to compare with; the clean images themselves for ``d(x, x + δ)``.
        threshold: the distance to cross.
        increase: True drives the two apart, False together (a collision).
    """

    def __init__(
        self, metric: PerceptualMetric | Distance, other: Tensor, threshold: float | Tensor = 0.0, increase: bool = True
    ) -> None:
        self.metric, self.other, self.increase = metric, other, increase
        self.threshold = torch.as_tensor(threshold, dtype=other.dtype, device=other.device).expand(len(other))
        self.features: Tensor | None = None
        if isinstance(metric, PerceptualMetric):
            with torch.no_grad():
                self.features = metric.embed(other)

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.metric, PerceptualMetric) and self.features is not None:
            distance = cosine_distance(self.metric.embed(x), self.features, self.metric.anchor)
        else:
            distance = self.metric(x, self.other)
        return distance - self.threshold if self.increase else self.threshold - distance

    def select(self, rows: Tensor) -> DistanceObjective:
        """The objective of some of the pairs."""
        part = object.__new__(DistanceObjective)
        part.metric, part.increase = self.metric, self.increase
        part.other, part.threshold = self.other[rows], self.threshold[rows]
        part.features = None if self.features is None else self.features[rows]
        return part


def _feature_margin(z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
    """``⟨p(z), p(z0) − p(z1)⟩``, equal to ``d(z, z1) − d(z, z0)`` and exactly 0 for equal candidates."""
    (p, s), (p0, s0), (p1, s1) = project(z, anchor), project(z0, anchor), project(z1, anchor)
    return (p * (p0 - p1)).sum(-1) + s * (s0 - s1)
