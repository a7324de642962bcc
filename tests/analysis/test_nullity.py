"""Nullity against the published table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lipsim.analysis.models import load_model
from lipsim.analysis.nullity import nullity, rank
from lipsim.cli.main import main
from lipsim.layers.adapters import ExplicitLinear
from lipsim.students import OrthogonalProjection, SLLNetwork
from lipsim.students.folded_network import FoldedNetwork

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


def test_rank_has_the_published_tolerance() -> None:
    u, _, v = torch.linalg.svd(torch.randn(20, 30, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -9, 20, dtype=torch.float64)
    threshold = 30 * torch.finfo(torch.float32).eps
    assert rank(u * values @ v) == rank((u * values @ v).T) == int((values > threshold).sum())
    for scale in (1e200, 1e-200, 1e300):
        assert rank(scale * (u * values @ v)) == int((values > threshold).sum())
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


def test_students_count_with_the_weights_that_they_use() -> None:
    found = nullity(OrthogonalProjection(16, 40), "linear")
    assert (found.n, found.sum_nullity) == (1, 3 * 16**2 - 40)
    explicit = nullity(ExplicitLinear(nn.Linear(48, 8)))
    assert (explicit.n, explicit.sum_nullity) == (1, 40)  # what it derives its weight from is no layer of its own
    network = SLLNetwork(16, 8, channels=12, depth=3, linear_depth=2, linear_width=6)
    both = [nullity(encoder) for encoder in (network, FoldedNetwork.from_encoder(network.eval()))]
    assert [(found.n, found.sum_nullity) for found in both] == 2 * [(5, 3 * (12 * 9 - 5) + 2 * (12 - 6))]


def test_a_network_without_operators_is_refused() -> None:
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        nullity(nn.Sequential(nn.ReLU()), "relu")
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        nullity(layer)


def test_trained_networks_of_torchvision_normalise_as_they_were_trained(tmp_path: Path) -> None:
    """Its GoogLeNet and Inception take [−1, 1], and turn ImageNet's statistics into it wherever there are weights."""
    untrained = load_model("torchvision/googlenet")
    torch.save(untrained.network.state_dict(), tmp_path / "googlenet.pt")
    trained = load_model("torchvision/googlenet", weights=tmp_path / "googlenet.pt")
    seen: list[torch.Tensor] = []
    hook = trained.network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    trained.module(x)
    hook.remove()
    torch.testing.assert_close(seen[0], 2 * x - 1, rtol=1e-5, atol=1e-5)


def _two_strides() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(64, 2))
    model.image_size = 8
    return model


def test_tables_of_an_earlier_call_do_not_stay(tmp_path: Path) -> None:
    """And those of anybody else do."""

    def run(*options: str) -> set[str]:
        with pytest.raises(SystemExit) as stop:
            main(["nullity", f"{__name__}:_two_strides", "--output", str(tmp_path), *options])
        assert stop.value.code == 0
        return {path.stem for path in tmp_path.iterdir()}

    (tmp_path / "kernels.md").write_text("of somebody")
    assert run("--no-operators") == {"nullity", "kernels"} and (tmp_path / "kernels.md").read_text() == "of somebody"
    assert run() == {"nullity", "kernels"} and (tmp_path / "kernels.md").read_text() != "of somebody"
    assert run("--no-operators") == {"nullity"}
