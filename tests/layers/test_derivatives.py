"""All derivatives of all layers, in training and in evaluation: reverse, forward, second, and through torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipsim.layers import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    ExplicitConv2d,
    ExplicitLinear,
    GroupSort,
    Householder,
    L2NormPool2d,
    MaxMin,
    OrthogonalLinear,
    OrthogonalPatches,
    ParallelMixing,
    ResidualMixing,
    SLLConv2d,
    SLLLinear,
    SpaceToDepth,
    freeze,
)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sll-linear": (lambda: SLLLinear(5, 4), (5,)),
    "sll-conv": (lambda: SLLConv2d(2, 3), (2, 4, 3)),
    "sll-conv-even": (lambda: SLLConv2d(2, 3, kernel_size=2), (2, 3, 4)),
    "sll-conv-stride": (lambda: SLLConv2d(2, 3, stride=2), (2, 4, 3)),
    "sll-conv-circular": (lambda: SLLConv2d(2, 3, padding_mode="circular"), (2, 4, 3)),
    "cpl-linear": (lambda: CPLLinear(5, 4), (5,)),
    "cpl-conv": (lambda: CPLConv2d(2, 3), (2, 4, 3)),
    "aol-linear": (lambda: AOLLinear(5, 4), (5,)),
    "aol-conv": (lambda: AOLConv2d(2, 3), (2, 4, 3)),
    "orthogonal-linear": (lambda: OrthogonalLinear(5, 3), (5,)),
    "orthogonal-tall": (lambda: OrthogonalLinear(3, 5), (3,)),
    "patches": (lambda: OrthogonalPatches(2, 3, patch=2), (2, 4, 2)),
    "explicit-conv": (lambda: ExplicitConv2d(nn.Conv2d(2, 3, 3)), (2, 4, 3)),
    "explicit-linear": (lambda: ExplicitLinear(nn.Linear(5, 3)), (5,)),
    "max-min": (MaxMin, (4, 3)),
    "group-sort": (lambda: GroupSort(3), (6, 2)),
    "householder": (lambda: Householder(6), (6, 2)),
    "l2-pool": (lambda: L2NormPool2d(2), (2, 5, 4)),
    "space-to-depth": (lambda: SpaceToDepth(2), (2, 4, 2)),
    "residual-mixing": (lambda: ResidualMixing(SLLConv2d(2, 3)), (2, 3, 3)),
    "parallel-mixing": (lambda: ParallelMixing(OrthogonalLinear(5, 2), AOLLinear(5, 3)), (5,)),
}


@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at the first forward derivative
def test_derivatives_are_those_of_finite_differences(name: str, mode: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    layer = make().double().train(mode == "training")
    for parameter in layer.parameters():  # away from orthonormal weights, where |W Wᵀ| has kinks
        nn.init.normal_(parameter, std=0.5)
    # Frozen weights, and those that another package derives, have no derivative in evaluation.
    constant = mode == "frozen" or (mode == "evaluation" and name.startswith("explicit"))
    if mode == "frozen":
        freeze(layer)
    parameters = {} if constant else dict(layer.named_parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        # Squared, so that second derivatives of what is linear are not zero.
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,)).square()

    point = (torch.randn(2, *shape, dtype=torch.float64), *(p.detach() for p in parameters.values()))
    leaves = tuple(t.clone().requires_grad_() for t in point)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)

    direction = tuple(torch.randn_like(t) for t in point)

    def along(step: float) -> Tensor:
        return function(*(t + step * d for t, d in zip(point, direction, strict=True)))

    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(function, point, direction)[1], slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.functional.jvp(function, leaves, direction)[1], slope, rtol=1e-6, atol=1e-6
    )
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, d) for t, d in zip(point, direction, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*dual)).tangent, slope, rtol=1e-6, atol=1e-6)

    def loss(*values: Tensor) -> Tensor:
        return function(*values).sum()

    inputs = tuple(range(len(point)))
    gradient = torch.func.grad(loss, inputs)
    ahead, behind = (gradient(*(t + s * d for t, d in zip(point, direction, strict=True))) for s in (1e-6, -1e-6))
    curvature = torch.func.jvp(gradient, point, direction)[1]
    with forward_ad.dual_level():  # forward over reverse without create_graph
        dual = [forward_ad.make_dual(t, d) for t, d in zip(leaves, direction, strict=True)]
        carried = torch.autograd.grad(function(*dual).sum(), leaves)
        over = [forward_ad.unpack_dual(gradient).tangent for gradient in carried]
    for got, above, below in zip((*curvature, *over), ahead * 2, behind * 2, strict=True):
        torch.testing.assert_close(got, (above - below) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sll-linear", "sll-conv", "orthogonal-linear"])
def test_gradients_of_single_samples_in_training(name: str) -> None:
    make, shape = CASES[name]
    layer = make().double().train()
    parameters = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (x.unsqueeze(0),)).square().sum()

    images = torch.randn(3, *shape, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, x in enumerate(images):
        for key, expected in torch.func.grad(loss)(parameters, x).items():
            torch.testing.assert_close(each[key][i], expected)
