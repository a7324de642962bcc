"""`lipsim verify`: sound metrics pass, and every fault planted in a metric or in a certificate is reported.

The first test runs what the others run, a thousand times each; to trace them, too, would take seconds.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipsim
from lipsim import PerceptualMetric, audit, certificates
from lipsim.cli.main import main
from lipsim.data import Triplet
from lipsim.data.registry import sample_triplets
from lipsim.evaluation.verify import Verification, verify
from lipsim.evaluation.verify.controls import linear_controls, mutant_controls
from lipsim.layers import exact_copy
from lipsim.metric import save
from lipsim.students import OrthogonalProjection, ScatteringTransform, SLLNetwork, TorchlipNetwork
from lipsim.teachers import SmallViT

KINDS = ("reference", "left", "right", "joint", "distance", "threshold", "retrieval", "pixels")


@pytest.fixture
def two() -> Triplet:
    return sample_triplets("builtin", 2, 16, resize="float")


@pytest.fixture
def no_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other failures, which the controls do not add to."""
    for name in ("tight_controls", "linear_controls", "mutant_controls"):
        monkeypatch.setattr(f"lipsim.evaluation.verify.check.{name}", lambda *_: [])


def _check(metric: PerceptualMetric, triplets: Triplet, steps: int = 4, polish: int = 6) -> Verification:
    return verify(metric, triplets, steps=steps, polish=polish)


def test_a_metric_that_nothing_trains_has_its_fixed_weights_enlarged(two: Triplet) -> None:
    metric = PerceptualMetric(exact_copy(ScatteringTransform(16, 4, orientations=3)), 16)
    images = (two.reference.double(), two.left.double(), two.right.double())
    scaled = mutant_controls(metric, images)[0]
    assert scaled.name == "Scattering 1 × 1.05" and scaled.caught and "audit, 1.05" in scaled.evidence


def test_a_linear_metric_is_sound_and_tight(two: Triplet) -> None:
    result = _check(PerceptualMetric(OrthogonalProjection(16, 24), 16), two)
    assert result.failures == () and result.violations == 0
    assert all(control.caught for control in result.controls)
    for kind in KINDS:
        boxes = [outcome.box for outcome in result.outcomes if outcome.kind.startswith(kind)]
        assert set(boxes) == ({True} if kind == "pixels" else {True, False})
    for outcome in result.outcomes:
        assert len(outcome.radius) == 2 and (outcome.ratios >= 1 - 1e-9).all()
        if outcome.kind.startswith(("reference", "retrieval")) and not outcome.box:
            assert len(outcome.ratios) == 2 and outcome.ratios.max() < 1 + 1e-6
    assert 1 - 1e-6 < result.reached <= result.lipschitz
    assert "violations: 0" in str(result) and "MISSED" not in str(result)


def _sll() -> PerceptualMetric:
    return PerceptualMetric(SLLNetwork(16, 8, channels=8, depth=1, linear_depth=1, linear_width=8), 16, anchor=0.0)


def _torchlip() -> PerceptualMetric:
    return PerceptualMetric(TorchlipNetwork(16, 8, blocks=(4, 2), depths=(1, 1), widths=(16, 16)), 16)


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize("make", [_sll, _torchlip])
def test_a_network_is_sound(make: Callable[[], PerceptualMetric], two: Triplet) -> None:
    said: list[str] = []
    result = verify(make(), two, steps=6, polish=10, progress=said.append)
    assert result.failures == ()
    assert "attacking 1 of 15 kinds of certificates, reference" in said and len(said) == 18
    broken = [outcome for outcome in result.outcomes if torch.isfinite(outcome.found).any()]
    assert len(broken) > 0.8 * len(result.outcomes)  # the attacks are strong enough to say something


@pytest.mark.no_cover
def test_controls_are_caught_on_long_features(two: Triplet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features a thousand times the anchor, as networks without contraction have them at 224 pixels."""
    for controls in ("tight_controls", "linear_controls"):  # which are about metrics of their own
        monkeypatch.setattr(f"lipsim.evaluation.verify.check.{controls}", lambda *_: [])

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = OrthogonalProjection(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x) + 1000

    metric = PerceptualMetric(Long(), 16, lipschitz=1.00001)
    assert metric.embed(two.reference).norm(dim=1).min() > 1000
    result = _check(metric, two)
    assert not result.violations and [c.caught for c in result.controls] == [True] * 5


@pytest.mark.usefixtures("no_controls")
@pytest.mark.no_cover
def test_batches_do_not_change_what_is_found(two: Triplet) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 24), 16)
    one, both = (verify(metric, two, steps=3, polish=4, batch_size=size) for size in (1, 8))
    for a, b in zip(one.outcomes, both.outcomes, strict=True):
        torch.testing.assert_close(a.found, b.found, rtol=1e-9, atol=0)
    for first, second in zip(one.layers, both.layers, strict=True):
        assert first[:2] == second[:2] and first[2] == pytest.approx(second[2], rel=1e-4)


@pytest.mark.usefixtures("no_controls")
def test_a_bound_that_is_5_percent_too_small_is_reported(two: Triplet) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 24), 16)
    metric.lipschitz = 0.95
    result = _check(metric, two)
    kinds = {outcome.kind for outcome in result.outcomes if outcome.violations.any()}
    assert {"reference", "retrieval, top 1", "distance ≤, ε 0.0001"} <= kinds
    assert result.violations > 10
    text = "\n".join(result.failures)
    assert "the encoder grows by" in text and "is below the audited one" in text and "reference (box off)" in text


@pytest.mark.usefixtures("no_controls")
def test_what_a_layer_that_declares_too_little_lets_happen_is_reported(two: Triplet) -> None:
    class Liar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.05 * x

        def lipschitz_bound(self) -> float:
            return 1.0

    encoder = nn.Sequential(OrthogonalProjection(16, 24), Liar())
    with pytest.raises(audit.UnboundedModuleError, match=r"Liar at '1' is bounded by 1 but reaches 1\.0[45]"):
        PerceptualMetric(encoder, 16)
    result = _check(PerceptualMetric(encoder, 16, lipschitz=1.0), two)
    assert any("the encoder grows by" in line for line in result.failures)
    assert any(outcome.kind == "reference" and outcome.violations.all() for outcome in result.outcomes)


def _plant(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable[..., Any]) -> None:
    """In the room, and in the file of it that certifies triplets."""
    for file in ("", ".triplets"):
        monkeypatch.setattr(f"lipsim.certificates{file}.{name}", replacement)


def _times(name: str, factor: float) -> Callable[..., Any]:
    original = getattr(certificates, name)

    def changed(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        return tuple(factor * part for part in result) if isinstance(result, tuple) else factor * result

    return changed


_PIXELS = certificates.certified_pixels


@pytest.mark.parametrize(
    ("name", "replacement", "kind"),
    [
        ("reference_radius", _times("reference_radius", 1.02), "reference"),
        ("joint_radius", _times("joint_radius", 1.02), "joint"),
        ("certified_pixels", lambda x, radius: _PIXELS(x, radius) + 1, "pixels"),
    ],
)
def test_a_wrong_certificate_fails_a_control(
    monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable[..., Any], kind: str
) -> None:
    _plant(monkeypatch, name, replacement)
    missed = [control for control in linear_controls(kinds=(kind,)) if not control.caught]
    assert any(control.name.endswith("exact") and kind in control.evidence for control in missed)


@pytest.mark.no_cover
def test_an_attack_that_does_not_move_fails_the_controls(monkeypatch: pytest.MonkeyPatch, two: Triplet) -> None:
    monkeypatch.setattr("lipsim.evaluation.verify.claims.minimal_norm", lambda objective, x, **options: x)
    result = _check(PerceptualMetric(OrthogonalProjection(16, 24), 16), two)
    assert result.violations == 0 and sum("control not caught" in line for line in result.failures) >= 3


@pytest.mark.usefixtures("no_controls")
@pytest.mark.no_cover
def test_certificates_as_deployed_must_hold(two: Triplet) -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 24), 16, feature_error=1e-5)
    assert _check(metric, two).failures == ()

    class Overclaiming(PerceptualMetric):
        @property
        def certificate_options(self) -> dict[str, float]:
            return {**super().certificate_options, "feature_error": 0.0, "lipschitz": 0.9}

    overclaiming = Overclaiming(metric.encoder, 16, feature_error=1e-5)
    assert any("reference as deployed" in line for line in _check(overclaiming, two).failures)


@pytest.mark.usefixtures("no_controls")
@pytest.mark.no_cover
def test_identical_images_certify_nothing_and_break_nothing() -> None:
    x = torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1)
    same = Triplet(x, x.clone(), torch.rand(3, 3, 16, 16), torch.zeros(3), torch.arange(3))
    tie = Triplet(same.reference, same.right, same.right, same.right_vote, same.index)
    for triplets in (same, tie):
        result = _check(PerceptualMetric(OrthogonalProjection(16, 8), 16), triplets, steps=2, polish=2)
        assert result.failures == () and "nan" not in str(result)


@pytest.mark.slow
def test_the_bundled_metric_is_sound() -> None:
    result = verify(lipsim.load("quickstart"), sample_triplets("builtin", 2, 64, resize="float"))
    assert result.failures == ()
    reference = next(outcome for outcome in result.outcomes if outcome.kind == "reference")
    assert reference.ratios.max() < 1.5


@pytest.mark.usefixtures("no_controls")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "metric.safetensors")
    options = ["--samples", "1", "--steps", "4"]
    assert _run("verify", file, *options) == 0
    output = capsys.readouterr().out
    assert "sound: every certificate held" in output and "violations: 0" in output
    assert _run("verify", file, *options, "--json", "--seed", "1") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["violations"] == 0 and facts["failures"] == []
    assert {row["box"] for row in facts["certificates"]} == {True, False}
    assert all(row["min"] is None or row["min"] >= 1 - 1e-9 for row in facts["certificates"])


@pytest.mark.no_cover
def test_a_broken_certificate_is_loud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "metric.safetensors")
    _plant(monkeypatch, "reference_radius", _times("reference_radius", 1.02))
    for controls in ("tight_controls", "mutant_controls"):  # which do not see this one
        monkeypatch.setattr(f"lipsim.evaluation.verify.check.{controls}", lambda *_: [])
    only = functools.partial(linear_controls, kinds=("reference",))
    monkeypatch.setattr("lipsim.evaluation.verify.check.linear_controls", only)
    assert _run("verify", file, "--samples", "1", "--steps", "4") == 1
    output = capsys.readouterr().out
    assert "FAILED: reference (box off): answer 0 changed" in output and "MISSED" in output and "sound" not in output


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = PerceptualMetric(SmallViT(16, patch_size=8, width=12, depth=1, heads=2), 16, lipschitz=math.inf)
    save(teacher, tmp_path / "teacher.safetensors")
    for args, message in (
        (["nothing.safetensors"], "no metric file"),
        ([tmp_path / "teacher.safetensors"], "no Lipschitz bound"),
        (["quickstart", "--samples", "0"], "--samples: expected an integer of at least 1"),
        (["quickstart", "--steps", "0"], "--steps: expected an integer of at least 1"),
        (["quickstart", "--data", "material"], "--root"),
        (["quickstart", "--data", "material", "--root", tmp_path], "no Material data"),
    ):
        assert _run("verify", *args) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def _run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return stop.value.code  # type: ignore[return-value]
