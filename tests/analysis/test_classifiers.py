"""Training of small classifiers, and their robust accuracy against a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipsim.analysis.classifiers import Recipe, accuracy, robust_accuracy, train_classifier
from lipsim.analysis.models import Normalized
from lipsim.attacks import Adversary


@pytest.fixture
def two_greys() -> tuple[Tensor, Tensor]:
    """64 noisy images of 8 pixels, dark ones of class 0 and bright ones of class 1."""
    labels = torch.arange(64) % 2
    noise = torch.randint(-40, 41, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return (100 + 56 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels


def linear() -> Normalized:
    torch.manual_seed(0)
    return Normalized(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (0.5,))


@pytest.mark.parametrize("adversary", [None, Adversary(eps=0.3, steps=3)])
def test_training_learns_and_is_reproducible(two_greys: tuple[Tensor, Tensor], adversary: Adversary | None) -> None:
    recipe = Recipe(epochs=6, batch_size=16, shift=1, adversary=adversary)
    networks = [train_classifier(linear(), *two_greys, recipe, seed=3) for _ in range(2)]
    assert accuracy(networks[0], *two_greys) == 1.0
    assert not networks[0].training
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in networks), strict=True))


def test_robust_accuracy_is_that_of_the_closed_form(two_greys: tuple[Tensor, Tensor]) -> None:
    images, labels = two_greys
    network = train_classifier(linear(), images, labels, Recipe(epochs=2, batch_size=16, shift=0))
    weight, x = network.network[1].weight, images.float() / 255  # type: ignore[index,union-attr,operator]
    logits = network(x)
    margin = logits.gather(1, labels.unsqueeze(1)) - logits.gather(1, 1 - labels.unsqueeze(1))
    distance = margin.squeeze(1) / (weight[0] - weight[1]).norm()  # of each image to the other class
    order = distance.sort().values
    for rank in (10, 32, 50):  # halfway between two images
        eps = float(order[rank - 1 : rank + 1].mean())
        assert order[rank] - order[rank - 1] > 1e-4
        expected = float((distance > eps).double().mean())
        assert robust_accuracy(network, images, labels, eps=eps, steps=10, batch_size=24) == expected


def test_a_tie_of_logits_is_as_right_as_without_an_attack(two_greys: tuple[Tensor, Tensor]) -> None:
    images, labels = two_greys
    collapsed = linear()
    for parameter in collapsed.parameters():
        nn.init.zeros_(parameter)
    assert accuracy(collapsed, images, labels) == float((labels == 0).double().mean())
    assert robust_accuracy(collapsed, images, labels, eps=0.1, steps=2) == accuracy(collapsed, images, labels)


def test_bad_input_is_named(two_greys: tuple[Tensor, Tensor]) -> None:
    images, labels = two_greys
    with pytest.raises(ValueError, match=r"got 64 torch\.float32, 64"):
        train_classifier(linear(), images.float(), labels)
    with pytest.raises(ValueError, match="take a lower rate"):
        train_classifier(linear(), images, labels, Recipe(lr=1e30))
    for bad in (7, -1, -100):
        with pytest.raises(ValueError, match="expected labels from 0 to 1, the classes of the network"):
            train_classifier(linear(), images, labels.where(labels != 1, bad))


def test_a_last_batch_of_one_image_joins_the_one_before(two_greys: tuple[Tensor, Tensor]) -> None:
    images, labels = (part[:9] for part in two_greys)
    said: list[str] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 2), nn.BatchNorm1d(2))
    train_classifier(network, images, labels, Recipe(epochs=1, batch_size=4), say=said.append)
    assert len(said) == 2
