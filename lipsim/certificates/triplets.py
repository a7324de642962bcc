"""The certificate of answers to triplets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from lipsim.certificates.decisions import candidate_radii, margin, reference_radius
from lipsim.certificates.joint import joint_radius
from lipsim.certificates.pixels import certified_pixels
from lipsim.certificates.rounding import Features, anchored


@dataclass(frozen=True)
class TwoAFCCertificate:
    """The answers to N triplets and how far each cannot change. All fields are ``(N,)``; radii are ℓ2, in input pixels.

    Attributes:
        prefers_left: bool; False on a tie, where every radius is 0.
        margin: ``h = d(x, x1) − d(x, x0)``, positive where left is nearer.
        radius: no change of the *reference* shorter than this changes the answer.
        left_radius: the same for the left image.
        right_radius: the same for the right image.
        joint_radius: the same when all three move, each by less than this.
        pixels: int64, how many pixels of the reference may take any colour.
    """

    prefers_left: Tensor
    margin: Tensor
    radius: Tensor
    left_radius: Tensor
    right_radius: Tensor
    joint_radius: Tensor
    pixels: Tensor

    def to(self, *args: Any, **kwargs: Any) -> TwoAFCCertificate:
        """Move every tensor to a device."""
        return TwoAFCCertificate(*(getattr(self, field.name).to(*args, **kwargs) for field in fields(self)))


def certify_triplets(
    reference: Tensor,
    z: Features,
    z0: Features,
    z1: Features,
    *,
    anchor: float = 1.0,
    lipschitz: float = 1.0,
    feature_error: float = 0.0,
) -> TwoAFCCertificate:
    """The certificate of N answers, in float64 from one projection of each feature set.

    Args:
        reference: images ``(N, 3, H, W)`` in [0, 1].
        z: features ``(N, D)`` of the references, or :class:`lipsim.certificates.geometry.Anchored` ones.
        z0: of the left images.
        z1: of the right images.
        anchor: constant coordinate beside the features.
        lipschitz: bound of the encoder.
        feature_error: that the radii cover.

    Example:
        >>> import torch
        >>> z, z0, z1 = (torch.tensor([point]) for point in ([3.0, 4.0], [1.0, 0.0], [0.0, 1.0]))
        >>> certificate = certify_triplets(torch.full((1, 3, 2, 2), 0.5), z, z0, z1)
        >>> print(bool(certificate.prefers_left), f"{certificate.radius.item():.4f}")
        False 0.7071
    """
    options = {"anchor": anchor, "lipschitz": lipschitz, "feature_error": feature_error}
    _, (e, e0, e1) = anchored(anchor, z, z0, z1)
    found = margin(e, e0, e1, anchor=anchor)
    radius = reference_radius(e, e0, e1, **options)
    left_radius, right_radius = candidate_radii(e, e0, e1, **options)
    return TwoAFCCertificate(
        prefers_left=found > 0,
        margin=found,
        radius=radius,
        left_radius=left_radius,
        right_radius=right_radius,
        joint_radius=joint_radius(e, e0, e1, **options),
        pixels=certified_pixels(reference, radius),
    )
