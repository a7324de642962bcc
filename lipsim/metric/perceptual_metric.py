"""The perceptual metric: an encoder, the geometry of its features, and what it can prove."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lipsim import audit, certificates
from lipsim.audit.arithmetic import ERROR_FACTOR, largest_feature_error
from lipsim.certificates import TwoAFCCertificate, certify_triplets, geometry
from lipsim.certificates.numbers import LARGEST_ANCHOR, check_count, check_number
from lipsim.data.transforms import Preprocess
from lipsim.layers.base import evaluation_mode, freeze
from lipsim.layers.encoder import declared_image_size, dtype_of
from lipsim.metric import inputs, reading
from lipsim.metric.bounds import EncoderBounds
from lipsim.metric.near_duplicates import NearDuplicates
from lipsim.metric.thresholds import Threshold
from lipsim.utils.checks import check_range as _check_range
from lipsim.utils.checks import check_tensor
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision

Reduction = Literal["none", "mean", "sum"]


class PerceptualMetric(nn.Module):
    """Cosine distance between anchored features, with certificates where the encoder has a Lipschitz bound.

    Images are ``(N, 3, S, S)`` in [0, 1], as :meth:`read` makes them of files, arrays and tensors of any size, and
    everything that takes them refuses others with the remedy: a metric answers for pixels up to 255, or from -1 to 1,
    as plausibly as it does for images. Where other points are meant, as in an attack without a box or in training,
    whose batches have been checked, ``check_range=False`` says so (as it has to under :func:`torch.vmap`, where nothing
    has a value).

    Half precision is for distances only: ``metric.half()`` or ``metric.bfloat16()`` takes images in the same dtype, and
    so does autocast; certificates refuse both.

    Args:
        encoder: maps images ``(N, 3, H, W)`` to features ``(N, D)``.
        image_size: side ``H = W`` of its input.
        anchor: constant coordinate ``κ ≥ 0`` appended to the features; 1 makes the distance Lipschitz everywhere.
        lipschitz: a proven bound on the encoder's Lipschitz constant. None: audited here. ``math.inf``: there is none,
            as for a ViT teacher; every radius is 0 then.
        feature_error: largest error of a float32 embedding of images in [0, 1], in feature units, that certificates
            cover; 0: they hold for exact arithmetic only.
        resize: how :attr:`preprocess` brings an image to ``image_size``: see :class:`lipsim.data.Preprocess`.
        framing: what of an image it shows, "stretch", "center-crop" or "pad"; with "tiles" a metric is a
            :class:`lipsim.metric.TiledMetric`.

    Attributes:
        threshold: the distance up to which two images count as the same; None where none was chosen
            (:func:`lipsim.evaluation.thresholds.calibrate`).
        notes: what the file that it is from says besides (JSON); :func:`lipsim.metric.save` keeps it.
        feature_error_kind: "searched" where :attr:`feature_error` is what a search found, enlarged
            (:mod:`lipsim.audit.arithmetic`; it proves nothing), "declared" by whoever set it, or "none".

    Raises:
        lipsim.audit.UnboundedModuleError: ``lipschitz`` is None and the audit cannot bound the encoder.
        ValueError: an argument is out of range.

    Example:
        >>> import lipsim
        >>> metric = lipsim.load("quickstart")
        >>> dark, light, white = (torch.full((1, 3, 64, 64), level) for level in (0.2, 0.3, 1.0))
        >>> bool(metric(dark, light) < metric(dark, white))
        True
        >>> certificate = metric.certify(dark, light, white)
        >>> bool(certificate.prefers_left), bool(certificate.radius > 1)
        (True, True)
        >>> lower, upper = metric.distance_bounds(dark, light, eps=0.1)
        >>> bool(lower <= metric(dark, light)), bool(metric(dark, light) <= upper)
        (True, True)
        >>> metric.embed(dark).shape
        torch.Size([1, 128])
    """

    def __init__(
        self,
        encoder: nn.Module,
        image_size: int,
        anchor: float = 1.0,
        lipschitz: float | None = None,
        feature_error: float = 0.0,
        resize: str = "float",
        framing: str = "stretch",
    ) -> None:
        super().__init__()
        self._near_duplicates = NearDuplicates()
        image_size = check_count("image_size", image_size)
        if (own := declared_image_size(encoder)) is not None and own != image_size:
            raise LipsimError(f"expected the encoder's image_size {own}, got {image_size}")
        if framing == "tiles":
            raise LipsimError("a metric of tiles is lipsim.metric.TiledMetric(metric_of_one_tile, grid)")
        self.encoder = encoder
        self.image_size = image_size
        self.anchor = anchor
        self._bounds = EncoderBounds(lipschitz, feature_error)
        self.feature_error_kind = "declared" if feature_error else "none"
        self.preprocess = Preprocess(image_size, resize, framing)
        self.threshold: Threshold | None = None
        self.notes: dict[str, Any] = {}
        if lipschitz is None:
            self.audit()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder's weights, which images have to have; torch's default where it has none."""
        return dtype_of(self.encoder)

    @property
    def device(self) -> torch.device:
        """Where the encoder's first parameter or buffer is; the CPU where it has none."""
        tensors = itertools.chain(self.encoder.parameters(), self.encoder.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def anchor(self) -> float:
        """The constant coordinate ``κ ≥ 0`` beside the features."""
        return self._anchor

    @anchor.setter
    def anchor(self, anchor: float) -> None:
        self._anchor = check_number("anchor", anchor, most=LARGEST_ANCHOR)

    @property
    def has_bound(self) -> bool:
        """Whether a bound is known, without computing it again."""
        return self._bounds.has_lipschitz

    @property
    def lipschitz(self) -> float:
        """The bound that every radius divides by. Set it to declare another.

        An audited one follows the encoder: it is computed again after any change of its weights, layers, attributes,
        hooks or of :attr:`image_size`, however that was made, and at every use while a part of the encoder is in
        training mode. Telling costs a pass over the weights.
        """
        return self._bounds.lipschitz(self.encoder, self.image_size)

    @lipschitz.setter
    def lipschitz(self, bound: float) -> None:
        self._bounds.declare_lipschitz(bound)

    @property
    def feature_error(self) -> float:
        """The error of one embedding that every certificate covers. Set it to declare another.

        That of a metric from a file is at least what a search finds here, with these weights in their dtype on their
        device (:meth:`require_feature_error`).
        """
        return self._bounds.feature_error(self.encoder, self.image_size)

    @feature_error.setter
    def feature_error(self, error: float) -> None:
        self._bounds.declare_feature_error(error)
        self.feature_error_kind = "declared" if error else "none"

    @property
    def declared_lipschitz(self) -> float | None:
        """The bound where it was declared, ``math.inf`` where there is none; None where it is audited."""
        return self._bounds.declared_lipschitz

    @property
    def declared_feature_error(self) -> float:
        """:attr:`feature_error` as it was given, without a search."""
        return self._bounds.declared_feature_error

    @property
    def certificate_options(self) -> dict[str, float]:
        """Keyword arguments of the functions in :mod:`lipsim.certificates`.

        The error of an embedding counts twice: at the clean image and at the perturbed one.
        """
        lipschitz, feature_error = self._bounds.both(self.encoder, self.image_size)
        return {"anchor": self.anchor, "lipschitz": lipschitz, "feature_error": 2 * feature_error}

    def audit(self) -> audit.LipschitzReport:
        """Bound the encoder with its present weights, and use this bound from now on.

        Raises:
            lipsim.audit.UnboundedModuleError: there is none.
        """
        return self._bounds.audit(self.encoder, self.image_size)

    def require_lipschitz(self, floor: float, source: str = "", *, now: bool = True) -> None:
        """Audit, and never use a bound below ``floor``: what the file of a metric says about it.

        Args:
            floor: the bound.
            source: what to call the file where it is refused, since its weights have more; empty: nothing is claimed.
            now: audit here, and not at the first use of the bound.

        Raises:
            lipsim.audit.UnboundedModuleError: there is no bound.
            ValueError: the weights exceed the claim by more than :data:`lipsim.metric.bounds.CLAIM_TOLERANCE`.
        """
        self._bounds.require_lipschitz(floor, self.encoder, self.image_size, source, now=now)

    def require_feature_error(self, floor: float) -> None:
        """Search for the error of an embedding at the first certificate, and cover ``floor`` at least.

        What the file of a metric says about it cannot be less than what is found here.
        """
        self._bounds.require_feature_error(floor)
        self.feature_error_kind = "searched"

    def measure_feature_error(
        self, images: Tensor | None = None, *, thorough: bool = True, factor: float = ERROR_FACTOR
    ) -> float:
        """Search for the largest error of an embedding on images in [0, 1], and enlarge it; it proves nothing.

        What it returns can be declared as :attr:`feature_error`; nothing is declared here.

        Args:
            images: ``(N, 3, image_size, image_size)``, looked at besides those of the search.
            thorough: see :func:`lipsim.audit.arithmetic.largest_feature_error`.
            factor: by which the largest error found is enlarged; 1 for what was found.

        Raises:
            ValueError: features that are not finite, no images of this metric, or a factor below 1.
        """
        check_number("factor", factor, least=1)
        if images is not None:
            self.check_images(images)
        return factor * largest_feature_error(self.encoder, self.image_size, images, thorough=thorough)

    def frozen_copy(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """A copy in evaluation mode with folded weights and no gradient to them: for attacks, which take many passes.

        Args:
            dtype: of its weights; None: as here. Derived weights are derived again in this dtype.
            device: where it is; None: as here.
        """
        copy = deepcopy(self).requires_grad_(False)
        if dtype is not None:
            copy.to(dtype)
        if device is not None:
            copy.to(device)
        freeze(copy)
        return copy

    def embed(self, x: Tensor, *, check_range: bool = True) -> Tensor:
        """Features ``f(x)``, ``(N, D)``, before anchor and projection.

        Args:
            x: images ``(N, 3, image_size, image_size)`` in [0, 1].
            check_range: False takes any real numbers.

        Raises:
            ValueError: ``x`` is no such tensor.
        """
        self.check_images(x, check_range=check_range)
        if any(getattr(module, "inplace", False) for module in self.encoder.modules()):
            x = x.clone()  # the first layer, or one behind views of the images, would change the caller's
        return self._features(x)

    def _features(self, *images: Tensor) -> Tensor:
        """What the encoder makes of images, all in one batch.

        Raises:
            ValueError: no features ``(N, D)``.
        """
        x = torch.cat(images) if len(images) > 1 else images[0]
        z: Tensor = self.encoder(x)
        if z.ndim != 2:
            raise LipsimError(
                f"expected features (N, D) of the encoder, got {tuple(z.shape)}; end it with nn.Flatten()"
            )
        return z

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        reduction: Reduction | None = "none",
        normalize: bool = False,
        check_range: bool = True,
    ) -> Tensor:
        """Distances ``(N,)`` in [0, 2] between images ``(N, 3, H, W)`` in [0, 1], or their mean or sum.

        Those who come from other metrics: LPIPS takes [-1, 1] unless it is told ``normalize=True``, which there means
        images in [0, 1], and returns ``(N, 1, 1, 1)``; torchmetrics' LPIPS reads ``normalize`` likewise and returns the
        mean. DreamSim takes [0, 1] and returns ``(N,)``, as here. So what is ``lpips(x, y)`` on images in [-1, 1] is
        ``metric(x, y, normalize=True)``, and what is ``lpips(x, y, normalize=True)`` is ``metric(x, y)``.

        Without gradients, an audited metric in float32 computes distances below 0.01 in float64: they are the same in
        any batch to a relative 1e-5, and 0 between equal images. As a loss it does not: half a dozen digits of a tiny
        distance are no better gradient.

        Args:
            x: images.
            y: images to compare them with, each with its own or with the only one.
            reduction: "none" (or None), "mean" or "sum".
            normalize: the images are in [-1, 1], and are brought to [0, 1] here.
            check_range: False takes any real numbers, and looks at no value.

        Raises:
            ValueError: one is no such tensor, their numbers differ, or an unknown reduction.
        """
        if reduction not in (None, "none", "mean", "sum"):
            raise LipsimError(f"expected reduction 'none', 'mean' or 'sum', got {reduction!r}")
        for images in (x, y):
            self.check_images(images, check_range=False)
            if check_range:
                _check_range(images, signed=normalize)
        inputs.check_paired(x, y)
        if normalize:
            x, y = (x + 1) / 2, (y + 1) / 2
        z, z_other = self._features(x, y).split([len(x), len(y)])
        distance = geometry.cosine_distance(z, z_other, self.anchor)
        if check_range and self.declared_lipschitz is None:  # of layers that are known to compute in float64
            distance = self._near_duplicates.refine(distance, self.encoder, x, y, self.anchor)
        return distance.mean() if reduction == "mean" else distance.sum() if reduction == "sum" else distance

    def read(self, images: reading.Image | Iterable[reading.Image]) -> Tensor:
        """Images of any size and kind as the input of this metric, ``(N, 3, S, S)`` on its device and in its dtype.

        Each goes through :attr:`preprocess`. Files and 8-bit images are treated alike: an array gives what its PNG
        file does. Floating-point tensors keep their gradient.

        Args:
            images: one, or a list (any iterable) of: the path of a file; a PIL image; an array or tensor ``(H, W)``,
                ``(H, W, C)``, ``(C, H, W)`` or a batch of these with four dimensions, of 8 or 16 bits or
                floating-point in [0, 1]. ``C`` is 1 (gray), 3, or 4, whose transparency is composited over white.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: one cannot be read, or its layout is not clear; the message says which.

        Example:
            >>> import lipsim, numpy
            >>> metric = lipsim.load("quickstart")
            >>> metric.read([numpy.zeros((300, 200, 3), dtype=numpy.uint8), torch.rand(3, 90, 90)]).shape
            torch.Size([2, 3, 64, 64])
        """
        return reading.read(images, self.preprocess, self.device, self.dtype)

    @torch.no_grad()
    def certify(self, reference: Tensor, left: Tensor, right: Tensor, *, check_range: bool = True) -> TwoAFCCertificate:
        """Answer N triplets ``(N, 3, H, W)`` and certify the answers, in full precision.

        The certified answer is that of the returned ``prefers_left``, whose geometry runs in float64. The images
        have to be in [0, 1], the range that :attr:`feature_error` was found on; ``check_range=False`` takes any points
        where that is 0, and the certificate one of exact arithmetic.

        Raises:
            ValueError: different numbers of images, a wrong shape, values outside [0, 1], or half precision.
        """
        self.check_certifiable(reference, left, right, check_range=check_range)
        if not len(reference) == len(left) == len(right):
            raise LipsimError(
                f"expected as many candidates as references, got {len(reference)}, {len(left)}, {len(right)}"
            )
        with full_precision(), evaluation_mode(self.encoder):
            z, z0, z1 = self._features(reference, left, right).chunk(3)
        return self.certify_features(reference, z, z0, z1)

    @torch.no_grad()
    def certify_features(self, reference: Tensor, z: Tensor, z0: Tensor, z1: Tensor) -> TwoAFCCertificate:
        """:meth:`certify` from features ``(N, D)`` that are known already; the geometry runs in float64.

        Raises:
            ValueError: weights or features in half precision.
        """
        self.check_precision(z, z0, z1)
        return certify_triplets(reference, z, z0, z1, **self.certificate_options)

    def reference_radius(self, z: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        """Certified radius ``(N,)`` of the reference from features ``(N, D)``, in float64; 0 without a bound.

        Raises:
            ValueError: weights or features in half precision.
        """
        self.check_precision(z, z0, z1)
        return certificates.reference_radius(z.double(), z0.double(), z1.double(), **self.certificate_options)

    def margin(self, z: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        """Margin ``h = d(x, x1) − d(x, x0)`` from features ``(N, D)``, in float64: positive where left is nearer.

        ``h = g/‖e‖``: no cancellation between two distances, and exactly 0 for equal candidates.
        """
        return certificates.margin(z.double(), z0.double(), z1.double(), anchor=self.anchor)

    @torch.no_grad()
    def distance_bounds(self, x: Tensor, y: Tensor, eps: float, *, check_range: bool = True) -> tuple[Tensor, Tensor]:
        """Interval ``(lower, upper)``, ``(N,)`` each, that holds ``d(x + δ, y)`` for every ``‖δ‖₂ ≤ eps``.

        ``check_range`` as in :meth:`certify`.

        Raises:
            ValueError: no images ``(N, 3, H, W)`` in [0, 1], different numbers of them, neither of which is 1, a
                negative budget, or half precision.
        """
        self.check_certifiable(x, y, check_range=check_range)
        inputs.check_paired(x, y)
        with full_precision(), evaluation_mode(self.encoder):
            z, z_other = self._features(x, y).split([len(x), len(y)])
        return certificates.distance_interval(z.double(), z_other.double(), eps, **self.certificate_options)

    def check_precision(self, *tensors: Tensor) -> None:
        """Refuse weights that nothing can be certified with, and images or features that an encoder without any passes.

        Raises:
            ValueError: a parameter, a buffer or one of ``tensors`` in half precision.
        """
        inputs.check_precision(self, *tensors)

    def check_certifiable(self, *images: Tensor, check_range: bool) -> None:
        """Refuse images that no certificate of this metric is about.

        Raises:
            ValueError: no images of this metric, values outside [0, 1] where they count, or half precision.
        """
        for x in images:
            check_tensor(x)
        self.check_precision(*images)
        in_range = check_range or self.feature_error > 0
        for x in images:
            self.check_images(x, check_range=False)
            if in_range:
                inputs.check_certifiable_range(x, asked=check_range)

    def check_images(self, x: Tensor, *, check_range: bool = True) -> None:
        """Refuse what are no images of this metric.

        Raises:
            ValueError: ``x`` is not ``(N, 3, image_size, image_size)`` of floating-point numbers in [0, 1].
        """
        inputs.check_embeddable(self.encoder, self.image_size, x)
        if check_range:
            _check_range(x)
