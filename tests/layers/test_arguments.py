"""What layers refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lipsim.layers import (
    AOLConv2d,
    ChannelPadding,
    CPLConv2d,
    ExplicitConv2d,
    GroupSort,
    Householder,
    MaxMin,
    OrthogonalLinear,
    ResidualMixing,
    SLLConv2d,
    Truncation,
)


def test_bad_arguments() -> None:
    for options, message in (
        ({"padding": 3}, "kernel_size"),
        ({"padding_mode": "reflect"}, "zeros or circular"),
        ({"padding_mode": "circular", "stride": 2}, "stride 1"),
        ({"padding_mode": "circular", "kernel_size": 4}, "odd kernel"),
    ):
        for layer in (SLLConv2d, CPLConv2d):
            with pytest.raises(ValueError, match=message):
                layer(3, 3, **options)
    with pytest.raises(ValueError, match="zeros or circular"):
        AOLConv2d(3, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"at most \[2, 2\] in all .* got \[4, 4\]"):
        AOLConv2d(3, 3, padding=2, padding_mode="circular")
    with pytest.raises(ValueError, match=r"multiples of \(2, 2\)"):
        AOLConv2d(3, 3, stride=2, padding_mode="circular")(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match="zeros or circular"):
        ExplicitConv2d(nn.Conv2d(3, 3, 3, padding=1, padding_mode="replicate"))
    with pytest.raises(ValueError, match=r"at most \[2, 4\] in all .* got \[4, 4\]"):
        ExplicitConv2d(nn.Conv2d(3, 3, (3, 5), padding=2, padding_mode="circular"))
    with pytest.raises(ValueError, match=r"multiples of \(1, 2\), got \(5, 3\)"):
        ExplicitConv2d(nn.Conv2d(3, 3, 3, stride=(1, 2), padding=1, padding_mode="circular"))(torch.zeros(1, 3, 5, 3))
    with pytest.raises(ValueError, match="groups of 4"):
        GroupSort(4)(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="even number"):
        Householder(3)
    with pytest.raises(ValueError, match="group_size"):
        GroupSort(0)
    with pytest.raises(ValueError, match="expected 6 channels"):
        Householder(6)(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="keeps the shape"):
        ResidualMixing(OrthogonalLinear(48, 1))(torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"nn\.Conv2d"):
        ExplicitConv2d(nn.ConvTranspose2d(2, 2, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share"):
        ResidualMixing(nn.Identity(), share=1.0)
    with pytest.raises(ValueError, match="Tanh declares no"):
        ResidualMixing(nn.Tanh()).lipschitz_bound()
    with pytest.raises(ValueError, match="at least 3 channels"):
        ChannelPadding(3, 2)
    with pytest.raises(ValueError, match="at least 10 features"):
        Truncation(10)(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="even number"):
        MaxMin()(torch.zeros(1, 3))
