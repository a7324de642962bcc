"""Layers against their exact Jacobians, at initialisation, after optimisation and with extreme parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.audit import cross_check, trust
from lipsim.layers import (
    AOCConv2d,
    AOLConv2d,
    AOLLinear,
    Centering,
    ChannelPadding,
    ChannelShift,
    CPLConv2d,
    CPLLinear,
    ExplicitConv2d,
    GroupSort,
    Householder,
    L2NormPool2d,
    LipschitzLayer,
    MaxMin,
    OrthogonalLinear,
    OrthogonalPatches,
    ParallelMixing,
    ResidualMixing,
    ScaledAvgPool2d,
    Scattering,
    SLLConv2d,
    SLLLinear,
    SpaceToDepth,
    SpectralConv2d,
    SpectralLinear,
    Truncation,
    exact_copy,
    freeze,
)
from lipsim.layers.norms import conv_norm_bound


class MaxMin4(GroupSort):
    """Sorts all channels: any number of them."""

    def __init__(self) -> None:
        super().__init__(None)


def _small_conv() -> nn.Conv2d:
    conv = nn.Conv2d(2, 3, 3, dilation=2, padding=2, padding_mode="circular")
    with torch.no_grad():
        conv.weight.mul_(0.9 / conv_norm_bound(conv.weight, dilation=(2, 2)))
    return conv


CASES: dict[str, tuple[Callable[[], LipschitzLayer], tuple[int, ...]]] = {
    "sll-linear": (lambda: SLLLinear(12, 8), (12,)),
    "sll-linear-wide": (lambda: SLLLinear(6, 20), (6,)),
    "sll-conv-3": (lambda: SLLConv2d(4, 3), (4, 6, 5)),
    "sll-conv-wide": (lambda: SLLConv2d(3, 7), (3, 5, 5)),
    "sll-conv-5": (lambda: SLLConv2d(2, 3, kernel_size=5), (2, 7, 7)),
    "sll-conv-1": (lambda: SLLConv2d(3, 3, kernel_size=1), (3, 4, 4)),
    "sll-conv-even": (lambda: SLLConv2d(2, 3, kernel_size=4), (2, 5, 6)),
    "sll-conv-unpadded": (lambda: SLLConv2d(2, 3, kernel_size=3, padding=0), (2, 5, 6)),
    "sll-conv-padded": (lambda: SLLConv2d(2, 3, kernel_size=3, padding=2), (2, 5, 4)),
    "sll-conv-stride": (lambda: SLLConv2d(2, 5, kernel_size=3, stride=2), (2, 7, 6)),
    "sll-conv-stride-gap": (lambda: SLLConv2d(2, 5, kernel_size=2, stride=3, padding=0), (2, 7, 8)),
    "sll-conv-circular": (lambda: SLLConv2d(2, 3, kernel_size=5, padding_mode="circular"), (2, 4, 6)),
    "cpl-linear": (lambda: CPLLinear(12, 8), (12,)),
    "cpl-conv": (lambda: CPLConv2d(3, 4), (3, 5, 6)),
    "cpl-conv-stride": (lambda: CPLConv2d(2, 4, kernel_size=4, stride=2, padding=1), (2, 7, 6)),
    "cpl-conv-circular": (lambda: CPLConv2d(2, 3, padding_mode="circular"), (2, 5, 4)),
    "aol-linear": (lambda: AOLLinear(10, 7), (10,)),
    "aol-linear-tall": (lambda: AOLLinear(5, 9, bias=False), (5,)),
    "aol-conv": (lambda: AOLConv2d(3, 4), (3, 6, 5)),
    "aol-conv-stride": (lambda: AOLConv2d(2, 5, kernel_size=5, stride=3, padding=2), (2, 9, 8)),
    "aol-conv-even": (lambda: AOLConv2d(2, 3, kernel_size=2), (2, 5, 5)),
    "aol-conv-circular": (lambda: AOLConv2d(2, 6, stride=2, padding_mode="circular"), (2, 6, 4)),
    "orthogonal-linear": (lambda: OrthogonalLinear(12, 5), (12,)),
    "orthogonal-square": (lambda: OrthogonalLinear(6, 6, bias=False), (6,)),
    "orthogonal-tall": (lambda: OrthogonalLinear(5, 12), (5,)),
    "patches": (lambda: OrthogonalPatches(3, 8, patch=2), (3, 6, 4)),
    "patches-1": (lambda: OrthogonalPatches(3, 5), (3, 3, 3)),
    "aoc": (lambda: AOCConv2d(4, 6), (4, 5, 6)),
    "aoc-circular": (lambda: AOCConv2d(4, 4, padding_mode="circular"), (4, 5, 6)),
    "aoc-stride": (lambda: AOCConv2d(3, 8, kernel_size=4, stride=2), (3, 6, 6)),
    "torchlip-conv-1": (lambda: SpectralConv2d(4, 6), (4, 3, 3)),
    "torchlip-conv-3": (lambda: SpectralConv2d(3, 4, kernel_size=3), (3, 5, 5)),
    "torchlip-linear": (lambda: SpectralLinear(10, 6), (10,)),
    "explicit-dilated": (lambda: ExplicitConv2d(_small_conv()), (2, 7, 6)),
    "group-sort": (lambda: GroupSort(3), (6, 3)),
    "full-sort": (lambda: GroupSort(None), (7,)),
    "householder": (lambda: Householder(6), (6, 2, 3)),
    "l2-pool": (lambda: L2NormPool2d(2), (2, 5, 4)),
    "residual-mixing": (lambda: ResidualMixing(nn.Sequential(SLLConv2d(3, 4), MaxMin4())), (3, 4, 4)),
    "parallel-mixing": (
        lambda: ParallelMixing(OrthogonalLinear(8, 3), nn.Sequential(AOLLinear(8, 6), MaxMin()), 0.3),
        (8,),
    ),
    "max-min": (MaxMin, (6, 3, 3)),
    "space-to-depth": (lambda: SpaceToDepth(2), (3, 4, 6)),
    "scaled-pool": (lambda: ScaledAvgPool2d(2), (2, 5, 4)),
    "scattering": (lambda: Scattering(12, 4, orientations=3), (2, 12, 12)),
    "channel-padding": (lambda: ChannelPadding(3, 5), (3, 3, 3)),
    "channel-shift": (lambda: ChannelShift(10), (10, 3, 4)),
    "truncation": (lambda: Truncation(4), (9,)),
    "centering": (Centering, (3, 2, 2)),
}


def _sigma(layer: nn.Module, x: Tensor) -> float:
    """Largest singular value of the exact Jacobian at ``x``, in float64."""
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t.unsqueeze(0)).flatten(), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(jacobian.shape[0], -1), ord=2))


def _optimise(layer: nn.Module, shape: tuple[int, ...], steps: int = 30) -> None:
    """Push a layer to expand: the steps that would break a bound that only holds at initialisation."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        x, y = torch.randn(2, 16, *shape, dtype=parameters[0].dtype)
        growth = (layer(x) - layer(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        optimizer.zero_grad()
        (-growth.mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_jacobian_stays_below_the_bound(name: str, trained: bool) -> None:
    make, shape = CASES[name]
    layer = make()
    if trained:
        _optimise(layer, shape)
    if trained and name.startswith("explicit"):
        return  # nothing holds a plain convolution back
    layer.eval()
    bound = layer.lipschitz_bound()
    assert bound <= 1 + 1e-5
    exact = exact_copy(layer)  # the weights that float32 derives, in float64
    for scale in (0.1, 1.0, 10.0):
        for _ in range(3):
            assert _sigma(exact, scale * torch.randn(shape, dtype=torch.float64)) <= bound * (1 + 1e-12)


BOUNDS_USED = {"torchlip-conv-3": 0.5, "aol-conv-stride": 0.4, "aol-linear": 0.7, "sll-conv-stride-gap": 0.9}


@pytest.mark.parametrize("name", [name for name in CASES if name != "explicit-dilated"])
def test_the_budget_is_used_at_initialisation(name: str) -> None:
    make, shape = CASES[name]
    layer = exact_copy(make().eval())
    sigma = max(_sigma(layer, 5 * torch.randn(shape, dtype=torch.float64)) for _ in range(5))
    assert sigma >= BOUNDS_USED.get(name, 0.85)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_audit_refuses_no_sound_layer(name: str, dtype: torch.dtype) -> None:
    make, shape = CASES[name]
    layer = freeze(make()) if dtype == torch.float32 else exact_copy(make())
    assert [trust.fault(module) for module in layer.modules()] == [None] * len(list(layer.modules()))
    for scale in (1e-6, 1.0, 1e6):
        x = scale * torch.rand(2, *shape, dtype=dtype)
        assert cross_check.check(layer, x, layer.lipschitz_bound(), iterations=10)[1] is None
        tight = cross_check.check(layer, x, 0.5, iterations=10)[1]
        assert tight is not None and "is bounded by 0.5 but reaches" in tight


FLOAT32 = ["sll-linear", "sll-conv-3", "sll-conv-5", "sll-conv-stride", "orthogonal-linear", "orthogonal-square"]


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_bound_is_within_rounding_of_one(name: str) -> None:
    make, shape = CASES[name]
    layer = make()
    _optimise(layer, shape)
    bound = layer.lipschitz_bound()
    assert 0.3 < bound <= 1 + 1e-5
    exact = make().double()
    exact.load_state_dict(layer.state_dict())
    assert exact.lipschitz_bound() == pytest.approx(bound, abs=1e-5)


@pytest.mark.parametrize(("make", "shape"), [CASES["sll-linear"], CASES["sll-conv-3"]], ids=["linear", "conv"])
def test_sll_preserves_norm_at_initialisation(make: Callable[[], LipschitzLayer], shape: tuple[int, ...]) -> None:
    layer = make().double()
    x = torch.randn(200, *shape, dtype=torch.float64)
    ratio = layer(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert ratio.mean() > 0.98 and ratio.max() <= 1 + 1e-12


def test_sll_linear_is_the_published_formula() -> None:
    layer = SLLLinear(7, 5).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(9, 7, dtype=torch.float64)
    w, b, q = layer.weight, layer.bias, torch.exp(layer.q)
    t = 1 / ((w @ w.T).abs() * q[None, :] / q[:, None]).sum(1)
    expected = x - 2 * (t * torch.relu(x @ w.T + b)) @ w
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_sll_conv_is_the_published_formula() -> None:
    layer = SLLConv2d(3, 4).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    k, q = layer.kernel, torch.exp(layer.q)
    gram = F.conv2d(k, k, padding=2).abs().sum((2, 3))
    t = 1 / (gram * q[None, :] / q[:, None]).sum(1)
    inner = torch.relu(F.conv2d(x, k, padding=1) + layer.bias)
    expected = x - 2 * F.conv_transpose2d(t.view(1, -1, 1, 1) * inner, k, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


EXTREMES = ["sll-linear", "sll-conv-3", "sll-conv-stride", "cpl-linear", "cpl-conv", "aol-linear", "aol-conv-stride"]


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-12, 1e12])
@pytest.mark.parametrize("name", [*EXTREMES, "orthogonal-linear", "orthogonal-tall", "patches"])
def test_extreme_weights(name: str, scale: float) -> None:
    make, shape = CASES[name]
    layer = make()
    with torch.no_grad():
        next(layer.parameters()).mul_(scale)
    x = torch.randn(4, *shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    assert layer.lipschitz_bound() <= 1 + 1e-5
    if scale in (1e-12, 1e12):
        assert layer.lipschitz_bound() > 0.5  # it has not collapsed
    if scale == 0 and name.startswith(("sll", "cpl")):
        torch.testing.assert_close(y, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*EXTREMES, "orthogonal-linear", "patches"])
def test_bounds_hold_at_every_scale(name: str, dtype: torch.dtype) -> None:
    make, shape = CASES[name]
    layer, x = make().to(dtype).eval(), torch.randn(*shape, dtype=dtype)
    weight = next(layer.parameters())
    start, top = weight.detach().double(), 37 if dtype == torch.float32 else 307
    for exponent in (-top - 6, -top, -top // 2, -top // 4, top // 4, top // 2, top // 2 + 7, top - 2):
        with torch.no_grad():
            weight.copy_(start * 10.0**exponent)
        assert _sigma(layer, x) <= layer.lipschitz_bound() * (1 + 1e-5) < 1.001


def test_gains_of_large_weights_do_not_overflow() -> None:
    for layer, scale in ((CPLLinear(4, 4), 1e160), (CPLConv2d(2, 2), 1e160), (SLLLinear(4, 4), 1e-170)):
        with torch.no_grad():
            next(layer.double().parameters()).mul_(scale)
        assert layer.eval().lipschitz_bound() == pytest.approx(1, rel=1e-9)
    # U W of an ordinary size, from a W whose square is infinite: the identity is not all that it computes.
    layer = SLLLinear(3, 3).double().eval()
    eye = torch.eye(3, dtype=torch.float64)
    layer.pin((1e170 * eye, -1e-160 * eye))
    assert 1e10 <= layer.lipschitz_bound() < math.inf


def test_edited_circular_padding_has_no_bound() -> None:
    block, convolution, explicit = SLLConv2d(4, 4, stride=2), AOLConv2d(3, 3, padding=2), ExplicitConv2d(_small_conv())
    block.padding_mode = convolution.padding_mode = "circular"
    explicit.pads = (3, 3, 0, 0)
    for layer in (block, convolution, explicit):
        assert layer.lipschitz_bound() == math.inf


def test_bound_notices_a_missing_absolute_value() -> None:
    class WithoutAbsolute(SLLLinear):
        def derive(self) -> tuple[Tensor, Tensor]:
            ratio = torch.exp(self.q.unsqueeze(0) - self.q.unsqueeze(1))
            scale = 1 / ((self.weight @ self.weight.mT) * ratio).sum(1)
            return self.weight, -2 * self.weight.mT * scale

    layer = WithoutAbsolute(6, 4).double().eval()
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[1] = -0.5 * layer.weight[0]
    sigma = max(_sigma(layer, 5 * torch.randn(6, dtype=torch.float64)) for _ in range(20))
    assert sigma > 1.01
    assert layer.lipschitz_bound() >= sigma


def test_bound_notices_a_scaled_output() -> None:
    class Louder(SLLConv2d):
        def derive(self) -> tuple[Tensor, Tensor]:
            kernel, output = super().derive()
            return kernel, 1.5 * output

    layer = Louder(3, 3, kernel_size=1).double()
    sigma = max(_sigma(layer, torch.randn(3, 2, 2, dtype=torch.float64)) for _ in range(20))
    assert layer.lipschitz_bound() >= sigma > 1.5
    with torch.no_grad():
        layer.q[0] = -800.0  # its scale underflows to 0, and 0·∞ must not hide the other rows
    assert layer.lipschitz_bound() > 1.5


SMOOTH = [
    *("sll-linear", "sll-conv-3", "sll-conv-5", "sll-conv-even", "sll-conv-padded", "sll-conv-stride"),
    *("sll-conv-circular", "cpl-linear", "cpl-conv", "cpl-conv-stride", "aol-linear", "aol-conv-stride"),
    *("orthogonal-linear", "orthogonal-tall", "patches", "householder", "l2-pool", "residual-mixing"),
    "parallel-mixing",
]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_in_float64(name: str) -> None:
    make, shape = CASES[name]
    layer = make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, [x, *values], fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_freezing_changes_nothing(name: str) -> None:
    make, shape = CASES[name]
    layer = make()
    x = torch.randn(3, *shape)
    expected = layer(x).detach()
    freeze(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_orthogonal_rows_survive_training() -> None:
    layer = OrthogonalLinear(40, 10)
    _optimise(layer, (40,), steps=100)
    (q,) = layer.double().derive()
    torch.testing.assert_close(q @ q.mT, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)


def test_orthogonal_under_autocast_keeps_full_precision_weights() -> None:
    layer = OrthogonalLinear(40, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (q,) = layer.weights()
    assert q.dtype == torch.float32
    torch.testing.assert_close(q @ q.mT, torch.eye(10), atol=1e-5, rtol=0)


def _matrix(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return (layer(basis).flatten(1) - layer(torch.zeros_like(basis[:1])).flatten(1)).detach().T


@pytest.mark.parametrize("name", ["patches", "patches-1", "orthogonal-tall", "aoc-circular", "aoc-stride"])
def test_orthogonal_maps_have_singular_values_of_one(name: str) -> None:
    make, shape = CASES[name]
    layer = exact_copy(make().eval())
    if name == "aoc-stride":
        layer.circular = True  # type: ignore[assignment]
    values = torch.linalg.svdvals(_matrix(layer, shape))
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("sll-conv", "cpl-conv"))])
def test_residual_convolution_is_its_formula_with_the_exact_adjoint(name: str) -> None:
    """``x − 2 Wᵀ T relu(W x + b)`` with ``W`` and ``Wᵀ`` as matrices, for every kernel, stride and padding."""
    make, shape = CASES[name]
    layer = make().double()
    with torch.no_grad():
        layer.kernel.normal_()  # type: ignore[operator, union-attr]
        layer.bias.normal_()  # type: ignore[operator, union-attr]
    conv = nn.Conv2d(
        shape[0],
        len(layer.kernel),  # type: ignore[arg-type]
        layer.kernel.shape[-1],  # type: ignore[union-attr, arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        bias=False,
        padding_mode=layer.padding_mode,  # type: ignore[arg-type]
    ).double()
    conv.weight = nn.Parameter(layer.kernel.detach())  # type: ignore[operator, union-attr]
    w = _matrix(conv, shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    bias = layer.bias.expand(1, -1, *conv(x).shape[2:]).reshape(1, -1)  # type: ignore[operator, union-attr]
    scale = layer.scale().view(1, -1, 1, 1).expand(1, -1, *conv(x).shape[2:]).reshape(1, -1)  # type: ignore[operator]
    expected = x.flatten(1) - 2 * (scale * torch.relu(x.flatten(1) @ w.T + bias)) @ w
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x).flatten(1), expected, rtol=1e-11, atol=1e-11)


def test_adapters_compute_what_their_source_computes() -> None:
    for name in ("aoc", "aoc-circular", "aoc-stride", "torchlip-conv-1", "torchlip-conv-3", "torchlip-linear"):
        make, shape = CASES[name]
        layer, x = make().eval(), torch.randn(2, *shape)
        torch.testing.assert_close(layer(x), layer.source(x))  # type: ignore[operator, union-attr]
        copy = make().eval()
        copy.load_state_dict(layer.state_dict())
        torch.testing.assert_close(copy(x), layer(x), rtol=0, atol=2e-5)
        assert torch.equal(freeze(copy)(x), freeze(copy)(x))
        with torch.no_grad():
            original = next(p for n, p in copy.named_parameters() if "original" in n)
            original.add_(torch.randn_like(original))
        assert not torch.allclose(copy(x), layer(x), atol=1e-3)  # the folded weights are those of the new parameters
        assert 0.5 < copy.lipschitz_bound() <= 1 + 1e-5


def test_sources_are_read_once_a_training_step() -> None:
    class Counting(nn.Module):
        reads = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counting.reads += 1
            return weight

    source = nn.Conv2d(2, 2, 1)
    nn.utils.parametrize.register_parametrization(source, "weight", Counting())
    layer = ExplicitConv2d(source)
    Counting.reads = 0
    layer(torch.rand(1, 2, 3, 3))
    assert Counting.reads == 1


def test_an_unsound_third_party_layer_shows_its_norm() -> None:
    from orthogonium.layers.conv.adaptiveSOC import AdaptiveSOCConv2d

    source = AdaptiveSOCConv2d(16, 16, 3, padding_mode="circular")
    kernel = source.weight.detach()
    size = 8  # the exact norm at this size, from the matrix of the operator
    layer = ExplicitConv2d(source).eval()
    exact = float(torch.linalg.matrix_norm(_matrix(exact_copy(layer), (16, size, size)), ord=2))
    assert layer.lipschitz_bound() >= exact > 1 + 1e-3
    assert conv_norm_bound(kernel) == layer.lipschitz_bound()


def test_mixtures_contain_what_they_mix() -> None:
    x = torch.randn(4, 8)
    first, second = OrthogonalLinear(8, 3), OrthogonalLinear(8, 2)
    mixture = ParallelMixing(first, second, angle=0.0)
    torch.testing.assert_close(mixture(x), torch.cat([first(x), torch.zeros(4, 2)], dim=1))
    block = ResidualMixing(SLLLinear(8, 4), share=1e-6)
    torch.testing.assert_close(block(x), x, atol=1e-4, rtol=0)
    assert ResidualMixing(nn.Sequential(_scaled(3.0)), share=0.5).lipschitz_bound() == pytest.approx(2.0, rel=1e-6)
    assert ParallelMixing(_scaled(3.0), _scaled(4.0)).lipschitz_bound() == pytest.approx(12.5**0.5, rel=1e-6)


def _scaled(factor: float) -> ExplicitConv2d:
    conv = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(factor * torch.eye(2).view(2, 2, 1, 1))
    return ExplicitConv2d(conv)


@pytest.mark.parametrize("name", ["sll-conv-3", "sll-conv-even", "cpl-conv"])
def test_fused_training_pass_under_autocast(name: str) -> None:
    make, shape = CASES[name]
    layer, x = make(), torch.randn(8, *shape)
    expected = layer(x)
    expected.square().mean().backward()
    exact = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    for parameter, gradient in zip(layer.parameters(), exact, strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_frozen_parameters_and_folded_weights_let_gradients_through(name: str) -> None:
    make, shape = CASES[name]
    layer = make().requires_grad_(False)
    for folded in (False, True):
        x = torch.randn(2, *shape, requires_grad=True)
        (freeze(layer) if folded else layer)(x).sum().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()


def test_nearly_dependent_rows_come_out_orthonormal() -> None:
    for noise in (1e-3, 3e-4, 1e-4):
        layer = OrthogonalLinear(64, 8)
        with torch.no_grad():
            layer.weight[1] = layer.weight[0] + noise * torch.randn(64) / 8
        assert layer.eval().lipschitz_bound() <= 1 + 1e-5


def test_rows_of_different_lengths_do_not_loosen_the_bound() -> None:
    for layer in (SLLLinear(32, 16), SLLConv2d(16, 8)):
        with torch.no_grad():
            next(layer.parameters())[0] *= 100
        assert layer.lipschitz_bound() <= 1 + 1e-5


def test_pinned_copies_stay_as_they_are() -> None:
    for make, shape in (CASES["orthogonal-linear"], CASES["torchlip-linear"]):
        copy = exact_copy(make().eval())
        x = torch.randn(2, *shape, dtype=torch.float64)
        expected = copy(x)
        assert torch.equal(freeze(copy)(x), expected)


def test_half_precision_grams_only_in_training() -> None:
    layer = SLLLinear(64, 32)
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    exact = layer.scale()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(layer.scale(), exact)
        torch.testing.assert_close(layer.scale(), exact, rtol=0.02, atol=0)
        assert torch.equal(layer.eval().scale(), exact)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(layer.train().scale(), exact)


def test_large_matrices_start_orthonormal() -> None:
    layer = SLLLinear(4200, 300)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, torch.eye(300), atol=1e-5, rtol=0)
