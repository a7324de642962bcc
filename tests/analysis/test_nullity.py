"""Nullity against dense matrices and the published table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipsim.analysis.models import load_model
from lipsim.analysis.nullity import (
    LayerNullity,
    Nullity,
    attack_correlation,
    nullity,
    operator_kernel,
    operator_kernels,
    rank,
    width_sweep,
)
from lipsim.students import OrthogonalProjection

PUBLISHED = {  # n and μ (Ozbulak et al., Table 1), which do not depend on the weights
    "torchvision/alexnet": (8, 7),
    "torchvision/squeezenet1_1": (26, 16),
    "torchvision/vgg16": (16, 14),
    "torchvision/resnet50": (54, 33),
    "torchvision/densenet121": (121, 117),
    "torchvision/inception_v3": (98, 95),
    "timm/vit_base_patch16_224": (50, 12),
    "timm/deit_tiny_patch16_224": (50, 13),
}


def dense(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear layer, a column for each coordinate of its input."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return (layer(unit) - layer(torch.zeros_like(unit))).flatten(1).T


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 1, "padding": 1},
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
@pytest.mark.parametrize(("groups", "channels", "size"), [(1, 4, (20, 17)), (2, 4, (9, 8)), (1, 24, (20, 17))])
def test_operator_kernels_are_those_of_the_dense_matrix(
    options: dict[str, object], groups: int, channels: int, size: tuple[int, int]
) -> None:
    layer = nn.Conv2d(4, channels, groups=groups, **options).double()  # type: ignore[arg-type]
    matrix = dense(layer, (4, *size))
    expected = matrix.shape[1] - int(torch.linalg.matrix_rank(matrix))
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
    expected = matrix.shape[1] - int(torch.linalg.matrix_rank(matrix))
    assert operator_kernel(layer, (10, 10)).dimension == expected


def test_what_cannot_be_decided_is_bounded() -> None:
    """A blur that is neither injective nor onto: 1 + 2cos(kπ/39) is zero at k = 26, and 2 + 2cos is zero nowhere."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 1.0]]).T @ torch.tensor([[1.0, 1.0, 1.0]]))
    found = operator_kernel(layer, (38, 38))
    assert found.dimension is None
    assert found.low <= 38 <= found.high < 38**2


def test_rank_has_the_published_tolerance() -> None:
    u, _, v = torch.linalg.svd(torch.randn(20, 30, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -9, 20, dtype=torch.float64)
    threshold = 30 * torch.finfo(torch.float32).eps
    assert rank(u * values @ v) == rank((u * values @ v).T) == int((values > threshold).sum())
    assert rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/deit_tiny_patch16_224"])
def test_the_published_table(name: str) -> None:
    found = nullity(load_model(name).network, name)
    assert (found.n, found.mu) == PUBLISHED[name]
    if "squeezenet" in name:  # which does not depend on the weights in any column
        assert (found.nu, found.sum_nullity, found.first_nullity) == (16, 3392, 0)
    else:
        assert found.first_nullity == 576


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_in_full(name: str) -> None:
    found = nullity(load_model(name).network, name)
    assert (found.n, found.mu) == PUBLISHED[name]


def test_attention_counts_alike_in_both_libraries() -> None:
    """Torchvision keeps the projections of attention in parameters, timm in layers."""
    ours = nn.MultiheadAttention(8, 2)
    found = nullity(nn.Sequential(ours))
    assert [(layer.rows, layer.cols) for layer in found.layers] == [(24, 8), (8, 8)]


def test_first_operators_of_networks() -> None:
    squeezenet = load_model("torchvision/squeezenet1_1", image_size=64)
    first = operator_kernels(squeezenet.module, 64)[0]
    assert first.dimension == first.unseen == 3 * (2 * 64 - 1)  # the last row and column
    vit = load_model("timm/deit_tiny_patch16_224", image_size=64)
    assert operator_kernels(vit.module, 64)[0].dimension == 16 * 576


def test_students_count_with_the_weights_that_they_use() -> None:
    found = nullity(OrthogonalProjection(16, 40), "linear")
    assert (found.n, found.sum_nullity) == (1, 3 * 16**2 - 40)


def test_wider_layers_have_larger_kernels() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 4, 3))

    sums = [found.sum_nullity for _, found in width_sweep(build, [2, 4, 8, 16])]
    # Full rank: (27 − w)₊ + 8w + (9w − 4).
    assert sums == [max(0, 27 - w) + 8 * w + 9 * w - 4 for w in (2, 4, 8, 16)]


def test_rank_correlation_over_networks() -> None:
    def network(cols: int) -> Nullity:
        return Nullity("a", (LayerNullity("0", "Linear", 1, cols, 1), LayerNullity("1", "Linear", 3, 2, 2)), 100)

    found = {c.measure: c for c in attack_correlation([(network(k), k**2.0) for k in (1, 3, 4, 6, 9, 12)], 999)}
    assert found["Σ/parameters"].rho == pytest.approx(1)
    assert found["Σ/parameters"].p < 0.01
    with pytest.raises(ValueError, match="at least 4 networks"):
        attack_correlation([(network(2), 1.0)])


def test_a_network_without_operators_is_refused() -> None:
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        nullity(nn.Sequential(nn.ReLU()), "relu")
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        nullity(layer)
