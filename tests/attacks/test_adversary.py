"""Adversarial training's examples: the whole budget is used, and the objective that nothing breaks orders as before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lipsim.attacks import Adversary, ClassificationObjective
from lipsim.attacks.objectives import UnendingObjective, logit_margin


def linear(x: Tensor) -> Tensor:
    """Two logits of slope ±1 along the sum of the pixels."""
    total = (x - 0.5).flatten(1).sum(1)
    return torch.stack([total, -total], 1)


@pytest.mark.parametrize("attack", ["pgd", "apgd", "mi_fgsm"])
@pytest.mark.parametrize(("norm", "slope"), [(2, 12**0.5), ("inf", 12.0)])
def test_broken_images_are_moved_all_the_way(attack: str, norm: object, slope: float) -> None:
    x = torch.full((2, 3, 2, 2), 0.5)
    adversary = Adversary(norm=norm, eps=0.1, attack=attack)  # type: ignore[arg-type]
    x_adv = adversary(ClassificationObjective(linear, torch.tensor([0, 1])), x)
    # The optimum of a linear margin: the budget times the dual norm of its gradient.
    expected = 0.1 * slope * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close((x_adv - x).flatten(1).sum(1), expected, rtol=1e-4, atol=0.0)


def test_the_margin_is_that_of_the_best_other_class() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (50,))
    expected = [row[y] - max(row[k] for k in range(7) if k != y) for row, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(logit_margin(logits, labels), torch.stack(expected))
    left, reached = (ClassificationObjective(lambda x: logits, labels, targeted) for targeted in (False, True))
    assert torch.equal(left(logits) > 0, logits.argmax(1) != labels)
    assert torch.equal(reached(logits) > 0, logits.argmax(1) == labels)


def test_nothing_breaks_an_unending_objective() -> None:
    values = torch.linspace(-20, 20, 41)
    found = UnendingObjective(lambda x: x)(values)  # type: ignore[arg-type]
    assert (found < 0).all()
    assert (found.diff() > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "square"}, "expected the attack to be one of apgd, mi_fgsm, pgd, got 'square'"),
        ({"norm": 0, "eps": 1}, "expected norm 2 or inf"),
        ({"steps": 0}, "at least 1 step"),
        ({"eps": -1}, "expected a finite budget"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adversary(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "labels", "message"),
    [
        (lambda x: {"out": x}, [0, 0], "got a dict"),
        (lambda x: x, [0, 0], r"got shape \(2, 3, 2, 2\)"),
        (linear, [0, 2], r"labels in 0 to 1, got \[0, 2\]"),
    ],
)
def test_what_is_no_classifier_is_refused(answer: object, labels: list[int], message: str) -> None:
    objective = ClassificationObjective(answer, torch.tensor(labels))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        objective(torch.zeros(2, 3, 2, 2))
