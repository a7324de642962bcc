"""One answer of a metric, its certificate, and what an attack within a budget makes of it: what a page can show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lipsim import certificates
from lipsim.attacks.images import AttackedImages, attack_pair, attack_triplet
from lipsim.certificates.numbers import check_number
from lipsim.metric import PerceptualMetric
from lipsim.metric.image_files import nearer
from lipsim.metric.pairs import pair_geometry
from lipsim.utils.errors import LipsimError

Answer = Literal["left", "right", "tie", "same", "different"]


@dataclass(frozen=True)
class AttackedAnswer:
    """An answer about the first of two or three images, before and after an attack on that image.

    Attributes:
        before: of a triplet which candidate is nearer, of a pair whether the distance is at most the threshold.
        after: the same for the attacked image.
        distances: name of a distance → before the attack, and after.
        interval: of a pair, between which distances every image within the budget has to be; None for a triplet.
        radius: no change of the image shorter than this (ℓ2) changes the answer.
        pixels: how many pixels of it may take any colour.
        eps: the budget of the attack (ℓ2).
        length: of the change that it made, at most ``eps``.
        clean: the image as the metric sees it, ``(3, S, S)``.
        attacked: the attacked one.
    """

    before: Answer
    after: Answer
    distances: dict[str, tuple[float, float]]
    interval: tuple[float, float] | None
    radius: float
    pixels: int
    eps: float
    length: float
    clean: Tensor
    attacked: Tensor

    @property
    def is_certified(self) -> bool:
        """Whether the budget is inside the radius, so that no attack can change the answer."""
        return self.eps < self.radius

    @property
    def holds(self) -> bool:
        """Whether the answer is the same after the attack."""
        return self.before == self.after

    @property
    def is_sound(self) -> bool:
        """Whether the attack left every certificate as it was; False would be a fault of this package."""
        low, high = (0.0, 2.0) if self.interval is None else self.interval
        after = 0.0 if self.interval is None else self.distances["d"][1]
        inside = low - _ROUNDING <= after <= high + _ROUNDING
        return inside and (self.holds or self.length >= self.radius)

    @property
    def verdict(self) -> str:
        """What the attack says about the answer, in one sentence."""
        budget = f"ε = {self.eps:.3g}"
        if not self.is_sound:
            return f"The attack broke a certificate at {budget}: a fault of this package, please report it."
        if self.before == "tie":
            return "A tie: both candidates are at one distance, there is no answer to attack."
        if self.is_certified:
            return f"{budget} is inside the certified radius: no change of this size turns the answer."
        if self.holds:
            return f"{budget} is beyond the certified radius: nothing is proven there, and this attack failed as well."
        return f"{budget} is beyond the certified radius, and the attack turned the answer to “{self.after}”."

    def change(self) -> tuple[Tensor, float]:
        """The change around gray, ``(3, S, S)`` in [0, 1], and by how much it is amplified."""
        change = self.attacked - self.clean
        gain = 0.5 / max(float(change.abs().max()), 1e-6)
        return (0.5 + gain * change).clamp(0, 1), gain


def attacked_triplet(
    metric: PerceptualMetric, reference: Tensor, left: Tensor, right: Tensor, *, eps: float, steps: int = 50
) -> AttackedAnswer:
    """Which candidate is nearer to a reference, how far that is certain, and what an attack on the reference finds.

    Args:
        metric: a metric with a bound, frozen.
        reference: ``(3, S, S)`` in [0, 1].
        left: the same.
        right: the same.
        eps: budget of the attack (ℓ2); 0: none.
        steps: gradient steps of each attack of the suite.

    Raises:
        ValueError: no such images, a negative budget, or a metric without a bound.
    """
    _check_bound(metric)
    check_number("eps", eps)
    images = (reference, left, right)
    certificate = metric.certify(*(image[None] for image in images))
    margin = float(certificate.margin)
    attacked, moved, after = None, reference, margin
    if eps > 0 and margin != 0:
        attacked = attack_triplet(metric, *images, eps=[eps], steps=steps)
        moved = attacked.attacked["reference"]
        # Not of rounded distances, which may be equal where the margin is not 0.
        after = float(metric.certify(moved[None], left[None], right[None]).margin)
    with torch.no_grad():
        distances = {
            name: (float(metric(reference[None], other[None])), float(metric(moved[None], other[None])))
            for name, other in (("d(reference, left)", left), ("d(reference, right)", right))
        }
    return AttackedAnswer(
        before=nearer(margin),
        after=nearer(after),
        distances=distances,
        interval=None,
        radius=float(certificate.radius),
        pixels=int(certificate.pixels),
        eps=eps,
        length=_length(attacked),
        clean=reference,
        attacked=moved,
    )


@torch.no_grad()
def attacked_pair(
    metric: PerceptualMetric, image: Tensor, other: Tensor, *, threshold: float, eps: float, steps: int = 50
) -> AttackedAnswer:
    """Whether two images are the same by a threshold, how far that is certain, and what an attack on the first finds.

    Args:
        metric: a metric with a bound, frozen.
        image: ``(3, S, S)`` in [0, 1].
        other: the same.
        threshold: the distance up to which two images are the same, in [0, 2].
        eps: budget of the attack (ℓ2); 0: none.
        steps: gradient steps of the attack.

    Raises:
        ValueError: no such images, a negative budget, a threshold outside [0, 2], or a metric without a bound.
    """
    _check_bound(metric)
    check_number("eps", eps)
    lower, upper = metric.distance_bounds(image[None], other[None], eps)
    compare = pair_geometry(metric)
    _, radius, _ = compare.decide(compare.embed(image[None]), compare.embed(other[None]), threshold)
    distance = float(metric(image[None], other[None]))
    is_same = distance <= threshold
    attacked = None
    if eps > 0:
        with torch.enable_grad():
            goal: Literal["different", "alike"] = "different" if is_same else "alike"
            attacked = attack_pair(metric, image, other, goal=goal, eps=eps, steps=steps)
    moved = image if attacked is None else attacked.attacked["image"]
    after = float(metric(moved[None], other[None]))
    return AttackedAnswer(
        before="same" if is_same else "different",
        after="same" if after <= threshold else "different",
        distances={"d": (distance, after)},
        interval=(float(lower), float(upper)),
        radius=float(radius),
        pixels=int(certificates.certified_pixels(image[None].cpu(), radius)),
        eps=eps,
        length=_length(attacked),
        clean=image,
        attacked=moved,
    )


# Of a distance in [0, 2] in float32, beside an interval in float64: what a metric without a feature error leaves out.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


def _length(attacked: AttackedImages | None) -> float:
    return 0.0 if attacked is None else attacked.length


def _check_bound(metric: PerceptualMetric) -> None:
    if not metric.has_bound:
        raise LipsimError("the metric has no Lipschitz bound, nothing about it can be certified")
