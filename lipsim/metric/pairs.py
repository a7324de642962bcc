"""Pairs of images, compared by features that each image has once: distances, and what is certified about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipsim import certificates
from lipsim.certificates import geometry
from lipsim.data.transforms import Preprocess
from lipsim.layers.base import evaluation_mode
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.tiles import TiledMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


class PairGeometry:
    """How a metric compares two images from their features ``(N, D)``, in float64 on the CPU.

    Args:
        metric: any metric; :func:`pair_geometry` chooses the class that goes with it.
    """

    def __init__(self, metric: PerceptualMetric) -> None:
        self.metric = metric

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features of images ``(N, 3, H, W)``, computed in full precision."""
        with full_precision(), evaluation_mode(self.metric.encoder):
            return self._features(images.to(self.metric.device, self.metric.dtype)).double().cpu()

    def embed_all(
        self,
        load: Callable[[Sequence[int], Preprocess], Tensor],
        count: int,
        batch_size: int,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Features of ``count`` images, a batch at a time.

        Args:
            load: from the positions of some of them, and what prepares them, to ``(M, 3, H, W)``.
            count: at least 1.
            batch_size: images at a time.
            advance: called with how many more are done.
        """
        features = []
        for positions in torch.arange(count).split(batch_size):
            features.append(self.embed(load(positions.tolist(), self.metric.preprocess)))
            if advance is not None:
                advance(len(positions))
        return torch.cat(features)

    def distance(self, z: Tensor, y: Tensor) -> Tensor:
        """Distances ``(N,)``."""
        return geometry.cosine_distance(z, y, self.metric.anchor)

    def interval(self, z: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """What the distance is within for every change of the first image up to ``eps``, ``(N,)`` each.

        Raises:
            ValueError: a negative budget, a metric without a bound, or weights in half precision.
        """
        if not self.metric.has_bound:
            raise LipsimError("the metric has no Lipschitz bound, its distances have no certified interval: no eps")
        self.metric.check_precision()
        return self._interval(z, y, eps)

    def decide(self, z: Tensor, y: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Answer "the same", ``d ≤ threshold``, and how far either image may change before the answer can.

        Returns:
            ``(N,)`` bool, and the certified radii ``(N,)`` of the first and of the second images; 0 without a bound.

        Raises:
            ValueError: weights in half precision of a metric with a bound.
        """
        same = self.distance(z, y) <= threshold
        if not self.metric.has_bound:
            none = torch.zeros(len(z), dtype=torch.float64)
            return same, none, none
        self.metric.check_precision()
        return self._decide(same, z, y, threshold)

    def _features(self, images: Tensor) -> Tensor:
        return self.metric.embed(images)

    def _interval(self, z: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return certificates.distance_interval(z, y, eps, **self.metric.certificate_options)

    def _decide(self, same: Tensor, z: Tensor, y: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        options = self.metric.certificate_options
        signed = certificates.same_radius(z, y, threshold, **options)
        other = certificates.same_radius(y, z, threshold, **options)
        # Near 2 distances lose the digits that angles, and with them radii, have: the side is that of the radius.
        return torch.where(signed != 0, signed > 0, same), signed.abs(), other.abs()


class TiledPairGeometry(PairGeometry):
    """The same from features of all tiles ``(N, T, D)``, whose lengths prove more than their directions do.

    Args:
        metric: a metric of tiles.
    """

    metric: TiledMetric

    def distance(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean distances of the tiles, ``(N,)``; 1 where a tile has no direction, as of the metric."""
        anchor = self.metric.tile.anchor
        distance = geometry.cosine_distance(z, y, anchor).mean(-1)
        if anchor:
            return distance
        directed = [(geometry.anchored_norm(t, anchor) > 0).all(-1) for t in (z, y)]
        return torch.where(directed[0] & directed[1], distance, 1.0)

    def _features(self, images: Tensor) -> Tensor:
        self.metric.check_images(images)
        return self.metric.embed_tiles(images)

    def _interval(self, z: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return certificates.tiled_distance_interval(z, y, eps, **self.metric.tile_options)

    def _decide(self, same: Tensor, z: Tensor, y: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        options = self.metric.tile_options
        # Both radii are 0 within the rounding of the distance, which is the only place where it could be on neither
        # side.
        radius = certificates.tiled_threshold_radius(z, y, threshold, **options)
        return same, radius, certificates.tiled_threshold_radius(y, z, threshold, **options)


def pair_geometry(metric: PerceptualMetric) -> PairGeometry:
    """How this metric compares pairs."""
    return TiledPairGeometry(metric) if isinstance(metric, TiledMetric) else PairGeometry(metric)
