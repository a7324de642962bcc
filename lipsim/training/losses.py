"""Losses of the three stages: each is a small callable whose arguments a config can set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates import margin, signed_joint_radius, signed_reference_radius
from lipsim.certificates.geometry import project
from lipsim.certificates.numbers import check_constants
from lipsim.data.triplet import arranged
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision

# Triplets over M images are few enough for the products of all pairs up to so many pairs a triplet.
PAIRS_PER_TRIPLET = 32
_RELATIVE_ERROR = 1e-14  # of a difference of squares in float64, with room


class TripletLoss(ABC):
    """A loss on the features of 2AFC triplets.

    Features that are not finite give a loss that is NaN, so that a diverged training is seen. Where features are equal
    the gradients are finite.
    """

    @abstractmethod
    def __call__(
        self, z: Tensor, z0: Tensor, z1: Tensor, right_vote: Tensor, anchor: float, progress: float = 1.0
    ) -> Tensor:
        """Scalar loss of features ``(N, D)`` and votes ``(N,)``, a mean over the triplets by their :meth:`weights`.

        Args:
            z: features of the references.
            z0: of the left candidates.
            z1: of the right candidates.
            right_vote: votes in [0, 1].
            anchor: constant coordinate of the metric.
            progress: share of the training that is done, in [0, 1].
        """

    def of_shared(
        self, features: Tensor, ids: Tensor, right_vote: Tensor, anchor: float, progress: float = 1.0
    ) -> Tensor:
        """The same loss of triplets over few images, with features ``(M, D)``, in rows ``ids``, ``(N, 3)`` of these."""
        return self(*arranged(features, ids), right_vote, anchor, progress)

    def weights(self, right_vote: Tensor) -> Tensor:
        """What each triplet counts in the mean, ``(N,)``: here 1, and 0 where the vote is tied.

        Several processes weigh their means by the sums of these, which makes it one mean over all triplets.
        """
        return (right_vote != 0.5).to(right_vote)


class RadiusLoss(TripletLoss):
    """A loss of the exact certified radius.

    The encoder counts as 1-Lipschitz here, which the layers see to; the audit's last digits do not matter in training.
    """

    @abstractmethod
    def of_radius(self, radius: Tensor, right_vote: Tensor, progress: float) -> Tensor:
        """Scalar loss of signed radii ``(N,)``: positive where left is preferred, and NaN where one is not known."""

    def radius(self, z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
        """Signed radii ``(N,)``: here those of the reference."""
        return signed_reference_radius(z, z0, z1, anchor=anchor)

    def shared_radius(self, features: Tensor, ids: Tensor, anchor: float) -> Tensor:
        """The same of triplets over few images."""
        own = type(self).radius is not RadiusLoss.radius  # a subclass has another one
        if own or len(features) ** 2 > PAIRS_PER_TRIPLET * len(ids):
            return self.radius(*arranged(features, ids), anchor)
        return _radius_by_pairs(features, ids, anchor)

    def __call__(
        self, z: Tensor, z0: Tensor, z1: Tensor, right_vote: Tensor, anchor: float, progress: float = 1.0
    ) -> Tensor:
        known = torch.stack([_is_known(features) for features in (z, z0, z1)]).all(0)
        return self._loss(self.radius(z, z0, z1, anchor), known, right_vote, progress)

    def of_shared(
        self, features: Tensor, ids: Tensor, right_vote: Tensor, anchor: float, progress: float = 1.0
    ) -> Tensor:
        if type(self).__call__ is not RadiusLoss.__call__:
            return super().of_shared(features, ids, right_vote, anchor, progress)
        known = _is_known(features)
        # In a product of all pairs an image of no triplet would make NaN of every gradient.
        features = torch.where(known.unsqueeze(1), features, 0.0)
        return self._loss(self.shared_radius(features, ids, anchor), known[ids].all(1), right_vote, progress)

    def _loss(self, radius: Tensor, known: Tensor, right_vote: Tensor, progress: float) -> Tensor:
        # Radii of what is not finite are 0, as a certificate has to have it; a loss must not call that a tie.
        return self.of_radius(torch.where(known, radius, torch.nan), right_vote, progress)


class RadiusHinge(RadiusLoss):
    """Hinge on the exact certified radius: ``max(0, target − R)`` with ``R`` negative on the wrong side.

    Args:
        target: ℓ2 radius beyond which a triplet is left alone.
        weight_by_agreement: weigh a triplet by ``|2·right_vote − 1|`` instead of counting every majority alike.
        ramp: share of the training over which the target grows from 0; 0 has it in full from the start.
        softness: radius over which the corner of the hinge is rounded, ``softness·softplus((target − R)/softness)``:
            triplets a little beyond the target still count, and large radii grow a little larger; 0 has the corner.

    Raises:
        ValueError: a target that is not positive, a ramp outside [0, 1], or a negative softness.
    """

    def __init__(
        self, target: float = 1.0, weight_by_agreement: bool = False, ramp: float = 0.0, softness: float = 0.0
    ) -> None:
        if not target > 0 or not 0 <= ramp <= 1 or not softness >= 0:
            raise LipsimError(
                f"expected a target > 0, a ramp in [0, 1] and a softness ≥ 0, got {target}, {ramp} and {softness}"
            )
        self.target, self.weight_by_agreement, self.ramp, self.softness = target, weight_by_agreement, ramp, softness

    def of_radius(self, radius: Tensor, right_vote: Tensor, progress: float) -> Tensor:
        target = self.target * min(1.0, progress / self.ramp) if self.ramp else self.target
        return _hinge(radius, target, right_vote, self.weights(right_vote), self.softness)

    def weights(self, right_vote: Tensor) -> Tensor:
        return _agreement(right_vote) if self.weight_by_agreement else super().weights(right_vote)


class CertifiedShare(RadiusLoss):
    """Share of the triplets that are not certified, smoothed, mean over some budgets: what a table counts.

    ``mean_ε sigmoid((ε − R)/temperature)`` with ``R`` negative on the wrong side. Where a hinge goes on pulling at
    triplets that are far on the wrong side, this gives them up, for those that can be had.

    Args:
        budgets: ℓ2 radii ε ≥ 0 at which it counts.
        temperature: radius over which a step is smoothed.

    Raises:
        ValueError: no budgets, one below 0, or a temperature that is not positive.
    """

    def __init__(self, budgets: Sequence[float] = (0.0, 0.14, 0.28, 0.42, 1.0), temperature: float = 0.3) -> None:
        if not budgets or not all(budget >= 0 for budget in budgets) or not temperature > 0:
            raise LipsimError(f"expected budgets ≥ 0 and a temperature > 0, got {list(budgets)} and {temperature}")
        self.budgets, self.temperature = tuple(budgets), temperature

    def of_radius(self, radius: Tensor, right_vote: Tensor, progress: float) -> Tensor:
        radius = torch.sign(1 - 2 * right_vote) * radius
        lacks = [torch.sigmoid((budget - radius) / self.temperature) for budget in self.budgets]
        weight = self.weights(right_vote).to(radius)
        return (weight * torch.stack(lacks).mean(0)).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


class JointRadiusHinge(RadiusHinge):
    """Hinge on the radius of a common budget for all three images; arguments as in :class:`RadiusHinge`.

    Joint radii are 0.3 to 0.4 of those of the reference alone (medians on photographs), so targets want to be smaller.
    """

    def radius(self, z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
        return signed_joint_radius(z, z0, z1, anchor=anchor)


class MarginHinge(TripletLoss):
    """Hinge on ``h = d(x, x1) − d(x, x0)``: DreamSim's (margin 0.05) and LipSim's (0.2 or 0.5) loss.

    Args:
        margin: difference of distances beyond which a triplet is left alone.
        weight_by_agreement: as in :class:`RadiusHinge`.

    Raises:
        ValueError: a margin below 0, which a wrong answer could have.
    """

    def __init__(self, margin: float = 0.05, weight_by_agreement: bool = False) -> None:
        if not margin >= 0:
            raise LipsimError(f"expected a margin ≥ 0, got {margin}")
        self.margin, self.weight_by_agreement = margin, weight_by_agreement

    def __call__(
        self, z: Tensor, z0: Tensor, z1: Tensor, right_vote: Tensor, anchor: float, progress: float = 1.0
    ) -> Tensor:
        h = margin(z, z0, z1, anchor=anchor, least_norm=1e-12)
        return _hinge(h, self.margin, right_vote, self.weights(right_vote))

    def weights(self, right_vote: Tensor) -> Tensor:
        return _agreement(right_vote) if self.weight_by_agreement else super().weights(right_vote)


class DistillationLoss(ABC):
    """A loss between the student's and the teacher's features; NaN and gradients as in :class:`TripletLoss`.

    It may be of the batch as a whole: on several processes each computes it for the images of all.
    """

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, anchor: float, teacher_anchor: float = 0.0) -> Tensor:
        """Scalar loss of ``(N, D)`` student and ``(N, D_t)`` teacher features, and the anchors of both metrics."""


class RMSE(DistillationLoss):
    """Root mean squared error over batch and features, the paper's loss: it ties the student to the teacher's norm.

    Args:
        scale: what the teacher's features are multiplied by. A certified radius grows with the norm of the student's
            features, which for a teacher of unit norm the paper's 1 makes short.

    Raises:
        ValueError: a scale that is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not scale > 0:
            raise LipsimError(f"expected a scale > 0, got {scale}")
        self.scale = scale

    def __call__(self, student: Tensor, teacher: Tensor, anchor: float, teacher_anchor: float = 0.0) -> Tensor:
        _check_dimensions(student, teacher)
        loss: Tensor = _norm(student - self.scale * teacher) / student.numel() ** 0.5
        return loss


class Cosine(DistillationLoss):
    """Mean of ``1 − cos(f(x), t(x))``: the teacher's direction, whatever the norm."""

    def __call__(self, student: Tensor, teacher: Tensor, anchor: float, teacher_anchor: float = 0.0) -> Tensor:
        _check_dimensions(student, teacher)
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


class Relational(DistillationLoss):
    """Relative RMSE between both metrics' cosine distances, anchors included, of all pairs of a batch.

    Any teacher's dimension will do. The student's distances count after their scale is matched to the teacher's (the
    slope of a least-squares line through 0; Park et al. 2019, RKD, divide by means): a 1-Lipschitz map must be free to
    shrink all distances alike. A batch of one or two images has one scale at most to compare, and counts 0.
    """

    def __call__(self, student: Tensor, teacher: Tensor, anchor: float, teacher_anchor: float = 0.0) -> Tensor:
        if len(student) < 3:
            return 0 * student.sum()
        ours, theirs = pairwise_distances(student, anchor), pairwise_distances(teacher, teacher_anchor)
        slope = (ours * theirs).sum() / ours.square().sum().clamp(min=1e-12)
        # A teacher that tells no two images apart has no relations to learn.
        return _norm(slope * ours - theirs) / _norm(theirs).clamp(min=torch.finfo(theirs.dtype).tiny)


class ScaleFree(DistillationLoss):
    """Direction and relations, whatever the norm: :class:`Cosine` and :class:`Relational` as a weighted sum.

    Args:
        direction: weight of the first, 0 for a teacher of another dimension.
        relation: weight of the second.

    Raises:
        ValueError: a negative weight, or nothing but zeros.
    """

    def __init__(self, direction: float = 1.0, relation: float = 1.0) -> None:
        if not (direction >= 0 and relation >= 0 and direction + relation > 0):
            raise LipsimError(f"expected weights ≥ 0, one of them positive, got {direction} and {relation}")
        self.terms = [(w, loss) for w, loss in ((direction, Cosine()), (relation, Relational())) if w]

    def __call__(self, student: Tensor, teacher: Tensor, anchor: float, teacher_anchor: float = 0.0) -> Tensor:
        return torch.stack(
            [weight * loss(student, teacher, anchor, teacher_anchor) for weight, loss in self.terms]
        ).sum()


def _is_known(features: Tensor) -> Tensor:
    return torch.isfinite(features).all(-1)


def _radius_by_pairs(features: Tensor, ids: Tensor, anchor: float) -> Tensor:
    """:func:`signed_reference_radius` of triplets ``(N, 3)`` over few images, from the products of all pairs of these.

    Two products of matrices take the place of a dozen passes over ``(N, D)``. In float64, since the distance of two
    projected images comes from a difference of squares here; where it is below its rounding error they count as equal.
    """
    check_constants(anchor)
    z = features.double()
    unit, constant = project(z, anchor)
    reference, left, right = ids.unbind(1)
    inner = z @ unit.mT
    along = inner[reference, left] - inner[reference, right] + anchor * (constant[left] - constant[right])
    gram = unit @ unit.mT
    norms = gram.diagonal()
    both = norms[left] + norms[right]
    squared = both - 2 * gram[left, right]
    differs = squared > _RELATIVE_ERROR * both.detach()
    slope = torch.where(differs, squared, 1.0).sqrt()
    return (torch.where(differs, along, 0.0) / slope).to(features.dtype)


def _agreement(right_vote: Tensor) -> Tensor:
    return (1 - 2 * right_vote).abs()


def _hinge(value: Tensor, target: float, right_vote: Tensor, weight: Tensor, softness: float = 0.0) -> Tensor:
    weight, lack = weight.to(value), target - torch.sign(1 - 2 * right_vote) * value
    hinge = softness * F.softplus(lack / softness) if softness else F.relu(lack)
    return (weight * hinge).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def pairwise_distances(z: Tensor, anchor: float) -> Tensor:
    """Cosine distances of all pairs out of ``(N, D)``, ``(N(N − 1)/2,)``."""
    p, s = project(_at_least_float32(z), anchor)
    rows, columns = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    return 1 - (_all_products(p, p) + s.unsqueeze(1) * s)[rows, columns]


def info_nce(z: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of ``(N, D)`` embeddings: row ``i`` of one must find row ``i`` of the other."""
    unit, other = (F.normalize(_at_least_float32(features), dim=-1) for features in (z, positive))
    logits = _all_products(unit, other) / temperature
    target = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def _all_products(p: Tensor, q: Tensor) -> Tensor:
    """Inner products of all pairs of rows, whatever autocast and TF32 say: those of unit vectors are near 1.

    In bfloat16 there is nothing between 0.996 and 1, and all near-duplicates would have one distance.
    """
    with full_precision():
        return p @ q.mT


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _norm(tensor: Tensor) -> Tensor:
    """ℓ2 norm of all elements, whose gradient at 0 is 0; that of a root of a mean of squares is NaN there."""
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm


def _check_dimensions(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise LipsimError(
            f"the student has {student.shape[-1]} features and the teacher {teacher.shape[-1]}; set the student's "
            "out_features to the teacher's, follow as many principal_axes of a cache, or distil relations only "
            "(Relational)"
        )
