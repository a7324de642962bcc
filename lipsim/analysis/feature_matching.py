"""Images with given features, or of a given class: normalised gradient steps of one length (Ilyas et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.attacks.objectives import Objective, logits_of, value_and_gradient
from lipsim.attacks.projections import Ball, expand, sample_norm


class FeatureObjective:
    """The negated distance ``−‖g(x) − z‖₂`` of features to given ones.

    Args:
        features: images to features ``(N, D)``.
        goal: ``z``, ``(N, D)``.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], goal: Tensor) -> None:
        self.features, self.goal = features, goal

    def __call__(self, x: Tensor) -> Tensor:
        distance: Tensor = torch.linalg.vector_norm(self.features(x) - self.goal, dim=1)
        return -distance

    def select(self, rows: Tensor) -> FeatureObjective:
        """The objective of some of the images."""
        return FeatureObjective(self.features, self.goal[rows])


class LikelihoodObjective:
    """The logarithm of the probability that a classifier gives to a class; never above 0, so that nothing ends early.

    Args:
        classifier: images to logits ``(N, C)``.
        labels: ``(N,)``, the classes.
    """

    def __init__(self, classifier: Callable[[Tensor], Any], labels: Tensor) -> None:
        self.classifier, self.labels = classifier, labels

    def __call__(self, x: Tensor) -> Tensor:
        return -F.cross_entropy(logits_of(self.classifier, x), self.labels, reduction="none")

    def select(self, rows: Tensor) -> LikelihoodObjective:
        """The objective of some of the images."""
        return LikelihoodObjective(self.classifier, self.labels[rows])


def ascend_by_equal_steps(
    objective: Objective,
    x: Tensor,
    *,
    steps: int,
    step_size: float,
    eps: float | None = None,
    shorten: bool = False,
    say: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Maximise an objective by normalised gradient steps of one length; the best point of all is kept.

    What the authors' package ``robustness`` does: step, projection to the ball, clipping to [0, 1], no random start.
    Costs ``steps + 1`` forward and ``steps`` backward passes. A sample whose gradient vanishes stays where it is.

    Args:
        objective: per-sample scalar.
        x: images ``(N, 3, H, W)`` in [0, 1], where it starts.
        steps: of them.
        step_size: their ℓ2 length.
        eps: radius of the ℓ2 ball around ``x``; None: anywhere in [0, 1].
        shorten: no step is longer than ``−objective/‖gradient‖``, which is where a linear objective is 0: one that is
            at most 0 is then approached without steps back and forth.
        say: hears after each step how many are done.
    """
    ball = Ball(2, 0.0 if eps is None else eps)
    current, best = x.detach(), x.detach().clone()
    top = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)

    def keep(value: Tensor) -> None:
        better = value > top
        best[better], top[better] = current[better], value[better]

    for step in range(steps):
        value, gradient = value_and_gradient(objective, current)
        keep(value)
        length = torch.full_like(value, step_size)
        if shorten:
            norm = sample_norm(gradient)
            length = torch.minimum(length, -value / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        moved = current + expand(length, current) * ball.direction(gradient)
        current = moved.clamp(0, 1) if eps is None else ball.project(moved, x)
        say(step + 1)
    with torch.no_grad():
        keep(objective(current))
    return best
