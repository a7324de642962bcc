"""Activations, reshapes and pooling: norms, and agreement with deel-torchlip."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipsim.layers import (
    ChannelPadding,
    ChannelShift,
    GroupSort,
    Householder,
    L2NormPool2d,
    MaxMin,
    ScaledAvgPool2d,
    SpaceToDepth,
)


def test_pooling_agrees_with_torchlip() -> None:
    from deel import torchlip

    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(ScaledAvgPool2d(2)(x), torchlip.ScaledAvgPool2d(2)(x))


def test_shares_of_channels_are_shares() -> None:
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"share in \[0, 1\]|NaN"):
            ChannelShift(8, share)
    assert [ChannelShift(10, share).groups for share in (0, 1)] == [[10, 0, 0, 0, 0], [2, 2, 2, 2, 2]]


def test_isometries() -> None:
    x = torch.randn(4, 3, 8, 8)
    for layer in (SpaceToDepth(4), ChannelPadding(3, 7), ChannelShift(3, share=0.9)):
        torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    y = torch.randn(4, 6, 5)
    torch.testing.assert_close(MaxMin()(y).flatten(1).norm(dim=1), y.flatten(1).norm(dim=1))
    constant = torch.full((1, 2, 8, 8), 0.7)
    torch.testing.assert_close(ScaledAvgPool2d(4)(constant).norm(), constant.norm())


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (3, 8, 6), (1, 3, 1, 1)])
def test_channels_are_added_behind_the_others_and_lie_innermost(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    found = ChannelPadding(3, 7)(x)
    torch.testing.assert_close(found, torch.cat([x, torch.zeros_like(x).repeat_interleave(2, -3)[..., :4, :, :]], -3))
    assert found.movedim(-3, -1).is_contiguous()
    assert torch.autograd.gradcheck(ChannelPadding(3, 7), x)
    torch.testing.assert_close(torch.func.vmap(ChannelPadding(3, 7))(x[None])[0], found)


def test_activations_agree_with_torchlip() -> None:
    from deel import torchlip

    x = torch.randn(5, 6, 3, 3)
    torch.testing.assert_close(GroupSort(2)(x), torchlip.GroupSort(2)(x))
    torch.testing.assert_close(L2NormPool2d(3)(x[:, :, :3]), torchlip.ScaledL2NormPool2d(3)(x[:, :, :3]))
    torch.testing.assert_close(SpaceToDepth(3)(x), torchlip.InvertibleDownSampling(3)(x))
    torch.testing.assert_close(Householder(6)(x), MaxMin()(x))
    theirs, ours = torchlip.HouseHolder(6), Householder(6)
    with torch.no_grad():
        theirs.theta.uniform_(-3, 3)
        ours.angle.copy_(theirs.theta)
    torch.testing.assert_close(ours(x), -theirs(-x))  # it mirrors the other side of the line than the paper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_sorted_pairs_are_those_of_maximum_and_minimum(dtype: torch.dtype) -> None:
    x = torch.randn(64, 6, 3, dtype=dtype)
    first, second = x.chunk(2, dim=1)
    x = x[(first != second).flatten(1).all(1)]  # what is equal, as some of half precision are, is below
    factor = torch.randn_like(x)

    def gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        found = function(leaf)
        found.backward(factor)
        assert leaf.grad is not None
        return found.detach(), leaf.grad

    def reference(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)

    for got, expected in zip(gradient(MaxMin()), gradient(reference), strict=True):
        assert got.dtype == dtype and torch.equal(got, expected)
    each = torch.func.vmap(torch.func.grad(lambda x, f: (MaxMin()(x.unsqueeze(0))[0] * f).sum()))(x, factor)
    assert torch.equal(each, gradient(reference)[1])


def test_equal_pairs_pass_a_gradient_on_as_it_is() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 3.0]], requires_grad=True)
    MaxMin()(x).backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert x.grad is not None and x.grad.tolist() == [[1.0, 4.0, 3.0, 2.0]]


def test_not_a_number_stays_one_in_either_of_a_pair() -> None:
    x = torch.tensor([[torch.nan, 1.0, 2.0, torch.nan]])
    for given in (x, x.clone().requires_grad_()):
        assert MaxMin()(given).isnan().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_sorted_pairs_are_traced_as_plain_operations() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    traced = torch.jit.trace(MaxMin(), x)  # type: ignore[no-untyped-call]
    assert "^" not in str(traced.graph)  # how a function of Python is printed
    assert torch.equal(traced(2 * x), MaxMin()(2 * x))
