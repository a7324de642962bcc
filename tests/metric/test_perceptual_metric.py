"""The public face: distances, certificates, input checks, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lipsim
from lipsim import PerceptualMetric, certificates
from lipsim.audit import UnboundedModuleError
from lipsim.audit.arithmetic import ERROR_FACTOR, feature_error, largest_feature_error
from lipsim.certificates.geometry import cosine_distance
from lipsim.layers import freeze
from lipsim.metric import save
from lipsim.metric.graphs import metric_graphs
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, SLLNetwork
from lipsim.teachers import SmallViT
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision


@pytest.fixture
def metric() -> PerceptualMetric:
    encoder = OrthogonalShiftNetwork(16, 8, grid=4, widths=(8,), depths=(1,), linear_depth=1, linear_width=8)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return PerceptualMetric(encoder, 16).eval()


def test_distance_is_that_of_the_features(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 5, 3, 16, 16)
    torch.testing.assert_close(metric(x, y), cosine_distance(metric.embed(x), metric.embed(y)))
    torch.testing.assert_close(metric(x, x), torch.zeros(5), atol=1e-10, rtol=0)


def test_certificate_fields(metric: PerceptualMetric) -> None:
    x, x0, x1 = torch.rand(3, 7, 3, 16, 16)
    x0[0] = x1[0]
    certificate = metric.certify(x, x0, x1)
    assert certificate.prefers_left.dtype == torch.bool and not certificate.prefers_left[0]
    for name in ("margin", "radius", "left_radius", "right_radius", "joint_radius", "pixels"):
        column = getattr(certificate, name)
        assert column.shape == (7,) and column[0] == 0, name
    distances = metric(x.double().float(), x1) - metric(x, x0)
    torch.testing.assert_close(certificate.margin.float(), distances, atol=1e-5, rtol=1e-3)
    z, z0, z1 = (metric.embed(t).double() for t in (x, x0, x1))
    expected = certificates.reference_radius(z, z0, z1, lipschitz=metric.lipschitz)
    torch.testing.assert_close(certificate.radius, expected, rtol=1e-4, atol=1e-5)  # other batches, other rounding
    assert (certificate.joint_radius <= certificate.radius + 1e-12).all()


def test_radii_divide_by_the_bound_and_subtract_the_error(metric: PerceptualMetric) -> None:
    images = torch.rand(3, 7, 3, 16, 16)
    radius = metric.certify(*images).radius
    metric.lipschitz *= 2
    torch.testing.assert_close(metric.certify(*images).radius, radius / 2)
    metric.feature_error = 1e-4
    assert (metric.certify(*images).radius < radius / 2).all()


def test_distance_bounds_hold_under_noise(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 6, 3, 16, 16)
    lower, upper = metric.distance_bounds(x, y, 0.5)
    for _ in range(20):
        delta = torch.randn_like(x)
        delta *= 0.5 / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        distance = metric(x + delta, y, check_range=False).double()
        assert (lower <= distance + 1e-6).all() and (distance <= upper + 1e-6).all()


def test_intervals_are_of_pairs(metric: PerceptualMetric) -> None:
    x, y = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    expected = metric.distance_bounds(x, y[:1].expand_as(y), 0.5)
    torch.testing.assert_close(metric.distance_bounds(x, y[:1], 0.5), expected)
    with pytest.raises(ValueError, match="as many images on both sides, or one on either, got 3 and 2"):
        metric.distance_bounds(x, y[:2], 0.5)


def test_bad_arguments(metric: PerceptualMetric) -> None:
    with pytest.raises(ValueError, match=r"shape \(N, 3, 16, 16\), got \(2, 3, 32, 32\)"):
        metric(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="anchor ≥ 0"):
        PerceptualMetric(OrthogonalProjection(16, 4), 16, anchor=-1)
    with pytest.raises(ValueError, match="bound > 0"):
        PerceptualMetric(OrthogonalProjection(16, 4), 16, lipschitz=0.0)
    with pytest.raises(UnboundedModuleError, match="SmallViT"):
        PerceptualMetric(SmallViT(16, 8, 12, 1, 2), 16)


def test_the_bound_follows_the_weights() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    metric = PerceptualMetric(linear, 16)
    before = metric.lipschitz
    with torch.no_grad():
        linear[1].weight.mul_(5)
    assert metric.lipschitz == pytest.approx(5 * before, rel=1e-6)
    metric.lipschitz = 7.0
    assert metric.lipschitz == 7.0


def test_certify_refuses_what_it_cannot_certify(metric: PerceptualMetric) -> None:
    x = torch.rand(4, 3, 16, 16)
    with pytest.raises(ValueError, match="as many candidates"):
        metric.certify(x[:1], x, x)
    with pytest.raises(ValueError, match="half precision"):
        metric.certify(x, x, x.half())
    with pytest.raises(ValueError, match=r"in torch.float32, as the weights are, got torch.float64: x.to"):
        metric.certify(x, x.double(), x)
    with pytest.raises(ValueError, match="half precision"):
        metric.bfloat16().certify(*[x.bfloat16()] * 3)
    with pytest.raises(ValueError, match="feature_error ≥ 0"):
        PerceptualMetric(OrthogonalProjection(16, 4), 16, feature_error=math.nan)


def test_paths_are_refused_with_the_remedy(metric: PerceptualMetric) -> None:
    names: Any = ["x.png", "y.png", "z.png"]  # as lists of files come from people who expect them to be read
    for call in (metric.certify, lambda x, y, _: metric(x, y), lambda x, y, _: metric.distance_bounds(x, y, 0.5)):
        with pytest.raises(LipsimError, match=r"expected a tensor of images, got str; metric\.read makes one"):
            call(*names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_without_any_weights(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 16, 16)
    plain = PerceptualMetric(nn.Flatten(), 16)
    for position in range(3):
        images = [x.to(dtype) if i == position else x for i in range(3)]
        with pytest.raises(ValueError, match=f"float32 or float64 to certify, got {dtype}"):
            plain.certify(*images)
        with pytest.raises(ValueError, match=f"got {dtype}"):
            plain.certify_features(x, *(t.flatten(1) for t in images))
    with pytest.raises(ValueError, match=f"got {dtype}"):
        plain.distance_bounds(x, x.to(dtype), 0.1)

    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).to(dtype)

    with pytest.raises(ValueError, match=f"got {dtype}"):
        PerceptualMetric(Rounding(), 16, lipschitz=1.0).certify(x, x, x)
    buffered = nn.Flatten()
    buffered.register_buffer("mean", torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=r"encoder\.mean is stored in half precision"):
        PerceptualMetric(buffered, 16, lipschitz=1.0).certify(x, x, x)


@pytest.mark.parametrize("first", [nn.Identity(), nn.Flatten(), nn.Sequential(nn.Identity())], ids=lambda m: str(m)[:9])
def test_layers_in_place_leave_the_images_alone(first: nn.Module) -> None:
    metric = PerceptualMetric(nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten()), 16)
    x = torch.rand(2, 3, 16, 16)
    before = x.clone()
    z = metric.embed(x)
    assert torch.equal(z, before.relu().flatten(1))
    metric(x, x)
    metric.certify(x, x, x)
    metric.distance_bounds(x, x, 0.1)
    assert feature_error(metric.encoder, x) == 0.0
    assert torch.equal(x, before)
    x.requires_grad_()
    metric.embed(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


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


@pytest.mark.parametrize("name", ["anchor", "feature_error", "lipschitz"])
@pytest.mark.parametrize("value", [-1e4, math.nan, "1", True, None])
def test_numbers_that_widen_certificates_cannot_be_assigned(metric: PerceptualMetric, name: str, value: object) -> None:
    before = getattr(metric, name)
    with pytest.raises(ValueError, match="expected a "):
        setattr(metric, name, value)
    assert getattr(metric, name) == before
    if value is not None:  # which has a meaning for the bound
        with pytest.raises(ValueError, match="expected a "):
            PerceptualMetric(metric.encoder, 16, **{name: value})


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


CALLS = {
    "embed": lambda metric, x: metric.embed(x),
    "forward": lambda metric, x: metric(torch.rand(2, 3, 16, 16), x),
    "certify": lambda metric, x: metric.certify(torch.rand(2, 3, 16, 16), x, torch.rand(2, 3, 16, 16)),
    "distance_bounds": lambda metric, x: metric.distance_bounds(x, torch.rand(2, 3, 16, 16), 0.1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_images_of_another_range_or_shape_are_refused_with_the_remedy(metric: PerceptualMetric, call) -> None:  # type: ignore[no-untyped-def]
    x = torch.rand(2, 3, 16, 16)
    call(metric, x)
    call(metric, x.clamp(1e-7, 1) * (1 + 1e-6))
    for images, remedy in (
        (x * 255, "divide 8-bit images by 255"),
        ((x * 255).to(torch.uint8), "divide 8-bit images by 255"),
        (x * 2 - 1, r"\(x \+ 1\) / 2"),
        (torch.where(x > 0.5, torch.nan, x), "NaN"),
        (x.permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
    ):
        with pytest.raises(ValueError, match=remedy):
            call(metric, images)


def test_other_points_are_embedded_on_request(metric: PerceptualMetric) -> None:
    x = 5 * torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(metric.embed(x, check_range=False), metric.encoder(x))
    assert metric(x, x + 1, check_range=False).shape == (2,)
    assert metric.certify(x, x + 1, x - 1, check_range=False).radius.shape == (2,)  # of exact arithmetic
    metric.feature_error = 1e-6
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        metric.certify(x, x + 1, x - 1, check_range=False)
    inside = torch.rand(2, 3, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(metric(inside, torch.rand(1, 3, 16, 16)).sum(), inside)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    with pytest.raises(ValueError, match="as many images on both sides"):
        metric(torch.rand(2, 3, 16, 16), torch.rand(3, 3, 16, 16))


def test_an_exported_graph_checks_no_values(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 2, 3, 16, 16)
    metric.requires_grad_(False)
    graph = torch.export.export(metric, (x, y)).module()
    torch.testing.assert_close(graph(x, y), metric(x, y))


def test_a_declared_bound_is_taken() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) / 2

        def lipschitz_bound(self) -> float:
            return 0.5

    assert PerceptualMetric(Half(), 16).lipschitz == pytest.approx(0.5, rel=1e-12)


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


def test_certifying_in_training_mode_uses_the_audited_weights() -> None:
    encoder = OrthogonalProjection(16, 8)
    with torch.no_grad():  # nearly dependent rows: one pass of Cholesky-QR, as in training, is not orthonormal
        encoder[2].weight[1] = encoder[2].weight[0] + 3e-4 * torch.randn(768) / 28
    metric = PerceptualMetric(encoder, 16).train()
    images = torch.rand(3, 4, 3, 16, 16)
    torch.testing.assert_close(metric.certify(*images).radius, metric.eval().certify(*images).radius)


def test_full_precision_switches_everything_off_and_back_on() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision():
                assert not torch.is_autocast_enabled("cpu")
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_images_of_another_dtype_are_refused_with_the_remedy(metric: PerceptualMetric) -> None:
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    for call in (lambda: metric(x, x), lambda: metric.embed(x), lambda: metric.certify(x, x, x)):
        with pytest.raises(ValueError, match=r"expected images in torch\.float32.*x\.to\(torch\.float32\)"):
            call()


def test_points_outside_the_range_are_certified_without_a_float32_error_only(metric: PerceptualMetric) -> None:
    x, y, z = torch.rand(3, 1, 3, 16, 16).unbind(0)
    metric.feature_error = 0.0
    assert float(metric.certify(2 * x, y, z, check_range=False).radius) > 0
    metric.feature_error = 1e-6
    with pytest.raises(ValueError, match="only where feature_error is 0"):
        metric.certify(2 * x, y, z, check_range=False)
    with pytest.raises(ValueError, match="only where feature_error is 0"):
        metric.distance_bounds(2 * x, y, 0.1, check_range=False)


def test_dtype_and_device_are_those_of_the_encoder(metric: PerceptualMetric) -> None:
    assert (metric.dtype, metric.device) == (torch.float32, torch.device("cpu"))
    assert metric.double().dtype == torch.float64
    assert PerceptualMetric(nn.Flatten(), 4).dtype == torch.float32  # no weights
    normalised = nn.BatchNorm2d(3, affine=False, device="meta")
    assert PerceptualMetric(normalised, 4, lipschitz=math.inf).device == torch.device("meta")  # buffers alone


def test_a_frozen_copy_answers_alike_and_leaves_the_metric_alone(metric: PerceptualMetric) -> None:
    metric.train()
    x, y = torch.rand(2, 2, 3, metric.image_size, metric.image_size)
    copy, exact = metric.frozen_copy(), metric.frozen_copy(torch.float64)
    assert metric.training and all(p.requires_grad for p in metric.parameters())
    for frozen in (copy, exact):
        assert not any(module.training for module in frozen.modules())
        assert not any(p.requires_grad for p in frozen.parameters())
    assert exact.dtype == torch.float64 and metric.dtype == torch.float32
    metric.eval()
    torch.testing.assert_close(copy(x, y), metric(x, y))
    torch.testing.assert_close(exact(x.double(), y.double()).float(), metric(x, y), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        next(copy.parameters()).zero_()
    assert next(metric.parameters()).any()


def test_the_error_of_features_is_measured_and_enlarged(metric: PerceptualMetric) -> None:
    declared = metric.declared_feature_error
    found = metric.measure_feature_error(thorough=False, factor=1)
    assert found == largest_feature_error(metric.encoder, metric.image_size, thorough=False) > 0
    assert metric.measure_feature_error(thorough=False) == ERROR_FACTOR * found
    assert metric.declared_feature_error == declared


@pytest.mark.parametrize("encoder", [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))])
def test_features_of_another_shape_are_refused(encoder: nn.Module) -> None:
    """They had distances too: one a row of a feature map, or one of a whole batch."""
    metric, (x, y, z) = PerceptualMetric(encoder, 8, lipschitz=1.0).eval(), torch.rand(3, 2, 3, 8, 8)
    for call in (
        lambda: metric(x, y),
        lambda: metric.embed(x),
        lambda: metric.certify(x, y, z),
        lambda: metric.distance_bounds(x, y, 0.1),
    ):
        with pytest.raises(
            ValueError, match=r"expected features \(N, D\) of the encoder, got \(.*end it with nn.Flatten"
        ):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_of_wide_features_in_half_precision(dtype: torch.dtype) -> None:
    """150,528 squares left the range of float16: all images were the same. The reference is float64 of equal input."""
    metric = PerceptualMetric(nn.Flatten(), 224).to(dtype)
    x = (0.8 + 0.2 * torch.rand(2, 3, 224, 224)).to(dtype)
    y = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    expected = PerceptualMetric(nn.Flatten(), 224)(x.double(), y.double())
    distance = metric(x, y)
    assert distance.dtype == dtype
    torch.testing.assert_close(distance.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_radii_from_features_in_half_precision_are_refused() -> None:
    metric = PerceptualMetric(OrthogonalProjection(8, 4), 8, lipschitz=1.0).half()
    with pytest.raises(ValueError, match="stored in half precision"):
        metric.reference_radius(*torch.rand(3, 2, 4))
