"""``torch.hub`` loads the metrics from a clone."""

from __future__ import annotations

from pathlib import Path

import torch

import lipsim
from lipsim.metric import ImageDistance

ROOT = str(Path(__file__).parents[1])


def test_a_clone_is_loaded() -> None:
    metric = torch.hub.load(ROOT, "lipsim", source="local", name="quickstart")
    assert isinstance(metric, lipsim.PerceptualMetric)
    x, y = torch.rand(2, 2, 3, 64, 64)
    assert torch.equal(metric(x, y), lipsim.load("quickstart")(x, y))
    distance = torch.hub.load(ROOT, "lipsim_distance", source="local", name="quickstart", normalize=True)
    assert isinstance(distance, ImageDistance)
    torch.testing.assert_close(distance(2 * x - 1, 2 * y - 1), metric(x, y))
