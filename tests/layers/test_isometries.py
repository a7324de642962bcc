"""Activations, reshapes and pooling: norms, and agreement with deel-torchlip."""

from __future__ import annotations

import torch

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


def test_isometries() -> None:
    x = torch.randn(4, 3, 8, 8)
    for layer in (SpaceToDepth(4), ChannelPadding(3, 7), ChannelShift(3, share=0.9)):
        torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    y = torch.randn(4, 6, 5)
    torch.testing.assert_close(MaxMin()(y).flatten(1).norm(dim=1), y.flatten(1).norm(dim=1))
    constant = torch.full((1, 2, 8, 8), 0.7)
    torch.testing.assert_close(ScaledAvgPool2d(4)(constant).norm(), constant.norm())


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
