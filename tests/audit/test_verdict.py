"""The verdict of an audit: bounds against what is reached, on encoders whose constants are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipsim import PerceptualMetric, audit
from lipsim.students import OrthogonalProjection


class Scaled(nn.Module):
    """Multiplies by 2, and declares whatever it is told."""

    def __init__(self, declared: float) -> None:
        super().__init__()
        self.declared = declared

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.flatten(1)

    def lipschitz_bound(self) -> float:
        return self.declared


class _Doubling(torch.autograd.Function):
    """Of the old style, without ``setup_context``, which the transforms of torch.func refuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = _Doubling.apply(x.flatten(1))
        return doubled

    def lipschitz_bound(self) -> float:
        return 2.0


def test_functions_that_no_transform_takes_are_audited_too() -> None:
    verdict = audit.check(nn.Sequential(Doubled()), torch.rand(3, 3, 4, 4), steps=2)
    assert verdict.sound and verdict.reached == {"0": pytest.approx(2, rel=1e-9)}
    assert verdict.lower_bound == pytest.approx(2, rel=1e-9)


def test_an_encoder_whose_constant_is_known() -> None:
    seen: list[str] = []
    verdict = audit.check(nn.Sequential(Scaled(2.0)), torch.rand(3, 3, 4, 4), steps=2, progress=seen.append)
    assert verdict.sound and verdict.failures == () and verdict.samples == 3
    assert verdict.report.total == pytest.approx(2, rel=1e-15) and verdict.lower_bound == pytest.approx(2, rel=1e-9)
    assert verdict.reached == {"0": pytest.approx(2, rel=1e-9)}
    assert seen[0] == "bounding each layer" and len(seen) == 4


def test_what_is_required_is_part_of_the_verdict() -> None:
    encoder, images = nn.Sequential(Scaled(2.0)), torch.rand(1, 3, 4, 4)
    assert audit.check(encoder, images, steps=1, require=2.000001).sound
    for required in (1.9, float("nan")):
        verdict = audit.check(encoder, images, steps=1, require=required)
        assert not verdict.sound and verdict.failures[0].startswith("the bound 2 is above")


def test_a_bound_that_is_exceeded_by_less_than_the_audit_sees() -> None:
    """By 1e-7, which rounding in float32 may do: the verdict looks in float64."""
    verdict = audit.check(nn.Sequential(Scaled(2 * (1 - 1e-7))), torch.rand(2, 3, 4, 4), steps=1)
    assert [line.split(" reaches ")[0] for line in verdict.failures] == ["Scaled at '0'", "an attack"]
    assert "reaches 2, above its bound 1.9999998" in verdict.failures[0]


def test_facts_and_text_hold_the_same() -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16)
    verdict = audit.check(metric.encoder, torch.rand(2, 3, 16, 16), steps=1)
    facts = json.loads(json.dumps(verdict.facts()))
    assert list(facts) == ["lipschitz", "lower_bound", "feature_error", "samples", "layers", "failures"]
    assert facts["lipschitz"] == metric.lipschitz and 0 < facts["feature_error"] < 1e-4
    lines = str(verdict).splitlines()
    assert lines[0].split() == ["bound", "reached", "used", "layer", "name"]
    assert len(lines) == 1 + len(facts["layers"]) + 3 and max(map(len, lines[:-1])) <= 80
    starts = {line.index(layer["kind"]) for line, layer in zip(lines[1:], facts["layers"], strict=False)}
    assert starts == {lines[0].index("layer")}  # one column


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        audit.check(Scaled(2.0), torch.rand(0, 3, 4, 4))
