"""At least as strong as foolbox 3 at an equal number of gradients, on trained metrics; skipped where it is missing.

uv run --with foolbox==3.3.4 pytest tests/attacks/test_foolbox.py -m slow
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipsim
from lipsim.attacks import TwoAFCObjective, apgd, minimal_norm, pgd
from lipsim.attacks.projections import Norm, sample_norm
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.data.triplet import collate_triplets

pytestmark = [
    pytest.mark.slow,
    # What foolbox does on import and on the way.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]
COUNT, STEPS = 32, 50


class _Logits(nn.Module):
    """The objective of a fixed batch as two logits: class 0 while unbroken, and always the whole batch."""

    def __init__(self, objective: TwoAFCObjective) -> None:
        super().__init__()
        self.objective, self.calls = objective, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        value = self.objective(x)
        return torch.stack([-value, value], 1)


@pytest.fixture(params=["quickstart", "runs/quickstart/teacher/teacher.safetensors"])
def problem(request: pytest.FixtureRequest) -> tuple[TwoAFCObjective, Tensor]:
    """Built-in triplets under the bundled student, and under the teacher where the quickstart has been run."""
    name = request.param
    if name.endswith(".safetensors") and not Path(name).is_file():
        pytest.skip(f"no {name}; python scripts/train.py makes it")
    metric = lipsim.load(name)
    data = BuiltinTriplets("test", COUNT, seed=1)
    batch: Triplet = collate_triplets([data[i] for i in range(COUNT)])
    return TwoAFCObjective(metric, batch.reference, batch.left, batch.right), batch.reference


@pytest.mark.parametrize(("norm", "eps"), [(2, 0.5), (2, 1.0), (2, 2.0), ("inf", 2 / 255), ("inf", 8 / 255)])
def test_fixed_budgets(problem: tuple[TwoAFCObjective, Tensor], norm: Norm, eps: float) -> None:
    foolbox = pytest.importorskip("foolbox")
    objective, x = problem
    model = foolbox.PyTorchModel(_Logits(objective).eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2PGD if norm == 2 else foolbox.attacks.LinfPGD
    criterion = foolbox.criteria.Misclassification(torch.zeros(len(x), dtype=torch.int64))
    torch.manual_seed(0)
    theirs = attack(steps=STEPS)(model, x, criterion, epsilons=eps)[1]
    reached = objective(theirs)
    for ours in (pgd, apgd):
        x_adv = ours(objective, x, norm=norm, eps=eps, steps=STEPS)
        assert sample_norm(x_adv - x, norm).max() <= eps + 1e-6
        value = objective(x_adv)
        assert int((value > 0).sum()) >= int((reached > 0).sum()), ours.__name__
        # Where neither breaks, both climb as far as they can.
        held = (value <= 0) & (reached <= 0)
        assert (value[held] >= reached[held] - 2e-3 * reached[held].abs()).double().mean() > 0.9


@pytest.mark.parametrize("name", ["L2FMNAttack", "DDNAttack"])
def test_minimal_norms(problem: tuple[TwoAFCObjective, Tensor], name: str) -> None:
    """Ours spends a tenth of its gradients on the polish."""
    foolbox = pytest.importorskip("foolbox")
    objective, x = problem
    model = _Logits(objective).eval()
    attack: Callable[..., object] = getattr(foolbox.attacks, name)(steps=100)
    criterion = foolbox.criteria.Misclassification(torch.zeros(len(x), dtype=torch.int64))
    torch.manual_seed(0)
    theirs = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, criterion, epsilons=None)[1]  # type: ignore[index, operator]
    calls: list[int] = []
    ours = minimal_norm(_Counted(objective, calls), x, steps=80, polish=4)
    assert len(calls) <= model.calls + 5
    found = torch.where(objective(ours) > 0, sample_norm(ours - x), torch.inf)
    other = torch.where(objective(theirs) > 0, sample_norm(theirs - x), torch.inf)
    assert (torch.isfinite(found) >= torch.isfinite(other)).all()
    both = torch.isfinite(other)
    assert (found[both] <= other[both] * (1 + 1e-3)).double().mean() >= 0.95
    assert found[both].median() <= other[both].median()


class _Counted:
    def __init__(self, objective: TwoAFCObjective, calls: list[int]) -> None:
        self.objective, self.calls = objective, calls

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.objective(x)

    def select(self, rows: Tensor) -> _Counted:
        return _Counted(self.objective.select(rows), self.calls)
