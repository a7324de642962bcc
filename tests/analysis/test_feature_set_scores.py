"""Scores of classifiers on feature sets, and the transfer of attacks, where the answers are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lipsim.analysis.classifiers import Recipe
from lipsim.analysis.feature_set_scores import (
    Susceptibility,
    attack_source,
    mean_and_spread,
    plot_susceptibility,
    score_rows,
    score_sets,
    susceptibility,
    susceptibility_rows,
    transfer_correlation,
    transfer_rate,
)
from lipsim.analysis.small_networks import ARCHITECTURES, small_network


@pytest.fixture
def two_greys() -> tuple[Tensor, Tensor]:
    """40 noisy images of 4 pixels, dark ones of class 0 and bright ones of class 1."""
    labels = torch.arange(40) % 2
    noise = torch.randint(-30, 31, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    return (100 + 60 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def brightness(channel: int) -> nn.Module:
    """A classifier by the mean of one channel."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].weight[1, 16 * channel : 16 * channel + 16] = 1
        network[1].bias.copy_(torch.tensor([16 * 130 / 255, 0.0]))
    return network.requires_grad_(False)


def test_sets_are_scored_by_what_they_teach(two_greys: tuple[Tensor, Tensor]) -> None:
    images, labels = two_greys
    recipe = Recipe(epochs=6, batch_size=8, shift=0)
    scores = score_sets(
        {"right": two_greys, "swapped": (images, 1 - labels)}, two_greys, linear, recipe, seeds=(0, 1), steps=5
    )
    assert [score.clean for score in scores] == [(1.0, 1.0), (0.0, 0.0)]
    assert all(0 < share <= 1 for share in scores[0].robust) and scores[1].robust == (0.0, 0.0)
    rows = score_rows(scores, 0.25)
    assert rows[0]["clean"] == "100.0 ± 0.0" and list(rows[0]) == ["trained on", "images", "clean", "robust, ℓ2 0.25"]
    assert mean_and_spread((0.1, 0.3)) == "20.0 ± 14.1" and mean_and_spread((0.5,)) == "50.0"
    with pytest.raises(ValueError, match="at least one seed"):
        score_sets({}, two_greys, linear, seeds=())


def test_attacks_transfer_to_what_sees_the_same(two_greys: tuple[Tensor, Tensor]) -> None:
    red, green = brightness(0), brightness(1)
    attacked = attack_source(red, *two_greys, eps=2.0, steps=20, batch_size=15)
    change = attacked - two_greys[0].float() / 255
    assert change.flatten(1).norm(dim=1).max() <= 2 + 1e-5
    assert change[:, 1:].abs().max() == 0  # what the source does not see
    assert transfer_rate(red, red, *two_greys, attacked) == 1.0
    assert transfer_rate(red, green, *two_greys, attacked) == 0.0
    assert math.isnan(transfer_rate(red, green, *two_greys, two_greys[0].float() / 255))


def test_architectures_side_by_side(two_greys: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = two_greys
    found = susceptibility(
        brightness(0),
        {"a": linear, "b": linear},
        two_greys,
        {"right": two_greys, "swapped": (images, 1 - labels)},
        two_greys,
        Recipe(epochs=6, batch_size=8, shift=0),
        steps=5,
    )
    assert [point.name for point in found] == ["a", "b"]
    assert all(point.clean == 1 and point.learned == {"right": 1.0, "swapped": 0.0} for point in found)
    assert list(susceptibility_rows(found)[0]) == ["architecture", "clean", "transfer", "on right", "on swapped"]
    plot_susceptibility(tmp_path / "transfer.png", found)
    with Image.open(tmp_path / "transfer.png") as picture:
        assert min(picture.size) > 300


def test_rank_correlations_are_exact() -> None:
    points = [
        Susceptibility(str(i), 0.9, transfer, {"up": transfer**2, "down": 1 - transfer, "flat": 0.5})
        for i, transfer in enumerate((0.1, 0.4, 0.2, 0.8, 0.5))
    ]
    up, down, flat = transfer_correlation(points)
    assert up.rho == pytest.approx(1) and down.rho == pytest.approx(-1) and math.isnan(flat.rho)
    assert up.p == pytest.approx(2 / math.factorial(5))  # one order of all is as extreme, on each side
    with pytest.raises(ValueError, match="at least 4 architectures"):
        transfer_correlation(points[:3])
    points[2].learned["up"] = math.nan
    up, down, _ = transfer_correlation(points)
    assert math.isnan(up.rho) and math.isnan(up.p) and down.rho == pytest.approx(-1)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_small_networks_are_classifiers(architecture: str) -> None:
    network = small_network(architecture, 5, image_size=16, width=4, seed=3)
    again = small_network(architecture, 5, image_size=16, width=4, seed=3)
    x = torch.rand(3, 3, 16, 16)
    logits = network(x)
    assert logits.shape == (3, 5) and torch.equal(logits, again(x))
    logits.square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of resnet, .* got 'inception' for 32"):
        small_network("inception", 5)
