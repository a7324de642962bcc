"""Adversarial tuning of teachers: what moves, what is restored, and that it makes answers harder to turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lipsim.attacks import Adversary, TwoAFCObjective, adversarial_triplets, apgd
from lipsim.attacks.adversary import as_attacked
from lipsim.cli.stage import train
from lipsim.data import Triplet
from lipsim.data.triplet import SharedTriplet
from lipsim.metric import PerceptualMetric
from lipsim.teachers import SmallViT
from lipsim.training import Acceleration, TeacherTuning
from lipsim.training.schedules import Constant

SIZE = 16


def triplets(num: int, seed: int) -> Triplet:
    """The candidate alike has the reference's brightness, often, and its faint stripes, always."""
    generator = torch.Generator().manual_seed(seed)
    level, right = torch.rand(2, num, generator=generator)
    right = (right > 0.5).float()
    sign = (2 * torch.randint(0, 2, (num,), generator=generator) - 1).float()
    stripes = 0.03 * (torch.arange(SIZE) % 2 * 2 - 1.0)

    def images(alike: Tensor) -> Tensor:
        other = torch.where(torch.rand(num, generator=generator) < 0.5, -0.3, 0.3) * (1 - alike)
        noise = 0.05 * torch.randn(num, 3, SIZE, SIZE, generator=generator)
        grey = (0.35 + 0.3 * level + other).view(-1, 1, 1, 1)
        marks = (sign * (2 * alike - 1)).view(-1, 1, 1, 1) * stripes
        return (grey + marks + noise).clamp(0, 1)

    reference, left, right_image = images(torch.ones(num)), images(1 - right), images(right)
    return Triplet(reference, left, right_image, right, torch.arange(num))


class Data(L.LightningDataModule):
    """Batches of 16 in the order of their indices."""

    test_names = val_names = ("stripes",)

    def __init__(self, batch: Triplet) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        def collate(rows: list[int]) -> Triplet:
            return self.batch.select(torch.tensor(rows))

        return DataLoader(range(len(self.batch)), batch_size=16, collate_fn=collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def teacher(dropout: float = 0.0) -> SmallViT:
    torch.manual_seed(0)
    vit = SmallViT(SIZE, patch_size=8, width=32, depth=1, heads=2)
    vit.vit.pos_drop = nn.Dropout(dropout)
    return vit


def tuned(root: Path, adversary: Adversary | None, **options: Any) -> TeacherTuning:
    trainer = {"max_epochs": 6, "precision": "32-true", **options.pop("trainer", {})}
    checkpoint = options.pop("checkpoint", None)
    dropout = options.pop("dropout", 0.0)
    stage = TeacherTuning(
        teacher(dropout), adversary=adversary, augment=False, optimizer=lambda p: torch.optim.Adam(p, 3e-3), **options
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    runner = L.Trainer(
        default_root_dir=root, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet, **trainer
    )
    torch.manual_seed(0)
    runner.fit(stage, Data(triplets(160, seed=0)), ckpt_path=checkpoint, weights_only=checkpoint and True)
    runner.save_checkpoint(root / "last.ckpt")
    return stage


def robust_score(stage: TeacherTuning, adversary: Adversary) -> float:
    """Share of new triplets that are still right after APGD on the reference."""
    metric, batch = stage.metric.eval().requires_grad_(False), triplets(100, seed=1)
    objective = TwoAFCObjective(metric, *batch.images(), chosen_left=batch.right_vote < 0.5)
    x_adv = apgd(objective, objective.images, norm=adversary.norm, eps=adversary.eps, steps=10)
    return float((objective(x_adv) <= 0).double().mean())


@pytest.fixture(scope="module")
def tuned_plainly(tmp_path_factory: pytest.TempPathFactory) -> TeacherTuning:
    return tuned(tmp_path_factory.mktemp("plain"), None)


@pytest.mark.parametrize("adversary", [Adversary(2, 0.6, steps=4), Adversary("inf", 0.03, steps=4)])
def test_answers_are_harder_to_turn_at_equal_steps(
    adversary: Adversary, tuned_plainly: TeacherTuning, tmp_path: Path
) -> None:
    plain, adversarial = (robust_score(stage, adversary) for stage in (tuned_plainly, tuned(tmp_path, adversary)))
    assert adversarial > plain + 0.2 and adversarial > 0.8


class Spy(nn.Module):
    """An encoder that writes down how it is called: its mode, and whether its weights have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = SIZE
        self.frozen, self.free = nn.Linear(3, 4).requires_grad_(False), nn.Linear(3, 4)
        self.dropout = nn.Dropout(0.5).eval()  # a mode of its own
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, any(p.requires_grad for p in self.parameters())))
        mean = x.mean((2, 3))
        return self.dropout(self.free(mean) + self.frozen(mean))


@pytest.mark.parametrize("target", ["reference", "left", "all"])
@pytest.mark.parametrize("attack", ["pgd", "apgd", "mi_fgsm"])
def test_what_moves_and_how_the_metric_is_left(attack: Any, target: Any) -> None:
    metric = PerceptualMetric(Spy(), SIZE, lipschitz=float("inf"))
    encoder: Any = metric.encoder
    batch, adversary = triplets(6, seed=2), Adversary("inf", 0.02, steps=3, attack=attack)
    batch.right_vote[2] = 0.5
    rng = torch.get_rng_state()
    moved = adversarial_triplets(adversary, metric, batch, target, seed=1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert encoder.calls and not any(training or gradients for training, gradients in encoder.calls)
    assert encoder.training and not encoder.dropout.training
    assert encoder.free.weight.requires_grad and not encoder.frozen.weight.requires_grad
    assert encoder.free.weight.grad is None
    names = ["reference", "left", "right"] if target == "all" else [target]
    for name in ("reference", "left", "right"):
        change = (getattr(moved, name) - getattr(batch, name)).abs().flatten(1).amax(1)
        assert change[2] == 0  # a tied vote speaks for no side
        assert (change <= 0.02 + 1e-6).all() and (change > 0.01).sum() == (5 if name in names else 0)
    assert torch.equal(moved.right_vote, batch.right_vote) and torch.equal(moved.index, batch.index)
    with as_attacked(metric), torch.no_grad():
        before, after = (
            TwoAFCObjective(metric, *t.images(), chosen_left=t.right_vote < 0.5)(t.reference) for t in (batch, moved)
        )
    rows = batch.right_vote != 0.5
    assert (after[rows] > before[rows]).all()  # also where the answer was wrong already
    # A triplet moves alike in any batch.
    part = adversarial_triplets(adversary, metric, batch.select(torch.tensor([4, 1])), target, seed=1)
    torch.testing.assert_close(part.left, moved.left[[4, 1]], rtol=0, atol=1e-6)


def test_triplets_that_share_images_move_each_on_its_own() -> None:
    batch = triplets(3, seed=3)
    shared = SharedTriplet(
        torch.cat([batch.reference, batch.left]), torch.tensor([[0, 1, 3], [0, 4, 2]]), torch.tensor([0.0, 1.0]),
        torch.arange(2),
    )  # fmt: skip
    metric = PerceptualMetric(Spy(), SIZE, lipschitz=float("inf"))
    moved = adversarial_triplets(Adversary(2, 0.3, steps=3), metric, shared)
    assert (moved.reference[0] - moved.reference[1]).norm() > 0.1
    assert torch.equal(moved.right, shared.right)


def test_nothing_but_ties_is_left_alone() -> None:
    batch = triplets(3, seed=3)
    batch.right_vote.fill_(0.5)
    assert adversarial_triplets(Adversary(), PerceptualMetric(Spy(), SIZE, lipschitz=float("inf")), batch) is batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_left_with_gradients_of_the_weights(dtype: torch.dtype) -> None:
    metric = PerceptualMetric(teacher().train(), SIZE, anchor=0.0, lipschitz=float("inf"))
    with torch.autocast("cpu", dtype=dtype):
        moved = adversarial_triplets(Adversary("inf", 0.02, steps=2), metric, triplets(4, seed=2))
        assert torch.get_autocast_dtype("cpu") == dtype and torch.is_autocast_enabled("cpu")
        loss = metric.embed(moved.reference).float().sum() + metric.embed(moved.left)[:, 0].float().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    weights = [p for p in metric.parameters() if p.requires_grad]
    assert moved.reference.dtype == torch.float32 and weights and all(p.grad is not None for p in weights)


def test_resumed_training_is_the_same(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None = None) -> dict[str, Tensor]:
        trainer = {"max_epochs": epochs, "accumulate_grad_batches": 2}
        options = {"trainer": trainer, "schedule": Constant(), "checkpoint": checkpoint}
        return tuned(tmp_path, Adversary(2, 0.3, steps=2), **options).state_dict()

    whole, half = run(2), run(1)
    resumed = run(2, tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not any(torch.equal(tensor, half[name]) for name, tensor in whole.items())


def test_it_goes_with_checkpointing_and_half_precision(tmp_path: Path) -> None:
    stage = tuned(
        tmp_path,
        Adversary("inf", 0.02, steps=2),
        adversary_target="all",
        acceleration=Acceleration(checkpoint=True, channels_last=True),
        dropout=0.1,
        contrast=0.1,
        trainer={"max_epochs": 1, "precision": "bf16-mixed"},
    )
    changed = [
        not torch.equal(a, b) for a, b in zip(stage.metric.encoder.parameters(), teacher().parameters(), strict=True)
    ]
    assert all(changed)


def test_the_command_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "quickstart" / "teacher.yaml"
    options = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    data = ["--data.num_train=4", "--data.num_val=4", "--data.num_test=4", "--data.batch_size=4"]
    adversary = ["--model.adversary.norm=inf", "--model.adversary.eps=0.02", "--model.adversary_target=all"]
    cli = train(["--config", str(config), *options, *data, *adversary])
    assert cli.model.adversary == replace(Adversary(), norm="inf", eps=0.02)
    assert cli.model.adversary_target == "all"


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target to be in reference, left, right, all, got 'both'"):
        TeacherTuning(teacher(), adversary=Adversary(), adversary_target="both")  # type: ignore[arg-type]
