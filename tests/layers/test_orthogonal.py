"""The orthonormal maps in training: what is solved for without the matrix, and its closed-form gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.layers import OrthogonalLinear
from lipsim.layers.orthogonal import orthonormal


class Doubled(OrthogonalLinear):
    """Derives its weight in another way."""

    def derive(self) -> tuple[Tensor]:
        return (2 * super().derive()[0],)


def _by_autograd(weight: Tensor) -> Tensor:
    """The Cholesky-QR factor as its formula reads, differentiated operation by operation."""
    rows = weight / weight.detach().abs().amax()
    factor = torch.linalg.cholesky((rows @ rows.mT).double())
    identity = torch.eye(len(factor), dtype=factor.dtype)
    return torch.linalg.solve_triangular(factor, identity, upper=False).to(rows.dtype) @ rows


def _gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn(output.shape, generator=generator).to(output.dtype))


@pytest.mark.parametrize(
    ("rows", "columns", "batch"),
    [(5, 9, (4,)), (6, 6, (2, 2)), (7, 8, (1,)), (300, 320, (3,)), (5, 9, (20,)), (4, 6, (0,))],
    ids=["few", "square", "one", "blocks", "many", "none"],
)
def test_values_and_gradients_are_those_of_the_formula(rows: int, columns: int, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = OrthogonalLinear(columns, rows).double()
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(*batch, columns, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), F.linear(x, _by_autograd(layer.weight), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    inputs = (x, layer.weight, layer.bias)
    for got, wanted in zip(_gradients(y, *inputs), _gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (300, 320)])
def test_gradients_through_the_matrix_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    matrix = _by_autograd(weight.mT).mT if shape[0] > shape[1] else _by_autograd(weight)
    torch.testing.assert_close(orthonormal(weight), matrix, rtol=1e-10, atol=1e-11)
    (got,), (wanted,) = (_gradients(output, weight) for output in (orthonormal(weight), matrix))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_single_precision_loses_what_the_gram_matrix_loses(condition: float) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 48, dtype=torch.float64)).Q for n in (48, 96))
    stretched = (left * torch.logspace(0, -math.log10(condition), 48, dtype=torch.float64)) @ right.mT
    layer = OrthogonalLinear(96, 48, bias=False)
    with torch.no_grad():
        layer.weight.copy_(stretched)
    x, exact = torch.randn(8, 96), layer.weight.detach().double().requires_grad_()
    got = _gradients(layer(x), layer.weight)[0].double()
    wanted = _gradients(F.linear(x.double(), _by_autograd(exact)), exact)[0]
    assert (got - wanted).norm() <= 1e-6 * condition**2 * wanted.norm()


def test_the_map_of_a_training_step_is_orthonormal() -> None:
    torch.manual_seed(0)
    layer = OrthogonalLinear(400, 300, bias=False)
    rows = layer(torch.eye(400)[:399]).mT  # all columns of the matrix but one
    last = layer(torch.eye(400)[399:]).mT
    matrix = torch.cat([rows, last], 1).double()
    assert (matrix @ matrix.mT - torch.eye(300)).abs().max() <= 1e-5
    assert torch.linalg.matrix_norm(matrix, ord=2) <= 1 + 1e-5


@pytest.mark.parametrize(("in_features", "out_features"), [(96, 96), (192, 192), (100, 96), (96, 100)])
def test_square_maps_are_orthonormal_from_their_start(in_features: int, out_features: int) -> None:
    """One in forty of 192 Gaussian rows has no Cholesky factor in float32."""
    least = min(in_features, out_features)
    for seed in range(40):
        torch.manual_seed(seed)
        layer = OrthogonalLinear(in_features, out_features)
        weight = layer.weights()[0].detach()  # of training
        assert torch.linalg.svdvals(weight).sub(1).abs().max() < 1e-4, seed
        assert float(weight.square().sum()) == pytest.approx(least, rel=1e-4)


def test_dependent_rows_give_zeros_and_nan_stays_nan() -> None:
    layer, x = OrthogonalLinear(6, 3, bias=False), torch.randn(2, 6, requires_grad=True)
    with torch.no_grad():
        layer.weight[1] = 0
    y = layer(x)
    assert torch.equal(y, torch.zeros(2, 3))
    for gradient in torch.autograd.grad(y.sum(), (x, layer.weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    with torch.no_grad():
        layer.weight[2, 2] = torch.nan
    assert layer(x).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_output_only(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = OrthogonalLinear(40, 10), torch.randn(4, 40)
    rounded = x.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        single, half = layer(x), layer(rounded)
    assert torch.equal(single, layer(x).to(dtype))
    exact = layer(rounded.float())
    assert torch.equal(half, exact.to(dtype))
    (got,), (wanted,) = (_gradients(output, layer.weight) for output in (half, exact.to(dtype)))
    assert got.dtype == torch.float32 and torch.equal(got, wanted)


def test_half_precision_weights_are_solved_for_in_single() -> None:
    torch.manual_seed(0)
    layer, x = OrthogonalLinear(40, 10, bias=False).bfloat16(), torch.randn(4, 40).bfloat16()
    y = layer(x)
    wanted = F.linear(x.float(), _by_autograd(layer.weight.detach().float()))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0.01, atol=0.01)
    assert _gradients(y, layer.weight)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_that_do_not_go_together_are_refused(autocast: bool) -> None:
    layer = OrthogonalLinear(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 6, dtype=torch.float64))


def test_a_subclass_that_derives_otherwise_trains_what_it_derives() -> None:
    torch.manual_seed(0)
    layer, x = Doubled(6, 3), torch.randn(2, 6)
    assert torch.equal(layer(x), F.linear(x, layer.derive()[0], layer.bias))
    torch.testing.assert_close(layer(x), layer.eval()(x))
