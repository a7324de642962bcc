"""The perceptual metric: an encoder, the geometry of its features, and what it can prove."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lipsim import audit, certificates, geometry
from lipsim.data.transforms import Preprocess
from lipsim.layers.base import evaluation_mode
from lipsim.layers.fingerprint import Fingerprint, fingerprint
from lipsim.precision import full_precision


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


class PerceptualMetric(nn.Module):
    """Cosine distance between anchored features, with certificates where the encoder has a Lipschitz bound.

    Args:
        encoder: maps images ``(N, 3, H, W)`` to features ``(N, D)``.
        image_size: side ``H = W`` of its input.
        anchor: constant coordinate ``κ ≥ 0`` appended to the features; 1 makes the distance Lipschitz everywhere.
        lipschitz: a proven bound on the encoder's Lipschitz constant. None: audited here. ``math.inf``: there is none,
            as for a ViT teacher; every radius is 0 then.
        feature_error: largest error of a float32 embedding, in feature units, that certificates cover.
        resize: how :attr:`preprocess` brings an image to ``image_size``: see :class:`lipsim.data.Preprocess`.

    Raises:
        lipsim.audit.UnboundedModuleError: ``lipschitz`` is None and the audit cannot bound the encoder.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        image_size: int,
        anchor: float = 1.0,
        lipschitz: float | None = None,
        feature_error: float = 0.0,
        resize: str = "float",
    ) -> None:
        super().__init__()
        if not anchor >= 0:
            raise ValueError(f"expected an anchor ≥ 0, got {anchor}")
        if lipschitz is not None and not lipschitz > 0:
            raise ValueError(f"expected a Lipschitz bound > 0, got {lipschitz}")
        if not 0 <= feature_error < math.inf:
            raise ValueError(f"expected a feature_error ≥ 0, got {feature_error}")
        self.encoder = encoder
        self.image_size = image_size
        self.anchor = anchor
        self.feature_error = feature_error
        self.preprocess = Preprocess(image_size, resize)
        self._lipschitz = lipschitz
        self._floor = 0.0
        self._audited: Fingerprint | None = (
            None  # what the encoder was when it was audited; None: the bound is declared
        )
        if lipschitz is None:
            self.audit()

    @property
    def has_bound(self) -> bool:
        """Whether a bound is known, without computing it again."""
        return self._lipschitz != math.inf

    @property
    def lipschitz(self) -> float:
        """The bound that every radius divides by. Set it to declare another.

        An audited one follows the encoder: it is computed again after any change of its weights, layers, attributes,
        hooks or of :attr:`image_size`, however that was made, and at every use while a part of the encoder is in
        training mode. Telling costs a pass over the weights.
        """
        if self._lipschitz is None or (self._audited is not None and not self._audit_holds()):
            self.audit()
        assert self._lipschitz is not None
        return max(self._lipschitz, self._floor)

    @lipschitz.setter
    def lipschitz(self, bound: float) -> None:
        if not bound > 0:
            raise ValueError(f"expected a Lipschitz bound > 0, got {bound}")
        self._lipschitz, self._audited, self._floor = bound, None, 0.0

    def require_lipschitz(self, floor: float) -> None:
        """Audit, and never use a bound below ``floor``: what the file of a metric says about it."""
        self.audit()
        self._floor = floor

    def embed(self, x: Tensor) -> Tensor:
        """Features ``f(x)``, ``(N, D)``, before anchor and projection.

        Raises:
            ValueError: ``x`` is not ``(N, 3, image_size, image_size)``.
        """
        self.check_shape(x)
        if any(getattr(module, "inplace", False) for module in self.encoder.modules()):
            x = x.clone()  # the first layer, or one behind views of the images, would change the caller's
        return self.encoder(x)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(N,)`` in [0, 2] between images ``(N, 3, H, W)``."""
        self.check_shape(x)
        self.check_shape(y)
        z, z_other = self.embed(torch.cat([x, y])).split([len(x), len(y)])
        return geometry.cosine_distance(z, z_other, self.anchor)

    @torch.no_grad()
    def certify(self, reference: Tensor, left: Tensor, right: Tensor) -> TwoAFCCertificate:
        """Answer N triplets ``(N, 3, H, W)`` and certify the answers, in full precision.

        The certified answer is that of the returned ``prefers_left``, whose geometry runs in float64.

        Raises:
            ValueError: different numbers of images, a wrong shape, or weights or images in half precision.
        """
        for images in (reference, left, right):
            self.check_shape(images)
        if not len(reference) == len(left) == len(right):
            raise ValueError(
                f"expected as many candidates as references, got {len(reference)}, {len(left)}, {len(right)}"
            )
        self.check_precision(reference, left, right)
        with full_precision(), evaluation_mode(self.encoder):
            z, z0, z1 = self.embed(torch.cat([reference, left, right])).chunk(3)
        return self.certify_features(reference, z, z0, z1)

    @torch.no_grad()
    def certify_features(self, reference: Tensor, z: Tensor, z0: Tensor, z1: Tensor) -> TwoAFCCertificate:
        """:meth:`certify` from features ``(N, D)`` that are known already; the geometry runs in float64.

        Raises:
            ValueError: weights or features in half precision.
        """
        self.check_precision(z, z0, z1)
        z, z0, z1 = z.double(), z0.double(), z1.double()
        options = self.certificate_options
        radius = certificates.reference_radius(z, z0, z1, **options)
        left_radius, right_radius = certificates.candidate_radii(z, z0, z1, **options)
        margin = self.margin(z, z0, z1)
        return TwoAFCCertificate(
            prefers_left=margin > 0,
            margin=margin,
            radius=radius,
            left_radius=left_radius,
            right_radius=right_radius,
            joint_radius=certificates.joint_radius(z, z0, z1, **options),
            pixels=certificates.certified_pixels(reference, radius),
        )

    def reference_radius(self, z: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        """Certified radius ``(N,)`` of the reference from features ``(N, D)``, in float64; 0 without a bound."""
        return certificates.reference_radius(z.double(), z0.double(), z1.double(), **self.certificate_options)

    def margin(self, z: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        """Margin ``h = d(x, x1) − d(x, x0)`` from features ``(N, D)``, in float64: positive where left is nearer.

        ``h = g/‖e‖``: no cancellation between two distances, and exactly 0 for equal candidates.
        """
        z, z0, z1 = z.double(), z0.double(), z1.double()
        return certificates.linear_margin(z, z0, z1, anchor=self.anchor)[0] / geometry.anchored_norm(z, self.anchor)

    @torch.no_grad()
    def distance_bounds(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Interval ``(lower, upper)``, ``(N,)`` each, that holds ``d(x + δ, y)`` for every ``‖δ‖₂ ≤ eps``."""
        self.check_precision(x, y)
        with full_precision(), evaluation_mode(self.encoder):
            z, z_other = self.embed(torch.cat([x, y])).split([len(x), len(y)])
        return certificates.distance_interval(z.double(), z_other.double(), eps, **self.certificate_options)

    @property
    def certificate_options(self) -> dict[str, float]:
        """Keyword arguments of the functions in :mod:`lipsim.certificates`.

        The error of an embedding counts twice: at the clean image and at the perturbed one.
        """
        return {"anchor": self.anchor, "lipschitz": self.lipschitz, "feature_error": 2 * self.feature_error}

    def audit(self) -> audit.LipschitzReport:
        """Bound the encoder with its present weights, and use this bound from now on.

        Raises:
            lipsim.audit.UnboundedModuleError: there is none.
        """
        content = self._content()  # before: a change during the audit must not be taken for what was audited
        report = audit.lipschitz_bound(self.encoder, self.image_size)
        self._lipschitz, self._audited = report.total, content
        return report

    def _audit_holds(self) -> bool:
        in_training = any(module.training for module in self.encoder.modules())
        return not in_training and self._audited == self._content()

    def _content(self) -> Fingerprint:
        return fingerprint(self.encoder, self.image_size)

    def check_precision(self, *inputs: Tensor) -> None:
        """Refuse weights that nothing can be certified with, and images or features that an encoder without any passes.

        Raises:
            ValueError: a parameter, a buffer or one of the inputs in half precision.
        """
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if _is_half(tensor):
                raise ValueError(f"{name} is stored in half precision; certify with weights in float32 or float64")
        for tensor in inputs:
            if _is_half(tensor):
                raise ValueError(
                    f"expected images or features in float32 or float64 to certify, got {tensor.dtype}, whose rounding "
                    "no certificate covers; convert the images with .float() and embed them again"
                )

    def check_shape(self, x: Tensor) -> None:
        """Refuse what are no images of this metric.

        Raises:
            ValueError: ``x`` is not ``(N, 3, image_size, image_size)``.
        """
        expected = (3, self.image_size, self.image_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(
                f"expected images of shape (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}; "
                "metric.preprocess brings an image to this size"
            )


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
