"""Folded weights follow every change of the parameters; copies keep theirs."""

from __future__ import annotations

import torch
from torch import nn

from lipsim.layers import (
    OrthogonalLinear,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
    exact_copy,
    freeze,
)


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
