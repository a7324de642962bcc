"""Randomized smoothing of a metric, with or without a bound: certificates that hold with a stated probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lipsim import certificates
from lipsim.certificates import Anchored, geometry
from lipsim.certificates.numbers import check_count, check_number
from lipsim.certificates.smoothing import SmoothedCertificate, certify_counts, smoothed_mean_interval
from lipsim.layers.base import evaluation_mode
from lipsim.metric.distance import require_metric
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.checks import check_tensor
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import sample_stream

Moving = Literal["reference", "left", "right", "all"]
IMAGES = ("reference", "left", "right")
_SHARED_IMAGES = 1 << 14  # noisy images at once whose features are kept, twice 160 MiB of 1,280 in float64


class SmoothedMetric:
    """The answers that a metric gives most often under Gaussian noise, and how far they cannot change.

    Works with every metric, as nothing about it is used but its answers (Cohen et al. 2019; see
    :mod:`lipsim.certificates.smoothing`). What is certified is the smoothed answer, and each certificate is wrong with
    a probability of at most ``alpha``, over the draws of noise: of a thousand certificates at 0.001 one may be. A
    statement about all of ``N`` at once takes ``alpha / N``.

    The noise is drawn in float64 on the CPU from a generator of the seed and the index of the sample, and added there,
    so that draws depend neither on batches and processes nor on the device. Each triplet is embedded on its own, in
    full precision, so that nothing else in a batch has a part in its answer.

    Args:
        metric: the metric.
        sigma: standard deviation of the noise on each value of an image, above 0. A larger one certifies farther, up to
            where the metric cannot read images under the noise any more.
        samples: draws that certify an answer; the largest radius is ``σ·Φ⁻¹(α^(1/samples))``.
        selection: other draws, which choose the answer.
        alpha: probability, for each answer, that its certificate is wrong.
        seed: of the noise.
        moving: the image that may change, and has the noise: "reference", "left", "right", or "all" three at once. The
            radius of "all" is that of each image, and the stack of the three moves by up to √3 times as much.
        batch_size: noisy images at once, which is what memory goes by. (Float32 features may differ in the last digit
            between batches of different sizes, and the answers of near ties with them.)

    Raises:
        ValueError: an argument is out of range, or the metric is none.

    Example:
        >>> import lipsim
        >>> metric = lipsim.load("quickstart")
        >>> dark, light, white = (torch.full((1, 3, 64, 64), level) for level in (0.2, 0.3, 1.0))
        >>> smoothed = SmoothedMetric(metric, sigma=0.25, samples=100, selection=10)
        >>> certificate = smoothed.certify(dark, light, white)
        >>> print(bool(certificate.prefers_left), certificate.counts.tolist(), f"{certificate.radius.item():.3f}")
        True [[100, 0, 0]] 0.375
        >>> smoothed.passes  # images embedded for one answer, the two candidates included
        112
    """

    def __init__(
        self,
        metric: PerceptualMetric,
        sigma: float,
        samples: int = 1000,
        selection: int = 100,
        alpha: float = 0.001,
        seed: int = 0,
        moving: Moving = "reference",
        batch_size: int = 128,
    ) -> None:
        require_metric(metric)
        self.metric = metric
        self.sigma = check_number("sigma", sigma, above=True)
        self.samples = check_count("samples", samples)
        self.selection = check_count("selection", selection)
        self.alpha = check_alpha(alpha)
        self.seed = check_count("seed", seed, least=0)
        self.moving: Moving = check_moving(moving)
        self.batch_size = check_count("batch_size", batch_size)

    @property
    def passes(self) -> int:
        """How many images are embedded for one answer; an exact certificate takes three."""
        draws = self.selection + self.samples
        return 3 * draws if self.moving == "all" else draws + 2

    @torch.no_grad()
    def certify(
        self,
        reference: Tensor,
        left: Tensor,
        right: Tensor,
        *,
        index: Tensor | Sequence[int] | None = None,
        check_range: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> SmoothedCertificate:
        """Answer N triplets ``(N, 3, H, W)`` and certify the answers, one after the other.

        Args:
            reference: images in [0, 1].
            left: the first candidates.
            right: the second candidates.
            index: ``(N,)``, the number of each triplet, which its noise depends on; None counts from 0.
            check_range: False takes any real numbers for images.
            advance: called with how many more noisy images have been embedded.

        Raises:
            ValueError: different numbers of images, a wrong shape, values outside [0, 1], or half precision.
        """
        images = (reference, left, right)
        indices = self._check(images, index, check_range)
        counts = torch.zeros(2, len(reference), 3, dtype=torch.int64)
        with full_precision(), evaluation_mode(self.metric.encoder):
            for row, i in enumerate(indices):
                margins = self._margins([x[row] for x in images], i, advance)
                for part, found in zip(counts, margins.split([self.selection, self.samples]), strict=True):
                    part[row] = _votes(found)
        return self._certified(counts[0], counts[1], self.moving)

    @torch.no_grad()
    def certify_shared(
        self,
        images: Tensor,
        ids: Tensor,
        *,
        moving: Moving | Sequence[Moving] = (),
        index: Tensor | Sequence[int] | None = None,
        check_range: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[SmoothedCertificate, ...]:
        """Answer N triplets over M images, each of which has its noise once for all the triplets that it is in.

        Studies ask many questions about few images: so ``M·(n + n0)`` noisy images are embedded for all the triplets
        and all of ``moving``, in the place of ``n + n0`` or three times as many for each triplet. Each certificate
        holds as one of :meth:`certify` does, with probability ``1 − α``; but where triplets share images, their
        certificates are wrong together more often than by chance, and so are their scores.

        Args:
            images: ``(M, 3, H, W)`` in [0, 1].
            ids: ``(N, 3)`` int64, the rows of reference, left and right.
            moving: what may change, one name or several, with a certificate for each; :attr:`moving` alone, without.
            index: ``(M,)``, the number of each image, which its noise depends on, all different; None counts from 0.
            check_range: as in :meth:`certify`.
            advance: called with how many more noisy images have been embedded.

        Raises:
            ValueError: as :meth:`certify`; no such rows; or all three images of a triplet move and one is there twice,
                so that its noise would be the same.
        """
        names = (moving,) if isinstance(moving, str) else moving
        chosen = [check_moving(name) for name in names] or [self.moving]
        indices = self._check((images,), index, check_range)
        _check_shared(ids, indices, apart="all" in chosen)
        ids = ids.cpu()
        columns = [[column for column, name in enumerate(IMAGES) if of in (name, "all")] for of in chosen]
        noisy = ids[:, sorted({column for some in columns for column in some})].unique().tolist()
        clean = ids[:, [column for column in range(len(IMAGES)) if any(column not in some for some in columns)]]
        streams = {row: sample_stream(self.seed, indices[row]) for row in noisy}
        counts = torch.zeros(len(chosen), 2, len(ids), 3, dtype=torch.int64)
        with full_precision(), evaluation_mode(self.metric.encoder):
            still = {row: self._anchored(images[row : row + 1].clone()) for row in clean.unique().tolist()}
            at_once = max(1, min(self.batch_size, _SHARED_IMAGES // max(1, len(noisy))))
            for stage, draws in enumerate((self.selection, self.samples)):
                for start in range(0, draws, at_once):
                    size = min(at_once, draws - start)
                    moved = {}
                    for row, stream in streams.items():
                        (x,) = self._noisy([images[row]], stream, size)
                        moved[row] = self._anchored(x[0])
                        if advance is not None:
                            advance(size)
                    for of, some in enumerate(columns):
                        for n, triplet in enumerate(ids.tolist()):
                            parts = [(moved if c in some else still)[row] for c, row in enumerate(triplet)]
                            margin = certificates.margin(*parts, anchor=self.metric.anchor)
                            counts[of, stage, n] += _votes(margin)
        return tuple(self._certified(found[0], found[1], name) for found, name in zip(counts, chosen, strict=True))

    @torch.no_grad()
    def distance_bounds(
        self,
        x: Tensor,
        y: Tensor,
        eps: float,
        *,
        index: Tensor | Sequence[int] | None = None,
        check_range: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Interval ``(lower, upper)``, ``(N,)``, of the smoothed distance of ``x + δ`` from ``y``, ``‖δ‖₂ ≤ eps``.

        The smoothed distance is the mean of ``d(x + σZ, y)``, so 1 minus it is the mean cosine similarity of noisy
        copies of ``x`` to ``y``; it is not 0 from an image to itself. Each interval holds with probability ``1 − α``.
        (:attr:`samples` draws of noise on ``x``, whatever :attr:`moving` says.)

        Args:
            x: images ``(N, 3, H, W)`` in [0, 1].
            y: as many others.
            eps: ℓ2 budget.
            index: as in :meth:`certify`.
            check_range: as in :meth:`certify`.
            advance: as in :meth:`certify`.

        Raises:
            ValueError: as :meth:`certify`, or a negative budget.
        """
        check_number("eps", eps)
        indices = self._check((x, y), index, check_range)
        total = torch.zeros(len(x), dtype=torch.float64)
        with full_precision(), evaluation_mode(self.metric.encoder):
            for row, i in enumerate(indices):
                z_y = self.metric.encoder(y[row : row + 1].clone()).double()  # which layers may change in place
                for noisy in self._noisy([x[row]], sample_stream(self.seed, i), self.samples):
                    z = self.metric.encoder(noisy[0]).double()
                    distance = geometry.cosine_distance(z, z_y.expand_as(z), self.metric.anchor)
                    if bool(distance.isnan().any()):
                        raise LipsimError(f"the metric has no distance for noisy copies of image {i}: features of NaN")
                    total[row] += distance.sum().cpu()
                    if advance is not None:
                        advance(len(z))
        mean = (total / (2 * self.samples)).clamp(0, 1)
        low, high = smoothed_mean_interval(mean, self.samples, eps, sigma=self.sigma, alpha=self.alpha)
        return (2 * low).to(self.metric.device), (2 * high).to(self.metric.device)

    def _certified(self, selection: Tensor, counts: Tensor, moving: Moving) -> SmoothedCertificate:
        images = len(IMAGES) if moving == "all" else 1
        found = certify_counts(selection, counts, sigma=self.sigma, alpha=self.alpha, moving=images)
        return found.to(self.metric.device)

    def _anchored(self, x: Tensor) -> Anchored:
        return Anchored(self.metric.encoder(x), self.metric.anchor)

    def _check(self, images: Sequence[Tensor], index: Tensor | Sequence[int] | None, check_range: bool) -> list[int]:
        for x in images:
            check_tensor(x)
        self.metric.check_precision(*images)
        for x in images:
            self.metric.check_images(x, check_range=check_range)
        if len({len(x) for x in images}) > 1:
            raise LipsimError(f"expected as many images on each side, got {', '.join(str(len(x)) for x in images)}")
        indices = list(range(len(images[0]))) if index is None else [int(i) for i in index]
        if len(indices) != len(images[0]):
            raise LipsimError(f"expected one index a sample, got {len(indices)} for {len(images[0])} samples")
        return indices

    def _margins(self, images: list[Tensor], index: int, advance: Callable[[int], None] | None) -> Tensor:
        """The metric's margin on every draw, ``(selection + samples,)`` float64 on the CPU, of one triplet."""
        names = [name for name in IMAGES if self.moving in (name, "all")]
        still = [name for name in IMAGES if name not in names]
        features: dict[str, Tensor] = {}
        if still:
            embedded = self.metric.encoder(torch.stack([images[IMAGES.index(name)] for name in still]))
            features |= dict(zip(still, embedded.split(1), strict=True))
        moving = [images[IMAGES.index(name)] for name in names]
        margins = []
        for noisy in self._noisy(moving, sample_stream(self.seed, index), self.selection + self.samples):
            z = self.metric.encoder(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2])
            features |= dict(zip(names, z, strict=True))
            of_all = [features[name].expand(noisy.shape[1], -1) for name in IMAGES]
            margins.append(self.metric.margin(*of_all).cpu())
            if advance is not None:
                advance(noisy.shape[0] * noisy.shape[1])
        return torch.cat(margins)

    def _noisy(self, images: list[Tensor], stream: np.random.Generator, draws: int) -> Iterator[Tensor]:
        """Noisy copies ``(images, draws, 3, H, W)`` of a sample's images, a bounded number at once."""
        clean = torch.stack(images).to("cpu", torch.float64)
        at_once = max(1, self.batch_size // len(images))
        for start in range(0, draws, at_once):
            noise = torch.from_numpy(stream.standard_normal((min(at_once, draws - start), *clean.shape)))
            noisy = noise.mul_(self.sigma).add_(clean)
            yield noisy.transpose(0, 1).to(self.metric.device, self.metric.dtype)


def _votes(margins: Tensor) -> Tensor:
    """How many margins say left, right, and neither, ``(3,)`` int64: of 0, or none at all, they are for neither."""
    left, right = (margins > 0).sum(), (margins < 0).sum()
    return torch.stack([left, right, len(margins) - left - right]).cpu()


def _check_shared(ids: Tensor, indices: list[int], apart: bool) -> None:
    """Refuse triplets that are none of rows of images, and noise that would be the same for two of them."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != len(IMAGES) or ids.dtype != torch.int64:
        got = f"{tuple(ids.shape)} in {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise LipsimError(f"expected rows of images (N, 3) in int64, got {got}")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < len(indices)):
        raise LipsimError(f"expected rows of {len(indices)} images, got {int(ids.min())} to {int(ids.max())}")
    if len(set(indices)) < len(indices):
        raise LipsimError("expected different numbers for the images, as their noise depends on them")
    twice = (ids[:, 0] == ids[:, 1]) | (ids[:, 0] == ids[:, 2]) | (ids[:, 1] == ids[:, 2])
    if apart and bool(twice.any()):
        triplet = int(twice.nonzero()[0])
        raise LipsimError(
            f"expected three different images where all may move, got rows {ids[triplet].tolist()} of triplet {triplet}"
        )


def check_alpha(alpha: object) -> float:
    """A probability of error, above 0 and below ½.

    Raises:
        ValueError: it is none.
    """
    found = check_number("alpha", alpha, above=True)
    if found >= 0.5:
        raise LipsimError(f"expected alpha < 0.5, got {alpha!r}; 0.001 is usual")
    return found


def check_moving(moving: str) -> Moving:
    """The image that may change.

    Raises:
        ValueError: there is no such image.
    """
    for known in get_args(Moving):
        if moving == known:
            return known  # type: ignore[no-any-return]
    raise LipsimError(f"expected moving to be one of {', '.join(get_args(Moving))}, got {moving!r}")
