"""A metric of large images: the mean over tiles of the distance that another metric has between them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipsim import audit, certificates
from lipsim.certificates import TwoAFCCertificate, geometry
from lipsim.certificates.numbers import check_count, check_number
from lipsim.data.transforms import Preprocess
from lipsim.layers.base import evaluation_mode
from lipsim.metric.distance import require_metric
from lipsim.metric.inputs import check_paired
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.framings import DEFAULT_GRID
from lipsim.utils.precision import full_precision


def tiles_of(x: Tensor, grid: int) -> Tensor:
    """Images ``(N, 3, g·S, g·S)`` as their tiles, row by row, ``(N·g², 3, S, S)``."""
    side = x.shape[-1] // grid
    cut = x.unflatten(2, (grid, side)).unflatten(4, (grid, side))  # N, 3, row, S, column, S
    tiles: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return tiles


class TiledEncoder(nn.Module):
    """The directions of the features of all tiles in one vector, ``s·(p_1, …, p_T)``: the encoder of a tiled metric.

    ``p_t = e_t/‖e_t‖`` are unit vectors of anchored features, ``e_t = (z_t, κ)``, so the cosine distance of two such
    vectors is the mean of the cosine distances of the tiles, whatever their length. The length ``s = κ + (min_t ‖e_t‖ −
    κ)/√T`` is the largest with which they have the Lipschitz constant ``L`` of a tile's encoder: a turn of ``e_t`` by
    ``ds`` moves ``s·p_t`` by ``ds·s/‖e_t‖ ≤ ds``, and a change of the shortest one's length by ``dn`` moves ``s·(p_1,
    …, p_T)`` by ``√T·dn/√T``, at a right angle to that.

    Args:
        encoder: of one tile, images ``(N, 3, S, S)`` to features ``(N, D)``.
        tile_size: ``S``.
        grid: ``g``, tiles a side; ``T = g²``.
        anchor: constant coordinate ``κ`` beside the features of a tile.

    Attributes:
        image_size: side ``g·S`` of its input.
    """

    def __init__(self, encoder: nn.Module, tile_size: int, grid: int, anchor: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.tile_size, self.grid, self.anchor = tile_size, grid, anchor
        self.image_size = grid * tile_size

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, g·S, g·S)`` to features ``(N, T·(D + 1))``."""
        z: Tensor = self.encoder(tiles_of(x, self.grid))
        exact = z.double()  # so that this adds half a digit to the error of a tile, and no more
        unit, constant = geometry.project(exact, self.anchor)
        units = torch.cat([unit, constant.unsqueeze(-1)], -1).unflatten(0, (-1, self.grid**2))
        shortest = geometry.anchored_norm(exact, self.anchor).unflatten(0, (-1, self.grid**2)).amin(-1)
        length = self.anchor + (shortest - self.anchor) / self.grid
        features: Tensor = (length[:, None, None] * units).flatten(1).to(z.dtype)
        return features

    @property
    def config(self) -> dict[str, Any]:
        """What tells encoders of the same weights apart; no file names this class, it names that of a tile."""
        own = getattr(self.encoder, "config", None)
        return {"tile": own, "tile_size": self.tile_size, "grid": self.grid, "anchor": self.anchor}

    def extra_repr(self) -> str:
        """The arguments."""
        return f"tile_size={self.tile_size}, grid={self.grid}, anchor={self.anchor}"

    def lipschitz_bound(self) -> float:
        """That of the encoder of a tile.

        Raises:
            lipsim.audit.UnboundedModuleError: it has none.
        """
        return audit.lipschitz_bound(self.encoder, self.tile_size).total


class TiledMetric(PerceptualMetric):
    """The mean of the distances between corresponding tiles, by the metric of one tile: for large images.

    Every image is resized to a square of ``grid`` × ``grid`` tiles, whatever its shape, so that any two images have
    corresponding tiles. It is a :class:`PerceptualMetric` whose :meth:`embed` gives the directions of all tiles in one
    vector (:class:`TiledEncoder`), with :attr:`anchor` 0, and everything takes it as one: what is computed from these
    features (retrieval, evaluations, walks) is certified by their Lipschitz constant. :meth:`certify`,
    :meth:`distance_bounds` and :meth:`threshold_radius`, which have the images, know how long the features of each
    tile are (:mod:`lipsim.certificates.tiles`), which proves larger radii.

    Args:
        tile: the metric of one tile, ``S`` pixels a side.
        grid: tiles a side; their product with ``S`` is :attr:`image_size`.

    Raises:
        ValueError: ``tile`` is a metric of tiles itself, or a grid below 1.

    Example:
        >>> import lipsim
        >>> metric = lipsim.load("quickstart", framing="tiles")
        >>> metric.image_size, metric.tile.image_size, metric.grid
        (128, 64, 2)
        >>> dark, light, white = (torch.full((1, 3, 128, 128), level) for level in (0.2, 0.3, 1.0))
        >>> torch.allclose(metric(dark, white), metric.tile(dark[..., :64, :64], white[..., :64, :64]), atol=1e-6)
        True
        >>> bool(metric.certify(dark, light, white).radius > 1)
        True
    """

    encoder: TiledEncoder

    def __init__(self, tile: PerceptualMetric, grid: int = DEFAULT_GRID) -> None:
        require_metric(tile)
        if isinstance(tile, TiledMetric):
            raise LipsimError("expected the metric of one tile, got one of tiles; give its tile and a finer grid")
        grid = check_count("grid", grid)
        encoder = TiledEncoder(tile.encoder, tile.image_size, grid, tile.anchor)
        super().__init__(encoder, encoder.image_size, anchor=0.0, lipschitz=math.inf)
        self.tile, self.grid = tile, grid
        self._declared_error: float | None = None
        self.feature_error_kind = tile.feature_error_kind
        self.preprocess = Preprocess(encoder.image_size, tile.preprocess.resize, "tiles", grid)
        self.train(tile.training)

    @property
    def anchor(self) -> float:
        """0: the features of :meth:`embed` are unit vectors; that of a tile is ``metric.tile.anchor``."""
        return 0.0

    @anchor.setter
    def anchor(self, anchor: float) -> None:
        if anchor:
            raise LipsimError(
                f"a metric of tiles has the anchor of its tile, got {anchor}; make it of a tile with that"
            )

    @property
    def has_bound(self) -> bool:
        """Whether a bound of the tile's encoder is known."""
        return self.tile.has_bound

    @property
    def lipschitz(self) -> float:
        """The bound of :meth:`embed`, which is that of the tile's encoder: set that of :attr:`tile` for another."""
        return self._unchanged().lipschitz

    @lipschitz.setter
    def lipschitz(self, bound: float) -> None:
        raise LipsimError("the bound of a metric of tiles follows from that of a tile: set metric.tile.lipschitz")

    @property
    def feature_error(self) -> float:
        """The error of one embedding, from that of a tile's features.

        Set it to declare another of the embedding; 0 is one of the tile as well. One that is larger than what follows
        from the tile raises :attr:`tile_error` too.
        """
        if self._declared_error is not None:
            return self._declared_error
        return self._stacked_error(self._unchanged().feature_error)

    @feature_error.setter
    def feature_error(self, error: float) -> None:
        self._declared_error = check_number("feature_error", error)
        self.feature_error_kind = "declared" if error else "none"
        if not error:
            self.tile.feature_error = 0.0

    @property
    def tile_error(self) -> float:
        """The error of the features of one tile, which :meth:`certify` covers and a file keeps: that of :attr:`tile`.

        Where a larger :attr:`feature_error` was declared than follows from it, :attr:`grid` times the declared one,
        which covers the tile with the shortest features. Of a tile with longer ones no error of the embedding tells
        enough: declare theirs, as the ``feature_error`` of :attr:`tile`.
        """
        return self._tile_error(self._unchanged().feature_error)

    @property
    def declared_lipschitz(self) -> float | None:
        """As of the tile."""
        return self.tile.declared_lipschitz

    @property
    def declared_feature_error(self) -> float:
        """:attr:`feature_error` as it was declared, here or of the tile, without a search."""
        own = self._declared_error
        return self._stacked_error(self.tile.declared_feature_error) if own is None else own

    @property
    def certificate_options(self) -> dict[str, float]:
        """Of the functions in :mod:`lipsim.certificates`, for the features of :meth:`embed`."""
        return {"anchor": 0.0, "lipschitz": self.lipschitz, "feature_error": 2 * self.feature_error}

    @property
    def tile_options(self) -> dict[str, float]:
        """Of the functions in :mod:`lipsim.certificates.tiles`, for the features of :meth:`embed_tiles`.

        Raises:
            ValueError: the encoder or the anchor of the tile has been replaced.
        """
        options = self._unchanged().certificate_options
        return {**options, "feature_error": 2 * self._tile_error(options["feature_error"] / 2)}

    def audit(self) -> audit.LipschitzReport:
        """Bound the encoder of a tile with its present weights, and use this bound from now on."""
        return self.tile.audit()

    def require_lipschitz(self, floor: float, source: str = "", *, now: bool = True) -> None:
        """As of the tile."""
        self.tile.require_lipschitz(floor, source, now=now)

    def require_feature_error(self, floor: float) -> None:
        """As of the tile."""
        self._declared_error = None
        self.tile.require_feature_error(floor)
        self.feature_error_kind = self.tile.feature_error_kind

    @torch.no_grad()
    def certify(self, reference: Tensor, left: Tensor, right: Tensor, *, check_range: bool = True) -> TwoAFCCertificate:
        """Answer N triplets ``(N, 3, g·S, g·S)`` and certify the answers, see :func:`certificates.certify_tiles`.

        Raises:
            ValueError: as of :meth:`PerceptualMetric.certify`.
        """
        self.check_certifiable(reference, left, right, check_range=check_range)
        if not len(reference) == len(left) == len(right):
            raise LipsimError(
                f"expected as many candidates as references, got {len(reference)}, {len(left)}, {len(right)}"
            )
        z, z0, z1 = self.embed_tiles(torch.cat([reference, left, right])).chunk(3)
        return certificates.certify_tiles(reference, z, z0, z1, **self.tile_options)

    @torch.no_grad()
    def distance_bounds(self, x: Tensor, y: Tensor, eps: float, *, check_range: bool = True) -> tuple[Tensor, Tensor]:
        """Interval ``(lower, upper)``, ``(N,)`` each, that holds ``d(x + δ, y)`` for every ``‖δ‖₂ ≤ eps``.

        Raises:
            ValueError: as of :meth:`PerceptualMetric.distance_bounds`.
        """
        z, z_other = self._pair(x, y, check_range)
        return certificates.tiled_distance_interval(z, z_other, eps, **self.tile_options)

    @torch.no_grad()
    def threshold_radius(self, x: Tensor, y: Tensor, threshold: float, *, check_range: bool = True) -> Tensor:
        """Radius within which ``d(x, y)`` stays on its side of a threshold when ``x`` moves, ``(N,)``.

        Raises:
            ValueError: as of :meth:`distance_bounds`, or a threshold outside [0, 2].
        """
        z, z_other = self._pair(x, y, check_range)
        return certificates.tiled_threshold_radius(z, z_other, threshold, **self.tile_options)

    def embed_tiles(self, x: Tensor) -> Tensor:
        """Features of the tiles ``(N, T, D)``, before anchor and projection, in full precision."""
        with full_precision(), evaluation_mode(self.encoder):
            z: Tensor = self.encoder.encoder(tiles_of(x, self.grid)).unflatten(0, (-1, self.grid**2))
        return z

    def _stacked_error(self, error: float) -> float:
        """The error of an embedding that follows from one of the features of a tile."""
        if not error:  # exact arithmetic
            return 0.0
        # Of all tiles together, and that of rounding the vector, whose length is at most that of the features of a tile
        # and the anchors. The former part is less than a quarter of the error: a search finds no less than half a digit
        # of the longest features, and enlarges it.
        anchors = torch.finfo(self.dtype).eps * self.grid * self.tile.anchor
        return 1.5 * self.grid * error + anchors

    def _tile_error(self, error: float) -> float:
        """:attr:`tile_error` where the tile has this one."""
        declared = self._declared_error
        if declared is None or declared <= self._stacked_error(error):
            return error
        # The embedding is at most so much shorter than the shortest features of a tile.
        return self.grid * declared

    def _unchanged(self) -> PerceptualMetric:
        """The metric of a tile, if it still is the one that answers.

        Raises:
            ValueError: its encoder or its anchor has been replaced.
        """
        if self.tile.encoder is not self.encoder.encoder or self.tile.anchor != self.encoder.anchor:
            raise LipsimError("the encoder or the anchor of the tile has been replaced; make a TiledMetric of it again")
        return self.tile

    def _pair(self, x: Tensor, y: Tensor, check_range: bool) -> tuple[Tensor, Tensor]:
        self.check_certifiable(x, y, check_range=check_range)
        check_paired(x, y)
        z, z_other = self.embed_tiles(torch.cat([x, y])).split([len(x), len(y)])
        return z, z_other
