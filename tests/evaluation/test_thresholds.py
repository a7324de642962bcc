"""Thresholds on labelled pairs: the rates are those of a count, and attacks stay outside certificates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from lipsim import PerceptualMetric
from lipsim.data.sets.labelled import LabelledPairs
from lipsim.evaluation import thresholds
from lipsim.evaluation.thresholds import Calibration, calibrate
from lipsim.students import OrthogonalProjection

SIZE, COUNT = 8, 8
EPS = (0.05, 0.2, 0.6, 3.0)


@pytest.fixture
def data(tmp_path: Path) -> LabelledPairs:
    """Things near middle gray, so that no attack meets the box soon, and noisy views of them, the last a stranger."""
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for number in range(COUNT):
        thing = 128 + 25 * rng.normal(size=(SIZE, SIZE, 3))
        view = thing + 6 * rng.normal(size=thing.shape) if number < COUNT - 1 else 255 - thing
        for folder, image in (("a", thing), ("b", view)):
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / folder / f"{number}.png")
    return LabelledPairs.from_folders(tmp_path / "a", tmp_path / "b", different=40)


@pytest.fixture
def metric() -> PerceptualMetric:
    """A linear map onto as many features as pixels: what is certified is nearly what can be reached."""
    return PerceptualMetric(OrthogonalProjection(SIZE, 3 * SIZE * SIZE), SIZE).eval().requires_grad_(False)


def test_rates_are_counts(metric: PerceptualMetric, data: LabelledPairs) -> None:
    far = 0.1
    found = calibrate(metric, data, far=far, eps=EPS, attack_pairs=0, batch_size=5)
    images = torch.stack([metric.preprocess(file) for file in map(data.file, range(len(data.images)))])
    # An isometry: angles between the images themselves, with the anchor appended.
    e = np.c_[metric.embed(images).double().numpy(), np.ones(len(images))]
    x, y = e[data.pairs[:, 0]], e[data.pairs[:, 1]]
    norms = np.linalg.norm(x, axis=1)
    theta = np.arccos((x * y).sum(1) / (norms * np.linalg.norm(y, axis=1)))
    same, value = data.same.numpy(), found.threshold.value
    right = (1 - np.cos(theta) <= value) == same
    radius = norms * np.sin(np.abs(np.arccos(1 - value) - theta)) / metric.lipschitz
    for kind, rates in ((same, found.same), (~same, found.different)):
        assert rates.pairs == kind.sum() and rates.natural == right[kind].mean() and rates.attacked is None
        assert rates.certified is not None
        assert list(rates.certified.values()) == [(right & (radius > eps))[kind].mean() for eps in EPS]
    assert found.false_accepts == (~right)[~same].mean() <= far
    assert found.same.natural < 1  # the stranger is refused
    accepted = round(found.false_accepts * 40)
    low, high = found.interval
    assert low == pytest.approx(stats.beta.ppf(0.025, accepted, 41 - accepted), abs=1e-12)
    assert high == pytest.approx(stats.beta.ppf(0.975, accepted + 1, 40 - accepted), abs=1e-12)
    assert found.threshold.different_pairs == 40 and found.threshold.data_sha256 == data.sha256()


@pytest.fixture
def attacked(metric: PerceptualMetric, data: LabelledPairs) -> Calibration:
    return calibrate(metric, data, far=0.1, eps=EPS, attack_pairs=12, steps=15, batch_size=16)


def test_attacks_stay_outside_certificates_and_get_near(attacked: Calibration) -> None:
    assert attacked.violations == 0
    for part in (attacked.attacked_same, attacked.attacked_different):
        assert part is not None and part.attacked is not None and part.certified is not None
        shares = list(part.attacked.values())
        assert all(hold >= proven for hold, proven in zip(shares, part.certified.values(), strict=True))
        assert shares == sorted(shares, reverse=True) and part.natural >= shares[0] >= shares[-1]
        assert shares[-1] == 0 < shares[0]  # nothing of this size stands against 3
    assert attacked.attacked_same is not None and attacked.attacked_same.pairs == COUNT


def test_a_certificate_that_is_none_is_counted(
    metric: PerceptualMetric, data: LabelledPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric.lipschitz = 0.02
    found = calibrate(metric, data, far=0.1, eps=EPS, attack_pairs=6, steps=15)
    assert found.violations > 0


def test_what_seems_broken_by_rounding_does_not_count(
    metric: PerceptualMetric, data: LabelledPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attacks that say of the clean images that they broke them at the smallest budget."""
    from lipsim.attacks import Objective, SuiteResult, auto

    def boastful(objective: Objective, x: torch.Tensor, **options: Any) -> SuiteResult:
        found = auto(objective, x, **{**options, "steps": 1, "attacks": ("apgd",), "eps": 1e-9})
        return SuiteResult(**{**vars(found), "broken_at": torch.full((len(x),), EPS[0]).double(), "x_adv": x})

    monkeypatch.setattr(thresholds, "auto", boastful)
    found = calibrate(metric, data, far=0.1, eps=EPS, attack_pairs=4)
    assert found.attacked_different is not None and found.attacked_different.attacked is not None
    assert set(found.attacked_different.attacked.values()) == {found.attacked_different.natural}


def test_a_metric_without_a_bound_is_attacked_only(data: LabelledPairs, metric: PerceptualMetric) -> None:
    unbounded = PerceptualMetric(metric.encoder, SIZE, lipschitz=math.inf)
    found = calibrate(unbounded, data, far=0.1, eps=(3.0,), attack_pairs=3, steps=5)
    assert found.same.certified is None and found.violations == 0
    assert [row["pairs"] for row in found.rows()] == ["attacked same, attacked", "attacked different, attacked"]
    assert [row["pairs"] for row in calibrate(unbounded, data, attack_pairs=0).rows()] == ["same", "different"]
    assert json.loads(json.dumps(found.facts()))["threshold"]["value"] == found.threshold.value


def test_refusals(metric: PerceptualMetric, data: LabelledPairs) -> None:
    for options, message in (
        ({"far": 1.5}, "false-accept rate"),
        ({"eps": [-1.0]}, "eps ≥ 0"),
        ({"attack_pairs": -1}, "attack_pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(metric, data, **options)  # type: ignore[arg-type]
