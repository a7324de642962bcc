"""Kernels of convolutions against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipsim.analysis.models import load_model
from lipsim.analysis.operator_kernels import operator_kernel, operator_kernels


def dense(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear layer, a column for each coordinate of its input."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return (layer(unit) - layer(torch.zeros_like(unit))).flatten(1).T


def kernel_dimension(matrix: Tensor) -> int:
    """By the singular values of the triangular factor, which are those of the matrix."""
    triangular = torch.linalg.qr(matrix if len(matrix) > matrix.shape[1] else matrix.T, mode="r").R
    return matrix.shape[1] - int(torch.linalg.matrix_rank(triangular))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kernel_size": 3, "stride": 1, "padding": 1}, marks=pytest.mark.slow),  # decided last
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 0},
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 2, "stride": 2, "padding": 0},
        {"kernel_size": 1, "stride": 2, "padding": 0},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "stride": 2, "padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("groups", "channels", "size"), [(1, 4, (17, 16)), (2, 4, (9, 8)), (1, 24, (17, 16))])
def test_operator_kernels_are_those_of_the_dense_matrix(
    options: dict[str, object], groups: int, channels: int, size: tuple[int, int]
) -> None:
    layer = nn.Conv2d(4, channels, groups=groups, **options).double()  # type: ignore[arg-type]
    matrix = dense(layer, (4, *size))
    expected = kernel_dimension(matrix)
    found = operator_kernel(layer, size)
    assert (found.inputs, found.outputs) == (matrix.shape[1], matrix.shape[0])
    assert found.unseen == int((matrix == 0).all(0).sum())
    assert found.low <= expected <= found.high
    # Conjugate gradients are slow to decide where as many go in as come out.
    assert found.dimension == expected or (found.dimension is None and found.inputs - found.unseen == found.outputs)


def test_outputs_that_depend_on_each_other_are_counted_once() -> None:
    layer = nn.Conv2d(3, 8, 4, stride=2, padding=1).double()
    with torch.no_grad():
        layer.weight[4:] = layer.weight[:4] + layer.weight[0]
        layer.weight[3] = 0
    matrix = dense(layer, (3, 10, 10))
    expected = kernel_dimension(matrix)
    assert operator_kernel(layer, (10, 10)).dimension == expected


@pytest.mark.parametrize("dense_up_to", [0, 1024])
@pytest.mark.parametrize(
    ("channels", "stride", "taps"), [(24, 2, (0, 0)), (24, 2, (1, 2)), (24, 1, (0, 2)), (4, 2, (0, 1))], ids=str
)
def test_taps_of_zeros_read_nothing(
    channels: int, stride: int, taps: tuple[int, int], dense_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding fills such zeros of an orthonormal basis with 1e-17, which a search would take for weights."""
    monkeypatch.setattr("lipsim.analysis.operator_kernels._DENSE", dense_up_to)
    generator = torch.Generator().manual_seed(4)
    layer = nn.Conv2d(2, channels, 3, stride=stride, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
        layer.weight[:, 1, taps[0]] = 0
        layer.weight[:, :, :, taps[1]] = 0
    matrix = dense(layer, (2, 11, 12))
    found = operator_kernel(layer, (11, 12))
    assert found.unseen == int((matrix == 0).all(0).sum()) > 0
    assert found.low <= kernel_dimension(matrix) <= found.high


@pytest.mark.parametrize("size", [8, 9])
def test_layers_that_derive_their_weight_or_pad_are_what_they_compute(size: int) -> None:
    pytest.importorskip("timm")
    from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame

    plain = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    layers = [
        StdConv2d(3, 4, 3, stride=2, padding=1),
        StdConv2dSame(3, 4, 3, stride=2),
        ScaledStdConv2d(3, 4, 4, stride=4),
        nn.Conv2d(3, 4, 3, stride=2, padding="valid"),
        nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0), padding_mode="replicate"),
        nn.utils.parametrizations.weight_norm(plain),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 2, stride=2)),
    ]
    for layer in layers:
        found = operator_kernel(layer.eval(), (size, size))
        matrix = dense(layer.double(), (3, size, size))
        # Some taps of a standardised weight are found in float32 and compared in float64.
        assert found.low <= matrix.shape[1] - int(torch.linalg.matrix_rank(matrix, rtol=1e-6)) <= found.high
        assert found.kind == type(layer).__name__


def test_more_than_a_convolution_is_refused() -> None:
    class Gated(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    with pytest.raises(ValueError, match="Gated computes something else than one convolution"):
        operator_kernel(Gated(3, 4, 3), (8, 8))


def test_what_cannot_be_decided_is_bounded() -> None:
    """A blur that is neither injective nor onto: 1 + 2cos(kπ/39) is zero at k = 26, and 2 + 2cos is zero nowhere."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 1.0]]).T @ torch.tensor([[1.0, 1.0, 1.0]]))
    found = operator_kernel(layer, (38, 38))
    assert found.dimension is None
    assert found.low <= 38 <= found.high < 38**2


def test_an_ill_conditioned_operator_is_decided() -> None:
    """A blur whose symbol nearly vanishes: 2.001 + 2cos(kπ/51), condition number 1,700, is injective."""
    layer = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.001, 1.0]))
    assert operator_kernel(layer, (30, 50)).dimension == 0


def test_a_model_of_other_images_is_named() -> None:
    with pytest.raises(ValueError, match=r"Sequential does not take images of shape \(1, 3, 8, 8\) \(.*channels"):
        operator_kernels(nn.Sequential(nn.Conv2d(1, 2, 3)), 8)


def test_first_operators_of_networks() -> None:
    squeezenet = load_model("torchvision/squeezenet1_1", image_size=64)
    first = operator_kernels(squeezenet.module, 64)[0]
    assert first.dimension == first.unseen == 3 * (2 * 64 - 1)  # the last row and column
    vit = load_model("timm/deit_tiny_patch16_224", image_size=64)
    assert operator_kernels(vit.module, 64)[0].dimension == 16 * 576
