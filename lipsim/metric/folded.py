"""A metric with the weights that it computes with, and nothing that derives them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from lipsim.layers.base import FoldedLayer
from lipsim.metric.combinations import JoinedEncoder
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.tiles import TiledMetric
from lipsim.students import FoldedNetwork
from lipsim.utils.files import state_fingerprint


def folded_copy(metric: PerceptualMetric) -> PerceptualMetric:
    """A copy whose encoder is a :class:`lipsim.students.FoldedNetwork`, or two: convolutions and matrices, explicitly.

    What :func:`lipsim.metric.save` writes of it is loaded without deriving a weight, needs no package that derived
    them, and holds the very numbers that were folded here: other machines fold the same parameters to other last
    digits. It is audited like any other file. An encoder that derives no weights is copied as it is; of a metric of
    tiles that of a tile is folded.

    Raises:
        ValueError: the encoder is not a sequence of layers that a file can name.
    """
    if isinstance(metric, TiledMetric):
        tiled = TiledMetric(folded_copy(metric.tile), metric.grid)
        tiled.threshold, tiled.notes = metric.threshold, dict(metric.notes)
        return tiled
    copy = deepcopy(metric).requires_grad_(False).eval()
    copy.encoder = _folded(copy.encoder)
    return copy


def _folded(encoder: nn.Module) -> nn.Module:
    if isinstance(encoder, JoinedEncoder):
        return encoder.of(_folded(encoder.first), _folded(encoder.second))
    derives = any(isinstance(module, FoldedLayer) for module in encoder.modules())
    return FoldedNetwork.from_encoder(encoder) if derives else encoder


def notes_on_folding(metric: PerceptualMetric) -> dict[str, Any]:
    """What a folded file notes about the metric that it was made from, besides that one's own notes."""
    encoder = metric.tile.encoder if isinstance(metric, TiledMetric) else metric.encoder
    return {
        **metric.notes,
        "folded_from": type(encoder).__name__,
        "folded_state_sha256": state_fingerprint(encoder.state_dict()),
    }
