"""Layers against their exact Jacobians, at initialisation, after optimisation and with extreme parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.layers import (
    Centering,
    ChannelPadding,
    LipschitzLayer,
    MaxMin,
    OrthogonalLinear,
    ScaledAvgPool2d,
    SLLConv2d,
    SLLLinear,
    SpaceToDepth,
    Truncation,
    freeze,
)

CASES: dict[str, tuple[Callable[[], LipschitzLayer], tuple[int, ...]]] = {
    "sll-linear": (lambda: SLLLinear(12, 8), (12,)),
    "sll-linear-wide": (lambda: SLLLinear(6, 20), (6,)),
    "sll-conv-3": (lambda: SLLConv2d(4, 3), (4, 6, 5)),
    "sll-conv-wide": (lambda: SLLConv2d(3, 7), (3, 5, 5)),
    "sll-conv-5": (lambda: SLLConv2d(2, 3, kernel_size=5), (2, 7, 7)),
    "sll-conv-1": (lambda: SLLConv2d(3, 3, kernel_size=1), (3, 4, 4)),
    "orthogonal-linear": (lambda: OrthogonalLinear(12, 5), (12,)),
    "orthogonal-square": (lambda: OrthogonalLinear(6, 6, bias=False), (6,)),
    "max-min": (MaxMin, (6, 3, 3)),
    "space-to-depth": (lambda: SpaceToDepth(2), (3, 4, 6)),
    "scaled-pool": (lambda: ScaledAvgPool2d(2), (2, 5, 4)),
    "channel-padding": (lambda: ChannelPadding(3, 5), (3, 3, 3)),
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
    layer.double()
    bound = layer.lipschitz_bound()
    assert bound <= 1 + 1e-5
    for scale in (0.1, 1.0, 10.0):
        for _ in range(3):
            assert _sigma(layer, scale * torch.randn(shape, dtype=torch.float64)) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("name", ["sll-linear", "sll-conv-3", "sll-conv-5", "orthogonal-linear", "orthogonal-square"])
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


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-12, 1e12])
@pytest.mark.parametrize("name", ["sll-linear", "sll-conv-3"])
def test_sll_at_extreme_weights(name: str, scale: float) -> None:
    make, shape = CASES[name]
    layer = make()
    with torch.no_grad():
        for parameter in (layer.weight if name == "sll-linear" else layer.kernel,):  # type: ignore[union-attr]
            parameter.mul_(scale)
    x = torch.randn(4, *shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    assert layer.lipschitz_bound() <= 1 + 1e-5
    if scale == 0:
        torch.testing.assert_close(y, x)


def test_bound_notices_a_missing_absolute_value() -> None:
    class WithoutAbsolute(SLLLinear):
        def derive(self) -> tuple[Tensor, Tensor]:
            ratio = torch.exp(self.q.unsqueeze(0) - self.q.unsqueeze(1))
            scale = 1 / ((self.weight @ self.weight.mT) * ratio).sum(1)
            return self.weight, 2 * self.weight.mT * scale

    layer = WithoutAbsolute(6, 4).double()
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


@pytest.mark.parametrize("name", ["sll-linear", "sll-conv-3", "sll-conv-5", "orthogonal-linear"])
def test_gradients_in_float64(name: str) -> None:
    make, shape = CASES[name]
    layer = make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, *shape, dtype=torch.float64)

    def forward(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, values, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_freezing_changes_nothing(name: str) -> None:
    make, shape = CASES[name]
    layer = make()
    x = torch.randn(3, *shape)
    expected = layer(x).detach()
    freeze(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_frozen_weights_follow_every_change_of_the_parameters() -> None:
    layer = SLLLinear(5, 4)
    x = torch.randn(3, 5)
    freeze(layer)
    with torch.no_grad():
        layer.weight.add_(1.0)
    stepped = layer(x)
    torch.testing.assert_close(stepped, layer.train()(x))
    freeze(layer)
    layer.load_state_dict(SLLLinear(5, 4).state_dict())
    torch.testing.assert_close(layer(x), layer.train()(x))
    freeze(layer).double()
    assert layer(x.double()).dtype == torch.float64
    layer.train()
    layer(x.double()).sum().backward()
    assert layer.weight.grad is not None


def test_fused_optimizers_do_not_leave_stale_weights() -> None:
    layer, x = SLLLinear(5, 4), torch.randn(3, 5)
    freeze(layer)
    layer.train()
    layer(x).square().sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()  # counts no version
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))


def test_pooling_agrees_with_torchlip() -> None:
    from deel import torchlip

    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(ScaledAvgPool2d(2)(x), torchlip.ScaledAvgPool2d(2)(x))


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


def test_isometries() -> None:
    x = torch.randn(4, 3, 8, 8)
    for layer in (SpaceToDepth(4), ChannelPadding(3, 7)):
        torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    y = torch.randn(4, 6, 5)
    torch.testing.assert_close(MaxMin()(y).flatten(1).norm(dim=1), y.flatten(1).norm(dim=1))
    constant = torch.full((1, 2, 8, 8), 0.7)
    torch.testing.assert_close(ScaledAvgPool2d(4)(constant).norm(), constant.norm())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="odd kernel_size"):
        SLLConv2d(3, 3, kernel_size=2)
    with pytest.raises(ValueError, match="out_features ≤ in_features"):
        OrthogonalLinear(3, 4)
    with pytest.raises(ValueError, match="at least 3 channels"):
        ChannelPadding(3, 2)
    with pytest.raises(ValueError, match="at least 10 features"):
        Truncation(10)(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="even number"):
        MaxMin()(torch.zeros(1, 3))
