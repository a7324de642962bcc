"""The embedding that DreamSim makes of features, and every teacher here."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def centred(features: Tensor) -> Tensor:
    """Features ``(…, D)`` minus their mean over D, of unit norm (Fu et al. 2023, package version 0.2)."""
    return F.normalize(features - features.mean(-1, keepdim=True), dim=-1)
