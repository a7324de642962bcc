"""One metric for what is far apart and another for what is near: their sum, in which the second one saturates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lipsim import certificates
from lipsim.certificates import Term, TwoAFCCertificate
from lipsim.certificates.sums import check_weight_and_scale, saturate
from lipsim.data.transforms import Preprocess
from lipsim.layers.base import evaluation_mode
from lipsim.metric import reading
from lipsim.metric.combinations import check_alike
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


class SaturatingSum(nn.Module):
    """``D(x, y) = d₁(x, y) + λ·(1 − exp(−d₂(x, y)/τ))``: two certified metrics in one distance, without training.

    Two photographs of different things are far apart in any metric of texture, and which of two is a little farther is
    noise to one that knows what they show. Here the second metric is nearly constant beyond a few ``τ``, so that the
    first one decides there, and decides with the second where images are near: what ``photos`` knows of content and
    ``scattering`` of appearance, with hardly a point of either lost (``docs/sums.md``). :func:`lipsim.metric.join`
    mixes them at every distance.

    It has no features, and is no :class:`PerceptualMetric`: attacks and tables take it as any distance, and its answers
    and distances are certified from the bounds of both parts (:mod:`lipsim.certificates.sums`). It has no weights of
    its own; keep the files of the two metrics and both numbers. Without a bound of one of the two every radius is 0.

    Args:
        first: the metric ``d₁`` of what is far apart.
        second: the metric ``d₂`` of what is near, which sees images in the same way.
        weight: ``λ``, what the second adds at most.
        scale: ``τ``, the distance ``d₂`` where it has added 63 % of that. Distances by ``scattering`` are around 0.3
            between photographs, and around 0.06 between pictures of one object in two materials.

    Raises:
        ValueError: metrics of other images than each other's or of tiles, in other dtypes or in half precision, on
            other devices, a negative weight or a scale below 1e-6.

    Example:
        >>> import lipsim
        >>> metric = SaturatingSum(lipsim.load("photos"), lipsim.load("scattering"))
        >>> dark, light, white = (torch.full((1, 3, 64, 64), level) for level in (0.2, 0.3, 1.0))
        >>> bool(metric(dark, light) < metric(dark, white))
        True
        >>> certificate = metric.certify(dark, light, white)
        >>> bool(certificate.prefers_left), bool(certificate.radius > 1)
        (True, True)
        >>> lower, upper = metric.distance_bounds(dark, light, eps=0.1)
        >>> bool(lower <= metric(dark, light)), bool(metric(dark, light) <= upper)
        (True, True)
    """

    def __init__(
        self, first: PerceptualMetric, second: PerceptualMetric, weight: float = 8.0, scale: float = 0.03
    ) -> None:
        super().__init__()
        check_alike(first, second)
        self.first, self.second = first, second
        self.weight, self.scale = check_weight_and_scale(weight, scale)

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self.first.image_size

    @property
    def preprocess(self) -> Preprocess:
        """PIL image → ``(3, S, S)`` tensor in [0, 1], as of both metrics."""
        return self.first.preprocess

    @property
    def device(self) -> torch.device:
        """Where the metrics are."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the metrics, which images have to have."""
        return self.first.dtype

    @property
    def has_bound(self) -> bool:
        """Whether both metrics have a bound."""
        return self.first.has_bound and self.second.has_bound

    @property
    def certificate_options(self) -> dict[str, float]:
        """The larger anchor, bound and error of embeddings of both, each of which is certified with its own."""
        first, second = self.first.certificate_options, self.second.certificate_options
        return {name: max(value, second[name]) for name, value in first.items()}

    def check_precision(self, *tensors: Tensor) -> None:
        """Refuse weights that nothing can be certified with, see :meth:`PerceptualMetric.check_precision`."""
        for metric in (self.first, self.second):
            metric.check_precision(*tensors)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"weight={self.weight:g}, scale={self.scale:g}"

    def forward(self, x: Tensor, y: Tensor, *, check_range: bool = True) -> Tensor:
        """Distances ``(N,)`` in ``[0, 2 + λ]`` between images ``(N, 3, S, S)`` in [0, 1]; differentiable.

        Args:
            x: images.
            y: images to compare them with, each with its own or with the only one.
            check_range: False takes any real numbers.

        Raises:
            ValueError: one is no such tensor, or their numbers differ.
        """
        first, second = (metric(x, y, check_range=check_range) for metric in (self.first, self.second))
        distance: Tensor = first + self.weight * saturate(second, self.scale)
        return distance

    def read(self, images: reading.Image | Iterable[reading.Image]) -> Tensor:
        """Images of any size and kind as the input of this metric, see :meth:`PerceptualMetric.read`."""
        return self.first.read(images)

    @torch.no_grad()
    def certify(self, reference: Tensor, left: Tensor, right: Tensor, *, check_range: bool = True) -> TwoAFCCertificate:
        """Answer N triplets ``(N, 3, S, S)`` and certify the answers, see :func:`lipsim.certificates.certify_sum`.

        Raises:
            ValueError: as of :meth:`PerceptualMetric.certify`.
        """
        for metric in (self.first, self.second):
            metric.check_certifiable(reference, left, right, check_range=check_range)
        if not len(reference) == len(left) == len(right):
            raise LipsimError(
                f"expected as many candidates as references, got {len(reference)}, {len(left)}, {len(right)}"
            )
        images = torch.cat([reference, left, right])
        first, second = (_term(metric, images) for metric in (self.first, self.second))
        return certificates.certify_sum(reference, first, second, weight=self.weight, scale=self.scale)

    @torch.no_grad()
    def distance_bounds(self, x: Tensor, y: Tensor, eps: float, *, check_range: bool = True) -> tuple[Tensor, Tensor]:
        """Interval ``(lower, upper)``, ``(N,)`` each, that holds ``D(x + δ, y)`` for every ``‖δ‖₂ ≤ eps``.

        Raises:
            ValueError: as of :meth:`PerceptualMetric.distance_bounds`.
        """
        first, second = (m.distance_bounds(x, y, eps, check_range=check_range) for m in (self.first, self.second))
        return certificates.sum_interval(first, second, weight=self.weight, scale=self.scale)


def _term(metric: PerceptualMetric, images: Tensor) -> Term:
    with full_precision(), evaluation_mode(metric.encoder):
        z, z0, z1 = metric.encoder(images.clone()).chunk(
            3
        )  # a layer may work in place, and the other metric reads them
    return Term(z, z0, z1, **metric.certificate_options)
