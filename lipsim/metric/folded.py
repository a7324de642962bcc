"""A metric with the weights that it computes with, and nothing that derives them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from lipsim.layers.base import FoldedLayer
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.students import FoldedNetwork
from lipsim.utils.files import state_fingerprint


def folded_copy(metric: PerceptualMetric) -> PerceptualMetric:
    """A copy whose encoder is a :class:`lipsim.students.FoldedNetwork`: convolutions and matrices, explicitly.

    What :func:`lipsim.metric.save` writes of it is loaded without deriving a weight, needs no package that derived
    them, and holds the very numbers that were folded here: other machines fold the same parameters to other last
    digits. It is audited like any other file. An encoder that derives no weights is copied as it is.

    Raises:
        ValueError: the encoder is not a sequence of layers that a file can name.
    """
    copy = deepcopy(metric).requires_grad_(False).eval()
    if any(isinstance(module, FoldedLayer) for module in metric.encoder.modules()):
        copy.encoder = FoldedNetwork.from_encoder(copy.encoder)
    return copy


def notes_on_folding(metric: PerceptualMetric) -> dict[str, Any]:
    """What a folded file notes about the metric that it was made from."""
    return {
        "folded_from": type(metric.encoder).__name__,
        "folded_state_sha256": state_fingerprint(metric.encoder.state_dict()),
    }
