"""Files of metrics: what they keep, what their headers cannot claim, and which are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lipsim
from lipsim import PerceptualMetric
from lipsim.audit.arithmetic import feature_error
from lipsim.layers import freeze
from lipsim.metric import save
from lipsim.metric.graphs import metric_graphs
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, SLLNetwork
from lipsim.teachers import SmallViT


@pytest.fixture
def metric() -> PerceptualMetric:
    encoder = OrthogonalShiftNetwork(16, 8, grid=4, widths=(8,), depths=(1,), linear_depth=1, linear_width=8)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return PerceptualMetric(encoder, 16).eval()


def test_a_header_cannot_claim_a_smaller_bound(metric: PerceptualMetric, tmp_path: Path) -> None:
    file = save(metric, tmp_path / "metric.safetensors")
    _rewrite(file, lambda s, h, m: h.update(lipschitz=0.01))
    with pytest.raises(ValueError, match=r"claims the Lipschitz bound 0.01, but its weights have 1.00000\d+"):
        lipsim.load(file)


def test_a_header_cannot_claim_a_smaller_error(metric: PerceptualMetric, tmp_path: Path) -> None:
    file = save(metric, tmp_path / "metric.safetensors")
    for claimed in (0.0, 1e-30):
        _rewrite(file, lambda s, h, m: h.update(feature_error=claimed))  # noqa: B023  (called at once)
        loaded = lipsim.load(file)
        assert loaded.declared_feature_error == claimed
        white = torch.ones(1, 3, 16, 16)
        assert loaded.feature_error >= 4 * feature_error(loaded.encoder, white) > 0
        found = loaded.feature_error
        assert loaded.certificate_options["feature_error"] == 2 * found
        again = json.loads(_metadata(save(loaded, tmp_path / "again.safetensors")))
        assert (again["feature_error"], again["feature_error_kind"]) == (found, "searched")
        assert loaded.double().feature_error == claimed  # which loses nothing against itself
    _rewrite(file, lambda s, h, m: h.update(feature_error=0.25))
    assert lipsim.load(file).feature_error == 0.25


def test_the_error_that_was_found_follows_the_weights(metric: PerceptualMetric, tmp_path: Path) -> None:
    loaded = lipsim.load(save(metric, tmp_path / "metric.safetensors"))
    before = loaded.feature_error
    with torch.no_grad():
        for name, parameter in loaded.encoder.named_parameters():
            if name.endswith("bias"):
                parameter += 1000
    assert loaded.feature_error > 10 * before
    loaded.feature_error = 1e-7  # declared by the user, who may
    assert loaded.feature_error == 1e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 63}, "encoder's image_size 16, got 63"),
        ({"image_size": 16.0}, "whole number image_size"),
        ({"image_size": -16}, "whole number image_size"),
        ({"image_size": None}, "whole number image_size"),
        ({"anchor": 1e200}, "anchor ≥ 0 and at most 1e"),
        ({"anchor": -1}, "anchor ≥ 0"),
        ({"anchor": math.nan}, "anchor ≥ 0"),
        ({"feature_error": -1e-9}, "feature_error ≥ 0"),
        ({"feature_error": math.inf}, "feature_error ≥ 0"),
        ({"feature_error": True}, "feature_error ≥ 0"),
        ({"lipschitz": "0.5"}, "Lipschitz bound ≥ 0"),
        ({"lipschitz": -1}, "Lipschitz bound ≥ 0"),
        ({"lipschitz": math.nan}, "Lipschitz bound ≥ 0"),
        ({"lipschitz": math.inf}, "Lipschitz bound ≥ 0"),
        ({"resize": 5}, "expected resize to be one of"),
        ({"framing": "fit"}, "it names the framing 'fit'"),
        ({"framing": ["pad"]}, "it names the framing"),
        ({"framing": "tiles", "grid": 0}, "grid ≥ 1"),
        ({"config": {"image_size": -16}}, "cannot rebuild"),
        ({"config": {"image_size": 0}}, "cannot rebuild"),
        ({"config": {"image_size": 16.5}}, "cannot rebuild"),
        ({"config": 3}, "cannot rebuild"),
    ],
)
def test_headers_with_numbers_that_no_metric_has(
    metric: PerceptualMetric, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = save(metric, tmp_path / "metric.safetensors")
    _rewrite(file, lambda s, h, m: h.update(change))
    with pytest.raises(ValueError, match=message) as error:
        lipsim.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    "encoder",
    [
        OrthogonalProjection(16, 8),
        OrthogonalShiftNetwork(16, 8, grid=4, widths=(8, 16), depths=(1, 1), linear_depth=1, linear_width=8),
        SLLNetwork(16, 6, channels=6, depth=2, linear_depth=2, linear_width=5),
        SmallViT(16, 8, 12, 1, 2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_file_round_trip(encoder: nn.Module, tmp_path: Path) -> None:
    lipschitz = math.inf if isinstance(encoder, SmallViT) else None
    metric = PerceptualMetric(encoder, 16, anchor=0.7, lipschitz=lipschitz, feature_error=1e-3, resize="pil").eval()
    loaded = lipsim.load(save(metric, tmp_path / "sub" / "metric.safetensors", notes={"trained on": "noise"}))
    images = torch.rand(3, 5, 3, 16, 16)
    torch.testing.assert_close(loaded(images[0], images[1]), metric(images[0], images[1]), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loaded.certify(*images).radius, metric.certify(*images).radius, rtol=1e-5, atol=0)
    for name in ("image_size", "anchor", "lipschitz", "feature_error"):
        assert getattr(loaded, name) == getattr(metric, name)
    assert loaded.preprocess.resize == "pil"  # type: ignore[attr-defined]
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_files_that_cannot_be_loaded(metric: PerceptualMetric, tmp_path: Path) -> None:
    file = save(metric, tmp_path / "metric.safetensors")
    with pytest.raises(FileNotFoundError, match="no metric file"):
        lipsim.load(tmp_path / "other.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        lipsim.load(truncated)
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(file), plain)
    with pytest.raises(ValueError, match="no exported metric"):
        lipsim.load(plain)


def _metadata(file: Path) -> str:
    with safe_open(file, framework="pt") as archive:
        return archive.metadata()["metric"]


def _rewrite(file: Path, change) -> Path:  # type: ignore[no-untyped-def]
    with safe_open(file, framework="pt") as archive:
        metadata = archive.metadata()
    state, header = load_file(file), json.loads(metadata["metric"])
    change(state, header, metadata)
    metadata["metric"] = json.dumps(header)
    save_file(state, file, metadata=metadata)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, h, m: s.pop(next(iter(s))), "1 missing"),
        (lambda s, h, m: s.update(extra=torch.zeros(1)), "1 unexpected .first: extra"),
        (lambda s, h, m: h["config"].update(widths=[10]), "of another shape"),
        (lambda s, h, m: h.update(encoder="os.system"), "it names the encoder os.system"),
        (lambda s, h, m: m.update(version="99"), "newer than"),
        (lambda s, h, m: h.pop("anchor"), "cannot rebuild"),
        (lambda s, h, m: h["config"].update(flavour=1), "cannot rebuild"),
    ],
)
def test_files_of_another_architecture(metric: PerceptualMetric, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    file = _rewrite(save(metric, tmp_path / "metric.safetensors"), change)
    with pytest.raises(ValueError, match=message):
        lipsim.load(file)


def test_unknown_encoders_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot export"):
        save(PerceptualMetric(nn.Flatten(), 16), tmp_path / "metric.safetensors")


def test_a_bound_follows_what_changes_the_encoder(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    metric = PerceptualMetric(encoder, 16)
    first = metric.lipschitz
    metric.train()
    encoder(torch.rand(2, 3, 16, 16)).square().sum().backward()
    torch.optim.Adam(encoder.parameters(), lr=1.0, fused=True).step()  # counts no version
    assert metric.eval().lipschitz > 10 * first
    before = metric.lipschitz
    encoder.append(nn.LeakyReLU(10.0))
    assert metric.lipschitz == pytest.approx(10 * before)
    projection = PerceptualMetric(OrthogonalProjection(16, 8), 16)
    loaded = lipsim.load(save(projection, tmp_path / "m.safetensors"))
    assert loaded.lipschitz == pytest.approx(1, abs=1e-5)
    loaded.encoder.append(nn.LeakyReLU(3.0))
    assert loaded.lipschitz == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("declared", ["nan", math.nan, -1.0, [1.0]])
def test_headers_with_impossible_bounds(tmp_path: Path, declared: object) -> None:
    file = save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "m.safetensors")
    _rewrite(file, lambda s, h, m: h.update(lipschitz=declared))
    with pytest.raises(ValueError, match="cannot rebuild"):
        lipsim.load(file)
    with pytest.raises(ValueError, match="Lipschitz bound > 0"):
        lipsim.load("quickstart").lipschitz = math.nan


def test_a_metric_whose_weights_have_collapsed_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    """Its bound is 0: it answers nothing, but whoever looks for what went wrong can load it."""
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16).eval()
    with torch.no_grad():
        for parameter in metric.encoder.parameters():
            parameter.zero_()
    freeze(metric)
    file = save(metric, tmp_path / "m.safetensors")
    again, images = lipsim.load(file), torch.rand(3, 2, 3, 16, 16)
    assert again.lipschitz == 0 and not again.certify(*images).radius.any()
    with torch.no_grad():
        radius, left = metric_graphs(again, ["radius"]).modules["radius"](*images)
    assert not radius.any() and not left.any()
    own = save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="claims the Lipschitz bound 0"):
        lipsim.load(_rewrite(own, lambda s, h, m: h.update(lipschitz=0.0)))


def test_a_header_can_only_raise_the_bound(tmp_path: Path) -> None:
    file = save(PerceptualMetric(OrthogonalProjection(16, 8), 16), tmp_path / "m.safetensors")
    assert lipsim.load(_rewrite(file, lambda s, h, m: h.update(lipschitz=2.0))).lipschitz == 2.0
