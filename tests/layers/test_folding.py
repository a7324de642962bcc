"""Folded weights follow every change of the parameters; copies keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipsim import PerceptualMetric
from lipsim.layers import (
    AOLConv2d,
    AOLLinear,
    CPLLinear,
    ExplicitLinear,
    OrthogonalLinear,
    OrthogonalPatches,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
    exact_copy,
    freeze,
)
from lipsim.layers.base import FoldedLayer
from lipsim.students import OrthogonalProjection


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


def test_an_exact_copy_keeps_the_weights_that_float32_derives() -> None:
    layer = nn.Sequential(OrthogonalLinear(40, 10), SLLLinear(10, 8)).eval()
    copy = exact_copy(layer)
    for mine, theirs in zip(layer, copy, strict=True):
        assert torch.equal(mine.derive()[0].double(), theirs.weights()[0])  # type: ignore[operator]
    x = torch.randn(5, 40)
    torch.testing.assert_close(copy(x.double()).float(), layer.eval()(x), rtol=1e-5, atol=1e-5)
    assert next(layer.parameters()).dtype == torch.float32 and not any(p.requires_grad for p in copy.parameters())


def test_an_exact_copy_changes_its_precision_as_a_whole() -> None:
    torch.manual_seed(0)
    layer, x = OrthogonalLinear(6, 4).eval(), torch.rand(3, 6)
    torch.testing.assert_close(exact_copy(layer).float()(x), layer(x), rtol=1e-5, atol=1e-6)


def test_an_exact_copy_can_be_copied() -> None:
    """Layers of other packages, whose copies have no source to derive weights from."""
    layer = nn.Sequential(SpectralConv2d(3, 4), nn.Flatten(), SpectralLinear(16, 5)).eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    once = exact_copy(layer)
    twice = exact_copy(once)
    assert torch.equal(once(x), twice(x)) and {p.dtype for p in twice.parameters()} == {torch.float64}
    torch.testing.assert_close(twice(x).float(), layer(x.float()), rtol=1e-5, atol=1e-5)


def test_freezing_while_training_does_not_leave_stale_weights() -> None:
    layer, x = SLLLinear(5, 4).train(), torch.randn(3, 5)
    layer.freeze()
    layer.train()
    layer(x).square().sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))


LAYERS: dict[str, tuple[Callable[[], FoldedLayer], tuple[int, ...]]] = {
    "sll-linear": (lambda: SLLLinear(5, 4), (5,)),
    "sll-conv": (lambda: SLLConv2d(2, 3), (2, 4, 4)),
    "cpl-linear": (lambda: CPLLinear(5, 4), (5,)),
    "aol-linear": (lambda: AOLLinear(5, 4, bias=False), (5,)),
    "orthogonal-linear": (lambda: OrthogonalLinear(5, 4), (5,)),
    "patches": (lambda: OrthogonalPatches(2, 3, patch=2, bias=False), (2, 4, 4)),
    "explicit-linear": (lambda: ExplicitLinear(nn.Linear(5, 4)), (5,)),
}


def _in_place(weight: Tensor) -> None:
    with torch.inference_mode():
        weight.view(-1)[0] += 2.0


def _through_numpy(weight: Tensor) -> None:
    weight.detach().numpy().reshape(-1)[1] -= 3.0


def _through_data(weight: Tensor) -> None:
    weight.data.view(-1)[::2] *= -1.0


def _fused_step(weight: Tensor) -> None:
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()


def _swapped(weight: Tensor) -> None:
    weight.data = weight.detach().flip(1).clone()


@pytest.mark.parametrize("edit", [_in_place, _through_numpy, _through_data, _fused_step, _swapped])
@pytest.mark.parametrize("name", LAYERS)
def test_folded_weights_are_those_of_the_bits(name: str, edit: Callable[[Tensor], None]) -> None:
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(3, *shape)
    freeze(layer)
    before = layer(x)
    assert layer.weights() is layer.weights()  # folded
    edit(next(layer.parameters()))
    twin = make().eval()
    twin.load_state_dict(layer.state_dict())
    after = layer(x)
    torch.testing.assert_close(after, twin(x))
    assert not torch.allclose(after, before)
    assert layer.lipschitz_bound() == twin.lipschitz_bound()


class _Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight + torch.eye(*weight.shape)


def test_parametrised_weights_without_a_bias() -> None:
    layer, other = (OrthogonalLinear(5, 4, bias=False) for _ in range(2))
    for each in (layer, other):
        parametrize.register_parametrization(each, "weight", _Doubled())
    freeze(layer)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), other.eval()(x))
    freeze(layer)
    layer.parametrizations.weight[0].factor = -3.0  # type: ignore[index,union-attr]
    other.parametrizations.weight[0].factor = -3.0  # type: ignore[index,union-attr]
    torch.testing.assert_close(layer(x), other(x))


def test_attributes_that_the_weights_depend_on() -> None:
    layer = freeze(AOLConv2d(2, 3, kernel_size=3, stride=1))
    kernel = layer.weights()[0]  # type: ignore[operator]
    layer.stride = 2  # type: ignore[assignment]
    assert not torch.allclose(layer.weights()[0], kernel)  # type: ignore[operator]


def test_not_a_number_is_no_change() -> None:
    layer = AOLLinear(5, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    assert freeze(layer).weights() is layer.weights()  # type: ignore[operator]


def test_negative_zero_is_a_change() -> None:
    layer = AOLLinear(5, 4)
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
    freeze(layer)
    assert not torch.signbit(layer.weights()[0][0, 0])
    layer.weight.data[0, 0] = -0.0
    assert torch.signbit(layer.weights()[0][0, 0])


def test_copies_of_folded_layers_are_their_own() -> None:
    layer, x = freeze(SLLLinear(5, 4)), torch.randn(3, 5)
    copy = deepcopy(layer)
    before = layer(x)
    with torch.no_grad():
        copy.weight.mul_(-2.0)  # type: ignore[operator,union-attr]
    assert torch.equal(layer(x), before)
    assert not torch.allclose(copy(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at the first forward derivative
def test_folded_weights_inside_transforms() -> None:
    layer, x = freeze(OrthogonalLinear(5, 4)), torch.randn(5)
    expected = layer.weights()[0]  # type: ignore[operator]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(layer)(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x.expand(2, 5)), layer(x.expand(2, 5)))
    layer.weight.data.mul_(torch.randn(4, 5))  # type: ignore[operator,union-attr]
    torch.testing.assert_close(torch.func.jacrev(layer)(x), OrthogonalLinear.derive(layer)[0])  # type: ignore[arg-type]

    # Parameters that a transform carries through have derivatives, frozen or not.
    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square().sum()

    weight = layer.weight.detach()  # type: ignore[operator,union-attr]
    gradient = torch.func.grad(loss)(freeze(layer).weight.detach())  # type: ignore[operator,union-attr]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(weight.expand(2, 4, 5))[1], gradient)
    assert gradient.abs().max() > 0


def test_a_second_exact_copy() -> None:
    layer, x = ExplicitLinear(nn.Linear(5, 4)), torch.randn(3, 5, dtype=torch.float64)
    first = exact_copy(layer)
    assert torch.equal(exact_copy(first)(x), first(x))


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore")  # torch's compiler calls what torch itself deprecates
def test_compiled_layers_follow_their_parameters() -> None:
    layer, x = SLLLinear(5, 4), torch.randn(3, 5)
    freeze(layer)
    run = torch.compile(layer)
    torch.testing.assert_close(run(x), layer(x))
    layer.weight.data.mul_(torch.randn(4, 5))
    torch.testing.assert_close(run(x), layer(x))
    torch.testing.assert_close(layer(x), layer.train()(x))


def test_folded_weights_that_are_edited_are_audited_again() -> None:
    metric = PerceptualMetric(freeze(OrthogonalProjection(8, 16)), 8)
    assert metric.lipschitz == pytest.approx(1, abs=1e-5)
    metric.encoder[2].weights()[0].mul_(5)
    assert metric.lipschitz == pytest.approx(5, abs=1e-4)


@pytest.mark.parametrize("build", [lambda: SLLLinear(6, 4), lambda: OrthogonalLinear(6, 4)])
def test_parameters_that_take_the_place_of_folded_ones_have_their_derivatives(build: Callable[[], nn.Module]) -> None:
    layer = build().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for frozen in (False, True):
        layer.eval()
        if frozen:
            freeze(layer)
        own = {name: p.detach().clone().requires_grad_(True) for name, p in layer.named_parameters()}
        out = torch.func.functional_call(layer, own, x)
        found.append(torch.autograd.grad(out.square().sum(), list(own.values()), allow_unused=True))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)
