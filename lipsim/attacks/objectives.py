"""What an attack maximises: a scalar per sample that is positive where the sample is broken."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lipsim.certificates.geometry import along, cosine_distance, project
from lipsim.metric.distance import Distance, has_features
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.checks import taking_images
from lipsim.utils.errors import LipsimError

Target = Literal["reference", "left", "right", "all"]
IMAGES: tuple[Target, ...] = ("reference", "left", "right")
TARGETS: tuple[Target, ...] = (*IMAGES, "all")
_TINY = 1e-12  # of a distance


class Objective(Protocol):
    """A per-sample scalar to maximise; ``> 0`` means broken."""

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N,)``, differentiable (but for Square and one pixel)."""
        ...

    def select(self, rows: Tensor) -> Objective:
        """The same objective on some of the samples, given as ``(M,)`` indices.

        Attacks drop samples once broken, and repeat one for a population of changes.
        """
        ...


def value_and_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    """The objective ``(N,)`` and its gradient like ``x``, 0 where it is not finite.

    Raises:
        ValueError: the objective cannot be differentiated.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = objective(x)
        if not value.requires_grad:
            raise LipsimError("the objective has no gradient; attack it with square or one_pixel, which need none")
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class TwoAFCObjective:
    """The negated margin of the side to break: positive where the metric strictly prefers the other candidate.

    What does not move is embedded once, here. Of a metric without features (SSIM, LPIPS, any callable
    ``(x, y) → (N,)`` distances) a distance between two images that stay is computed once.

    Args:
        metric: a :class:`lipsim.PerceptualMetric` or a callable that returns distances.
        reference: ``(N, 3, H, W)``.
        left: ``(N, 3, H, W)``.
        right: ``(N, 3, H, W)``.
        target: which image the attack moves; "all" moves the three together, as nine channels in three parts.
        chosen_left: ``(N,)`` bool, the answer to break. None: the metric's own answer on the clean triplet.
        check_range: a :class:`lipsim.PerceptualMetric` refuses clean images outside [0, 1]; False, for attacks without
            a box, takes any. Where the attack goes from there, the box alone decides.

    Attributes:
        images: ``(N, 3·parts, H, W)``, the clean images that move: where attacks start.
        parts: 3 where all move, else 1: what attacks take as ``parts``.

    Raises:
        ValueError: an unknown target, or images that the metric refuses.

    Example:
        >>> import lipsim
        >>> x, y, z = (torch.full((1, 3, 64, 64), level) for level in (0.2, 0.3, 1.0))
        >>> answer = TwoAFCObjective(lipsim.load("quickstart"), x, y, z)
        >>> bool(answer(x) > 0)  # the answer stands
        False
    """

    def __init__(
        self,
        metric: Distance,
        reference: Tensor,
        left: Tensor,
        right: Tensor,
        target: Target = "reference",
        chosen_left: Tensor | None = None,
        check_range: bool = True,
    ) -> None:
        if target not in TARGETS:
            raise LipsimError(f"expected target to be one of {', '.join(TARGETS)}, got {target!r}")
        self.metric, self.target = metric, target
        clean = {"reference": reference, "left": left, "right": right}
        moving = list(IMAGES) if target == "all" else [target]
        self.images = torch.cat([clean[name] for name in moving], 1)
        self.parts = len(moving)
        # Tensors with a row a triplet: features or images that stay, and a distance between two of them.
        self.still: dict[str, Tensor] = {name: clean[name] for name in IMAGES if name not in moving}
        with torch.no_grad():
            if has_features(metric):
                for images in clean.values():
                    metric.check_images(images, check_range=check_range)
                if self.still:
                    embedded = _embed(metric, torch.cat(list(self.still.values()))).chunk(len(self.still))
                    self.still = dict(zip(self.still, embedded, strict=True))
            elif target in ("left", "right"):
                other = "right" if target == "left" else "left"
                unmoved = self.still.pop(other)
                self.still["distance"] = metric(reference, unmoved)
            if chosen_left is None:
                chosen_left = self._margin(self.images) > 0
        self.sign = torch.where(chosen_left, -1.0, 1.0).to(reference)

    def __call__(self, x: Tensor) -> Tensor:
        return self.sign * self._margin(x)

    def select(self, rows: Tensor) -> TwoAFCObjective:
        """The objective of some of the triplets."""
        part = copy.copy(self)
        part.images, part.sign = self.images[rows], self.sign[rows]
        part.still = {name: tensor[rows] for name, tensor in self.still.items()}
        return part

    def _margin(self, x: Tensor) -> Tensor:
        """``h = d(reference, right) − d(reference, left)`` with ``x`` in the place of what moves."""
        if has_features(self.metric):
            if self.target == "all":
                z, z0, z1 = _embed(self.metric, torch.cat(x.chunk(3, 1))).chunk(3)
            else:
                found = {**self.still, self.target: _embed(self.metric, x)}
                z, z0, z1 = (found[name] for name in IMAGES)
            return _feature_margin(z, z0, z1, self.metric.anchor)
        if self.target == "left":
            return self.still["distance"] - self.metric(self.still["reference"], x)
        if self.target == "right":
            return self.metric(self.still["reference"], x) - self.still["distance"]
        if self.target == "all":
            reference, left, right = x.chunk(3, 1)
        else:
            reference, left, right = x, self.still["left"], self.still["right"]
        return self.metric(reference, right) - self.metric(reference, left)


class DistanceObjective:
    """Make two images look different, ``d(x + δ, other)`` above a threshold, or alike, below it.

    Args:
        metric: a :class:`lipsim.PerceptualMetric` or a callable that returns distances.
        other: images ``(N, 3, H, W)`` to compare with; the clean images themselves for ``d(x, x + δ)``.
        threshold: the distance to cross, a number or ``(N,)``. None: as far as the budget goes; nothing counts as
            broken then, so that no attack stops early.
        increase: True drives the two apart, False together (a collision).
        check_range: as in :class:`TwoAFCObjective`, of ``other``.

    Raises:
        ValueError: images that the metric refuses.
    """

    def __init__(
        self,
        metric: Distance,
        other: Tensor,
        threshold: float | Tensor | None = None,
        increase: bool = True,
        check_range: bool = True,
    ) -> None:
        self.metric, self.increase = metric, increase
        self.threshold: Tensor | None = None
        if threshold is not None:
            self.threshold = torch.as_tensor(threshold, dtype=other.dtype, device=other.device).expand(len(other))
        self.other = other
        if has_features(metric):
            with torch.no_grad():
                self.other = metric.embed(other, check_range=check_range)

    def __call__(self, x: Tensor) -> Tensor:
        if has_features(self.metric):
            distance = cosine_distance(_embed(self.metric, x), self.other, self.metric.anchor)
        else:
            distance = self.metric(x, self.other)
        if self.threshold is not None:
            return distance - self.threshold if self.increase else self.threshold - distance
        # Increasing in the distance, never positive, and with all digits of small distances. Rounding leaves some
        # metrics, 1 less a cosine say, a little below 0 for equal images.
        distance = distance.clamp(min=0)
        return -1 / (distance + _TINY) if self.increase else -distance

    def select(self, rows: Tensor) -> DistanceObjective:
        """The objective of some of the pairs."""
        part = copy.copy(self)
        part.other = self.other[rows]
        part.threshold = None if self.threshold is None else self.threshold[rows]
        return part


class ClassificationObjective:
    """The logit margin of a classifier: positive where it answers another class than the right one.

    ``max_{k≠y} z_k − z_y``, not the cross-entropy, whose gradients vanish where the classifier is sure.

    Args:
        classifier: images ``(N, 3, H, W)`` to logits ``(N, C)``, at least two classes.
        labels: ``(N,)`` int64, the class to leave; with ``targeted`` the class to reach.
        targeted: positive where the classifier answers ``labels``.

    Raises:
        ValueError: when it is called: a classifier that returns something else than logits, or labels outside them.
    """

    def __init__(self, classifier: Callable[[Tensor], Any], labels: Tensor, targeted: bool = False) -> None:
        self.classifier, self.labels, self.targeted = classifier, labels, targeted

    def __call__(self, x: Tensor) -> Tensor:
        margin = logit_margin(logits_of(self.classifier, x), self.labels)
        return margin if self.targeted else -margin

    def select(self, rows: Tensor) -> ClassificationObjective:
        """The objective of some of the images."""
        return ClassificationObjective(self.classifier, self.labels[rows.to(self.labels.device)], self.targeted)


class ConfidenceObjective:
    """How much more of its confidence in a class a classifier has lost than it may, ``p_clean − drop − p(x)``.

    At most 0 where it is still about as sure of this class as on the clean image.

    Args:
        classifier: images ``(N, 3, H, W)`` to logits ``(N, C)``, at least two classes.
        labels: ``(N,)`` int64, the class whose confidence counts.
        images: ``(N, 3, H, W)``, the clean images; their confidence is computed once, here.
        drop: the confidence that may be lost, in [0, 1].

    Attributes:
        least: ``(N,)``, the confidence ``p_clean − drop`` to keep.

    Raises:
        ValueError: a classifier that returns something else than logits or takes other images, labels outside them, or
            a drop outside [0, 1].

    Example:
        >>> classifier = torch.nn.Flatten()  # two pixels are two logits
        >>> image = torch.tensor([[[[1.0, 0.0]]]])
        >>> sure = ConfidenceObjective(classifier, torch.tensor([0]), image, drop=0.2)
        >>> print(f"{sure(image).item():.2f} {sure(0 * image).item():.2f}")  # p falls from 0.73 to 0.5
        -0.20 0.03
    """

    def __init__(
        self, classifier: Callable[[Tensor], Any], labels: Tensor, images: Tensor, drop: float | Tensor = 0.2
    ) -> None:
        allowed = torch.as_tensor(drop)
        if not bool(((allowed >= 0) & (allowed <= 1)).all()):
            raise LipsimError(f"expected a drop of confidence in [0, 1], got {drop}")
        self.classifier, self.labels = classifier, labels
        with torch.no_grad(), taking_images("the classifier", images):
            self.least = self._confidence(images) - allowed.to(images)

    def __call__(self, x: Tensor) -> Tensor:
        return self.least - self._confidence(x)

    def select(self, rows: Tensor) -> ConfidenceObjective:
        """The objective of some of the images."""
        part = copy.copy(self)
        part.labels, part.least = self.labels[rows.to(self.labels.device)], self.least[rows]
        return part

    def _confidence(self, x: Tensor) -> Tensor:
        """Softmax probability ``(N,)`` of each label."""
        logits = logits_of(self.classifier, x)
        check_labels(logits, self.labels)
        return logits.softmax(1).gather(1, self.labels.to(logits.device).unsqueeze(1)).squeeze(1)


class UnendingObjective:
    """An objective that nothing breaks, so that no attack stops before its budget of steps is spent.

    Negative everywhere, increasing in the objective, and so with gradients of the same direction: what adversarial
    training and targeted examples need, where an example that breaks just so is not the worst.

    Args:
        objective: per-sample scalar.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, x: Tensor) -> Tensor:
        value = self.objective(x)
        # A hyperbola above 0, of the same slope there: softplus has no digits, and no gradient, from 100 on.
        above = -math.log(2) / (1 + value.clamp(min=0) / (2 * math.log(2)))
        return torch.where(value > 0, above, -torch.nn.functional.softplus(-value))

    def select(self, rows: Tensor) -> UnendingObjective:
        """The objective of some of the samples."""
        return UnendingObjective(self.objective.select(rows))


def logits_of(classifier: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Logits ``(N, C)`` of a classifier.

    Raises:
        ValueError: it returns something else, as segmenters and detectors do.
    """
    logits = classifier(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        shape = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise LipsimError(f"expected a classifier that returns logits ({len(x)}, classes), got {shape}")
    return logits


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_y − max_{k≠y} z_k`` ``(N,)`` of logits ``(N, C)``, positive where the class ``y`` is the answer.

    Raises:
        ValueError: labels ``(N,)`` that are not classes of these logits.
    """
    check_labels(logits, labels)
    index = labels.to(logits.device).unsqueeze(1)
    own = logits.gather(1, index).squeeze(1)
    others = logits.scatter(1, index, -torch.inf)
    return own - others.amax(1)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels ``(N,)`` that are not classes of logits ``(N, C)``.

    Raises:
        ValueError: another number of them, or one outside the classes, or no integers.
    """
    if labels.dtype not in (torch.int32, torch.int64):
        raise LipsimError(f"expected labels in torch.int64, got {labels.dtype}; convert them by labels.long()")
    if labels.shape != logits.shape[:1] or bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise LipsimError(f"expected {len(logits)} labels in 0 to {logits.shape[1] - 1}, got {labels.tolist()[:8]}")


def _embed(metric: PerceptualMetric, x: Tensor) -> Tensor:
    """Features at any point that an attack looks at; its box says where that may be, at no cost for each step."""
    return metric.embed(x, check_range=False)


def _feature_margin(z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
    """``⟨p(z), p(z0) − p(z1)⟩``, equal to ``d(z, z1) − d(z, z0)`` and exactly 0 for equal candidates."""
    return along(project(z, anchor), project(z0, anchor), project(z1, anchor))
