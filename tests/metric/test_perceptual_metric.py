"""The public face: distances, certificates, input checks, files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lipsim import PerceptualMetric, certificates
from lipsim.audit import UnboundedModuleError
from lipsim.audit.arithmetic import ERROR_FACTOR, feature_error, largest_feature_error
from lipsim.certificates.geometry import cosine_distance
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork
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
