"""Shared fixtures: reproducible random features and images, small enough for CPU."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from torch import Tensor

from lipsim.data import Triplet

# Lightning 2.6 makes calls that jsonargparse 4 deprecates; see the bound in pyproject.toml.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# No deadlines: the first call of a torch function on a busy machine takes as long as it takes.
hypothesis.settings.register_profile("lipsim", deadline=None)
hypothesis.settings.load_profile("lipsim")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def features() -> tuple[Tensor, Tensor, Tensor]:
    """Reference, left and right, ``(64, 6)`` float64, of norms from well below to well above 1."""
    scale = torch.logspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
    z, z0, z1 = (scale * torch.randn(64, 6, dtype=torch.float64) for _ in range(3))
    return z, z0, z1


@pytest.fixture
def triplets() -> Triplet:
    """Twelve random 16-pixel triplets with votes, two of them tied."""
    votes = torch.tensor([0.0, 1.0, 0.2, 0.8, 0.5, 0.4, 0.6, 1.0, 0.0, 0.5, 0.9, 0.1])
    images = [torch.rand(12, 3, 16, 16) for _ in range(3)]
    return Triplet(*images, votes, torch.arange(12))
