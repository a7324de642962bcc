"""A metric as people call it: options, batches, gradients, half precision, torch.compile."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import lipsim
from lipsim import PerceptualMetric
from lipsim.certificates.geometry import cosine_distance
from lipsim.layers.base import exact_copy, freeze
from lipsim.metric import near_duplicates
from lipsim.students import OrthogonalShiftNetwork


def small_encoder(spread: float = 0.2) -> OrthogonalShiftNetwork:
    encoder = OrthogonalShiftNetwork(16, 8, grid=4, widths=(8,), depths=(1,), linear_depth=1, linear_width=8)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=spread)
    return encoder


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(freeze(small_encoder()).requires_grad_(False), 16).eval()


@pytest.fixture
def bundled() -> PerceptualMetric:
    return lipsim.load("quickstart")


def near_duplicates_of(x: Tensor, amplitude: float = 1e-3) -> Tensor:
    return (x + amplitude * torch.randn_like(x)).clamp(0, 1)


def test_reduction_is_of_the_distances(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 5, 3, 16, 16)
    distances = metric(x, y)
    assert distances.shape == (5,)
    assert torch.equal(metric(x, y, reduction=None), distances) and torch.equal(
        metric(x, y, reduction="none"), distances
    )
    assert torch.equal(metric(x, y, reduction="mean"), distances.mean())
    assert torch.equal(metric(x, y, reduction="sum"), distances.sum())
    with pytest.raises(ValueError, match="reduction 'none', 'mean' or 'sum', got 'average'"):
        metric(x, y, reduction="average")  # type: ignore[arg-type]


def test_normalize_takes_images_from_minus_one_to_one(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 5, 3, 16, 16)
    torch.testing.assert_close(metric(2 * x - 1, 2 * y - 1, normalize=True), metric(x, y))
    with pytest.raises(ValueError, match="which a metric does with normalize=True"):
        metric(2 * x - 1, y)
    for images, remedy in (
        (255 * x, "divide them by 255, and leave normalize=True out"),
        (1.2 * (2 * x - 1), r"x\.clamp\(-1, 1\)"),
        ((x - 0.45) / 0.226, r"x \* std \+ mean, and leave"),
    ):
        with pytest.raises(ValueError, match=rf"images in \[-1, 1\], got values from .*{remedy}"):
            metric(images, 2 * y - 1, normalize=True)


def test_images_that_are_unlikely_to_be_normalized_raise_a_warning(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 5, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"none of these has a value below 0; images in \[0, 1\]") as caught:
        metric(x, 2 * y - 1, normalize=True)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("amplitude", [None, 1e-3, 0.02])
def test_distances_are_the_same_in_any_batch(bundled: PerceptualMetric, amplitude: float | None) -> None:
    x = torch.rand(33, 3, 64, 64)
    y = x.roll(1, 0) if amplitude is None else near_duplicates_of(x, amplitude)
    expected = bundled(x, y)
    for size in (1, 7, 32):
        parts = [bundled(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=0)
    strided = torch.rand(33, 3, 64, 128)[..., ::2].copy_(x)
    for images in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, strided):
        assert not images.is_contiguous()
        torch.testing.assert_close(bundled(images, y), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(bundled(x[:1], y[:9]), bundled(x[:1].expand(9, -1, -1, -1), y[:9]), rtol=1e-5, atol=0)


def test_distances_of_near_duplicates_have_their_digits(bundled: PerceptualMetric) -> None:
    x = torch.rand(9, 3, 64, 64)
    y = near_duplicates_of(x)
    y[4] = x[4]
    exact = exact_copy(bundled.encoder)
    expected = cosine_distance(exact(x.double()), exact(y.double()), bundled.anchor).float()
    assert expected.max() < 1e-5
    distance, single = bundled(x, y), bundled(x, y, check_range=False)
    assert distance[4] == 0
    others = torch.arange(9) != 4
    torch.testing.assert_close(distance[others], expected[others], rtol=1e-6, atol=0)
    assert ((single - expected).abs() / expected)[others].max() > 2e-5  # what float32 makes of them
    assert (bundled(x.requires_grad_(), y) == bundled(x, y, check_range=False)).all()  # a loss is left alone


def test_the_exact_weights_follow_the_encoder_and_are_no_part_of_copies(metric: PerceptualMetric) -> None:
    x = torch.rand(3, 3, 16, 16)
    y = near_duplicates_of(x)
    before = metric(x, y)
    kept = metric._near_duplicates._exact
    assert kept is not None and metric(x, y) is not None and metric._near_duplicates._exact is kept
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other._near_duplicates._exact is None
        assert torch.equal(other(x, y), before)
    with torch.no_grad():
        next(metric.parameters()).add_(0.3 * torch.randn_like(next(metric.parameters())))
    exact = exact_copy(metric.encoder)
    expected = cosine_distance(exact(x.double()), exact(y.double())).float()
    torch.testing.assert_close(metric(x, y), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(before, expected, rtol=1e-3)


def test_the_exact_weights_see_hooks_and_attributes(metric: PerceptualMetric) -> None:
    x = torch.rand(3, 3, 16, 16)
    y = near_duplicates_of(x)
    before = metric(x, y)
    kept = metric._near_duplicates._exact
    hook = next(metric.encoder.children()).register_forward_hook(lambda _module, _input, output: 2 * output)
    assert (metric(x, y) != before).all()
    hook.remove()
    assert torch.equal(metric(x, y), before)
    assert metric._near_duplicates._exact is not kept
    kept = metric._near_duplicates._exact
    metric.encoder.note = (1, 2)  # type: ignore[assignment]
    metric(x, y)
    assert metric._near_duplicates._exact is not kept


def test_only_audited_metrics_are_computed_in_float64() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return x.flatten(1)

    x = torch.rand(3, 3, 8, 8)
    assert (PerceptualMetric(Single(), 8, lipschitz=1.0)(x, near_duplicates_of(x)) < near_duplicates.NEAR).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_gradients_are_finite_at_identical_images(dtype: torch.dtype, anchor: float) -> None:
    metric = PerceptualMetric(freeze(small_encoder()).requires_grad_(False), 16, anchor).eval().to(dtype)
    x = torch.rand(3, 3, 16, 16, dtype=dtype)
    for moving, fixed in ((x.clone().requires_grad_(), x), (x.clone().requires_grad_(), None)):
        distance = metric(moving, moving if fixed is None else fixed, reduction="sum")
        (gradient,) = torch.autograd.grad(distance, moving, create_graph=True)
        assert distance == 0 and not gradient.any() and not gradient.isnan().any()
        (second,) = torch.autograd.grad((gradient * torch.randn_like(gradient)).sum(), moving)
        assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_finite_under_autocast(metric: PerceptualMetric, dtype: torch.dtype) -> None:
    x, y = torch.rand(2, 3, 3, 16, 16)
    for other in (x, y):
        moving = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            distance = metric(moving, other, reduction="sum")
        distance.backward()
        assert moving.grad is not None and moving.grad.isfinite().all()
        assert bool(moving.grad.any()) == (other is y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_gradients_are_finite_at_zero_features(dtype: torch.dtype, anchor: float) -> None:
    z, y = torch.zeros(2, 5, dtype=dtype, requires_grad=True), torch.randn(2, 5, dtype=dtype)
    y[1] = 0
    distance = cosine_distance(z, y, anchor)
    (gradient,) = torch.autograd.grad(distance.sum(), z, create_graph=True)
    assert distance.isfinite().all() and gradient.isfinite().all()
    (second,) = torch.autograd.grad(gradient.sum(), z, allow_unused=True)
    assert second is None or second.isfinite().all()


def test_gradients_to_the_images_are_those_of_the_distance() -> None:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Softplus())
    metric = PerceptualMetric(encoder, 2, lipschitz=1.0).double().eval().requires_grad_(False)
    x, y = (0.1 + 0.8 * torch.rand(2, 2, 3, 2, 2, dtype=torch.float64)).unbind()
    same = x.clone()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: metric(t, y), (x,))
    for other in (y, same):  # where the distance is 0, too
        assert torch.autograd.gradgradcheck(lambda t, other=other: metric(t, other), (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at the first forward derivative
def test_forward_derivatives_pass_through_near_duplicates(metric: PerceptualMetric) -> None:
    y, direction = torch.rand(2, 3, 3, 16, 16)
    x = near_duplicates_of(y)
    _, tangent = torch.func.jvp(lambda t: metric(t, y), (x,), (direction,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(metric(forward_ad.make_dual(x, direction), y)).tangent
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(moving, y).sum(), moving)
    expected = (gradient * direction).flatten(1).sum(1)
    assert expected.all()
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(dual, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_keeps_the_distances(bundled: PerceptualMetric, dtype: torch.dtype, rtol: float) -> None:
    x, y = torch.rand(2, 8, 3, 64, 64)
    y = (0.5 * y + 0.3 * torch.rand(8, 3, 1, 1)).clamp(0, 1)  # as far apart as photographs are
    expected = bundled(x, y)
    assert expected.min() > 0.05
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(bundled(x, y).float(), expected, rtol=rtol, atol=0)
    half = bundled.frozen_copy(dtype)
    distance = half(x.to(dtype), y.to(dtype))
    assert distance.dtype == dtype
    torch.testing.assert_close(distance.float(), expected, rtol=rtol, atol=0)
    assert torch.equal(copy.deepcopy(half)(x.to(dtype), y.to(dtype)), distance)
    with pytest.raises(ValueError, match=rf"images in {dtype}, as the weights are, got torch.float32"):
        half(x, y)
    with pytest.raises(ValueError, match="half precision"):
        half.certify(x.to(dtype), y.to(dtype), x.to(dtype))


def test_a_folded_layer_in_half_precision_follows_its_parameters(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 4, 3, 16, 16, dtype=torch.float16)
    metric.half()
    before = metric(x, y)
    with torch.no_grad():
        for parameter in metric.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    after = metric(x, y)
    assert not torch.allclose(before, after, rtol=0.02)
    torch.testing.assert_close(metric.float()(x.float(), y.float()), after.float(), rtol=0.05, atol=0.01)


def test_a_compiled_metric_is_one_graph_and_answers_alike(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 4, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        compiled = torch.compile(metric, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x, y), metric(x, y), rtol=1e-6, atol=0)
        with torch.no_grad():
            weight = next(metric.parameters())
            weight.add_(0.3 * torch.randn_like(weight))
        assert compiled(x, y).isnan().all()  # the graph has the weights of before: it must not answer for others
        freeze(metric)
        torch.testing.assert_close(compiled(x, y), metric(x, y), rtol=1e-6, atol=0)
    torch._dynamo.reset()


@pytest.mark.slow  # inductor compiles C++ for a minute
@pytest.mark.filterwarnings("ignore")
def test_the_default_compiler_answers_alike(bundled: PerceptualMetric) -> None:
    compiled = torch.compile(bundled, fullgraph=True)
    for size in (4, 3):
        x, y = torch.rand(2, size, 3, 64, 64)
        torch.testing.assert_close(compiled(x, y), bundled(x, y), rtol=1e-5, atol=0)
        images = [x.clone().requires_grad_() for _ in range(2)]
        gradients = [torch.autograd.grad(f(t, y).sum(), t)[0] for f, t in zip((compiled, bundled), images, strict=True)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
