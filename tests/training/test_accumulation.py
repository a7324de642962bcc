"""A step is the mean of the batches that it has, however many it should have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evaluations import forked
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

import lipsim
from lipsim.data import Triplet
from lipsim.data.order import TrainingOrder
from lipsim.data.skipping import NothingRead
from lipsim.datamodules.base import TripletData
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.training.schedules import Constant


class Noise:
    """Triplets of noise, some of which nobody can read."""

    preprocess, groups = None, {}  # type: ignore[var-annotated]

    def __init__(self, count: int, unreadable: tuple[int, ...] = ()) -> None:
        draw = torch.Generator().manual_seed(0)
        self.images, self.unreadable = torch.rand(3, count, 3, 8, 8, generator=draw), unreadable

    def __len__(self) -> int:
        return self.images.shape[1]

    def __getitem__(self, index: int) -> Triplet:
        if index in self.unreadable:
            raise FileNotFoundError(f"no image file {index}.png")
        return Triplet(*self.images[:, index], torch.tensor(float(index % 2)), torch.tensor(index))

    def manifest(self) -> list[str]:
        return []


class NoiseData(TripletData):
    def __init__(self, count: int, batch_size: int, unreadable: tuple[int, ...] = ()) -> None:
        super().__init__(batch_size, on_error="skip" if unreadable else "fail")
        self.train_set, self.val_sets = Noise(count, unreadable), {"noise": Noise(4)}


class MeanGradient(L.Callback):
    """Holds the gradient of every step against autograd's of the mean loss of the batches that were read for it."""

    def __init__(self) -> None:
        self.batches: list[Triplet] = []
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, NothingRead):
            self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: FineTuning, optimizer: Any) -> None:
        (parameter,) = (p for p in pl_module.parameters() if p.ndim == 2)
        losses = [
            pl_module.loss(*batch.embed(pl_module.embed), batch.right_vote, pl_module.metric.anchor)
            for batch in self.batches
        ]
        if losses:
            (expected,) = torch.autograd.grad(torch.stack(losses).mean(), parameter)
            torch.testing.assert_close(parameter.grad, expected)
        self.sizes.append(len(self.batches))
        self.batches.clear()


def _sizes(data: TripletData, folder: Path, checkpoint: Path | None = None, **options: Any) -> list[int]:
    """How many batches each step is of."""
    torch.manual_seed(0)
    compare, save = MeanGradient(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    stage = FineTuning(OrthogonalProjection(8, 4), schedule=Constant())
    given: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    given |= {"limit_val_batches": 0, "callbacks": [compare, save], "checkpoint": checkpoint}
    lipsim.train(stage, data, directory=folder, **given, **options)
    return compare.sizes


@pytest.mark.parametrize(("accumulated", "sizes"), [(2, [2, 1]), (4, [3]), (1, [1, 1, 1])])
def test_of_the_last_step_of_an_epoch(accumulated: int, sizes: list[int], tmp_path: Path) -> None:
    data = NoiseData(12, 4)
    assert _sizes(data, tmp_path, max_epochs=2, accumulate_grad_batches=accumulated) == sizes * 2


def test_of_the_first_step_after_resuming_with_other_steps(tmp_path: Path) -> None:
    """From batch 3 of 10, four a step: the first is of the fourth alone."""
    assert _sizes(NoiseData(40, 4), tmp_path, max_epochs=1) == [1] * 10
    options = {"max_epochs": 1, "accumulate_grad_batches": 4}
    assert _sizes(NoiseData(40, 4), tmp_path, tmp_path / "step=3.ckpt", **options) == [1, 4, 2]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_of_steps_with_batches_of_which_nothing_could_be_read(tmp_path: Path) -> None:
    sizes = _sizes(NoiseData(12, 1, unreadable=(2, 5, 6, 7)), tmp_path, max_epochs=2, accumulate_grad_batches=2)
    assert sum(sizes) == 16 and {1, 2} <= set(sizes) and len(sizes) == 12


class Steps(L.Callback):
    """What the batches of each step had, and how often the optimizer itself took one."""

    def __init__(self) -> None:
        self.read: list[bool] = []
        self.taken = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.taken += 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.read.append(not isinstance(batch, NothingRead))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_in_float16_too_a_step_is_that_of_the_batches_that_were_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    steps, scaler = Steps(), torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer = L.Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[steps],
        max_epochs=3,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=tmp_path,
    )
    data = NoiseData(12, 1, unreadable=(2, 5, 6, 7))
    trainer.fit(FineTuning(OrthogonalProjection(8, 4), schedule=Constant()), data)
    of_steps = list(zip(steps.read[::2], steps.read[1::2], strict=True))
    assert (True, False) in of_steps and (False, True) in of_steps
    assert steps.taken == sum(any(pair) for pair in of_steps)


def _weights(processes: int, folder: Path) -> None:
    """After an epoch of 12 batches of four triplets in all, the sixth of which nobody can read."""
    found = {}
    for accumulated in (1, 2):
        torch.manual_seed(0)
        unreadable = tuple(TrainingOrder(Noise(48), 4, seed=0).positions(5).tolist())
        data = NoiseData(48, 4 // processes, unreadable)
        stage = FineTuning(
            OrthogonalProjection(8, 4), schedule=Constant(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)
        )
        given: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "max_epochs": 1}
        given |= {"limit_val_batches": 0, "enable_checkpointing": False, "devices": processes}
        spread = {"strategy": "ddp"} if processes > 1 else {}
        place = folder / f"{processes}-{accumulated}"
        lipsim.train(stage, data, directory=place, accumulate_grad_batches=accumulated, **given, **spread)
        found[accumulated] = {name: value.detach().clone() for name, value in stage.named_parameters()}
    rank = os.environ.get("RANK", "0") if processes > 1 else "0"
    torch.save(found, folder / f"{processes}-{rank}.pt")


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_no_process_can_read_makes_no_step(tmp_path: Path) -> None:
    """An optimizer with momentum would move the weights by a gradient of 0, and the step would count a batch more."""
    _weights(1, tmp_path)
    forked(2, _weights, 2, tmp_path)
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for found in two:
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-6)
