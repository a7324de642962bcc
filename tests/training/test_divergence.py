"""Training that diverges stops, keeps its last finite checkpoint, and says what happened; schedules without an end."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lipsim.callbacks import RunCheckpoint, SaveOnException
from lipsim.callbacks.export_metric import ExportMetric
from lipsim.cli.train import main
from lipsim.data import BuiltinTriplets
from lipsim.data.triplet import collate_triplets
from lipsim.datamodules import BuiltinData
from lipsim.metric import PerceptualMetric, save
from lipsim.students import OrthogonalProjection
from lipsim.teachers import SmallViT
from lipsim.training import Constant, Distillation, FineTuning, RadiusHinge, TeacherTuning, Triangular, WarmupCosine

ROOT = Path(__file__).parents[2]
LINEAR = ROOT / "configs" / "quickstart" / "linear.yaml"
SMALL = [
    *("--trainer.accelerator=cpu", "--data.num_train=32", "--data.num_val=8", "--data.num_test=8"),
    *("--data.batch_size=8", "--model.student.out_features=4", "--trainer.enable_progress_bar=false"),
]
RUN = Path("runs/quickstart/linear")
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class NanAfter(RadiusHinge):
    """NaN from a step on, on the processes named."""

    def __init__(self, steps: int, rank: int | None = None) -> None:
        super().__init__(2.0)
        self.steps, self.rank = steps, rank

    def __call__(self, *arguments: Any) -> Tensor:
        loss = super().__call__(*arguments)
        self.steps -= 1
        here = self.rank is None or int(os.environ.get("LOCAL_RANK", 0)) == self.rank
        return loss * math.nan if self.steps < 0 and here else loss


def _loader(num: int = 32) -> DataLoader[Any]:
    return DataLoader(BuiltinTriplets("train", num, image_size=16), batch_size=8, collate_fn=collate_triplets)


def _trainer(**options: Any) -> L.Trainer:
    given = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, "default_root_dir": "run"} | options
    return L.Trainer(accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, **given)


def test_training_stops_at_the_first_loss_that_is_not_finite() -> None:
    module = FineTuning(OrthogonalProjection(16, 4), loss=NanAfter(6))
    trainer = _trainer(enable_checkpointing=True, callbacks=[RunCheckpoint(Path("run/checkpoints")), SaveOnException()])
    with pytest.raises(ValueError, match=r"loss is nan at step 6; its batch is in .*not_finite.safetensors; .*rate"):
        trainer.fit(module, _loader())
    assert trainer.global_step == 6 and all(torch.isfinite(p).all() for p in module.parameters())
    batch, expected = load_file("run/not_finite.safetensors"), BuiltinTriplets("train", 32, image_size=16)
    assert batch["index"].tolist() == list(range(16, 24))
    for name in ("reference", "left", "right"):
        torch.testing.assert_close(batch[name][3], getattr(expected[19], name))
    torch.testing.assert_close(batch["right_vote"][3], expected[19].right_vote)
    saved = {name: torch.load(f"run/checkpoints/{name}.ckpt", weights_only=True) for name in ("last", "on_exception")}
    assert [saved[name]["global_step"] for name in saved] == [4, 6]
    for checkpoint in saved.values():
        assert all(torch.isfinite(tensor).all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.parametrize("of", ["teacher", "loss"])
def test_a_distillation_says_which_batch_it_was_whatever_is_not_finite(of: str) -> None:
    """On one process there is no other one whose loss it could be."""
    file = save(PerceptualMetric(OrthogonalProjection(16, 4), 16), Path("teacher.safetensors"))
    loss = (lambda *_arguments, **_options: torch.tensor(math.nan)) if of == "loss" else None
    module = Distillation(file, OrthogonalProjection(16, 4), loss=loss, jitter=False)
    if of == "teacher":
        assert module.teacher is not None
        module.teacher.embed = lambda x: x.new_full((len(x), 4), math.nan)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"loss is nan at step 0; its batch is in .*not_finite.safetensors"):
        _trainer().fit(module, datamodule=BuiltinData(num_train=8, num_val=6, num_test=2, image_size=16, batch_size=4))
    assert load_file("run/not_finite.safetensors")["reference"].shape == (4, 3, 16, 16)


class Poisoned(FineTuning):
    """Weights that turn NaN in the last step of an epoch, under a finite loss."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 8:
            next(self.parameters()).data.fill_(math.nan)


class Own(OrthogonalProjection):
    """No class that the header of a file can name."""


@pytest.mark.parametrize("student", [OrthogonalProjection, Own])
def test_weights_that_are_not_finite_are_not_saved(student: type[OrthogonalProjection]) -> None:
    module = Poisoned(student(16, 4))
    trainer = _trainer(enable_checkpointing=True, callbacks=[RunCheckpoint(Path("run/checkpoints")), SaveOnException()])
    with pytest.raises(ValueError, match="weights are NaN or infinite at step 8, so no checkpoint is written"):
        trainer.fit(module, _loader())
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4 and torch.isfinite(last["state_dict"]["metric.encoder.2.weight"]).all()
    assert not Path("run/checkpoints/on_exception.ckpt").exists()
    with pytest.raises(ValueError, match="there is no metric to export"):
        _trainer(max_epochs=2, callbacks=[ExportMetric()]).fit(Poisoned(OrthogonalProjection(16, 4)), _loader())
    assert not Path("run/metric.safetensors").exists()


def test_divergence_is_one_line_for_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(LINEAR), *SMALL, "--model.loss.target=1e39"])
    assert stop.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "not_finite.safetensors" in line and "--trainer.gradient_clip_val" in line
    assert (RUN / "not_finite.safetensors").is_file()


DDP = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_divergence import L, FineTuning, NanAfter, OrthogonalProjection, _loader
from lipsim.cli.parser import one_line_errors
module = FineTuning(OrthogonalProjection(16, 4), loss=NanAfter(1, rank=1))
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
                    enable_checkpointing=False, default_root_dir="run", enable_model_summary=False)
with one_line_errors():
    trainer.fit(module, _loader())
"""


@pytest.mark.slow  # starts processes: a minute of two cores
def test_every_process_stops() -> None:
    Path("two.py").write_text(DDP.format(folder=str(Path(__file__).parent)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "two.py"], capture_output=True, text=True, env=environment, timeout=400)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert run.returncode == 1, run.stderr[-3000:]
    assert any("the loss of another process is not finite at step 1" in line for line in errors)
    assert any("the loss is nan at step 1; its batch is in run/not_finite-1.safetensors" in line for line in errors)
    assert Path("run/not_finite-1.safetensors").is_file() and not Path("run/not_finite-0.safetensors").exists()


class Endless(IterableDataset[Any]):
    """Triplets without a known number."""

    def __iter__(self) -> Iterator[Any]:
        yield from BuiltinTriplets("train", 24, image_size=16)


@pytest.mark.parametrize("schedule", [WarmupCosine(4), Triangular()])
def test_time_stands_in_for_steps_that_have_no_end(schedule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a steady pace the factors are those of the number of steps that the time admits."""
    clock = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: clock[0])
    factors, progress = [], []

    class Watched(FineTuning):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            progress.append(self.progress)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *arguments: Any) -> None:
            factors.append(self.optimizers().param_groups[0]["lr"] / 1e-3)  # type: ignore[union-attr]

        def on_before_zero_grad(self, *arguments: Any) -> None:
            clock[0] += 1.0

    trainer = _trainer(max_epochs=-1, callbacks=[Timer(timedelta(seconds=40))])
    trainer.fit(Watched(OrthogonalProjection(16, 4), schedule=schedule), _loader())
    assert len(progress) == 40 and progress == pytest.approx([step / 40 for step in range(40)])
    expected = [schedule(step, 40) for step in range(1, 41)]
    assert factors[3:] == pytest.approx(expected[3:], abs=0.02) and all(0 <= factor <= 1 for factor in factors)


class Watching(RadiusHinge):
    """Notes how far it is told that the training is, and the target that it has there."""

    def __init__(self, target: float, ramp: float) -> None:
        super().__init__(target, ramp=ramp)
        self.seen: list[float] = []
        self.losses: list[float] = []

    def __call__(self, *arguments: Any) -> Tensor:
        self.seen.append(arguments[-1])
        loss = super().__call__(*arguments)
        self.losses.append(float(loss.detach()))
        return loss


def test_training_without_any_end() -> None:
    endless = DataLoader(Endless(), 8, collate_fn=collate_triplets)
    for epochs, data in ((-1, _loader()), (2, endless)):
        for schedule in (WarmupCosine(4), Triangular()):
            stage = FineTuning(OrthogonalProjection(16, 4), schedule=schedule)
            with pytest.raises(ValueError, match=r"this one has no end; give --trainer.max_time, .* Constant"):
                _trainer(max_epochs=epochs).fit(stage, data)
    loss = Watching(1.0, ramp=0.5)
    stage = FineTuning(OrthogonalProjection(16, 4), schedule=Constant(), loss=loss)
    trainer = _trainer(max_epochs=2)
    trainer.fit(stage, endless)
    assert trainer.global_step == 6 and loss.seen == [1.0] * 6
    limited = _trainer(max_epochs=2, limit_train_batches=2)
    limited.fit(FineTuning(OrthogonalProjection(16, 4)), endless)
    assert limited.global_step == 4


def test_an_unbounded_run_through_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", str(LINEAR), *SMALL, "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01"])
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] > 0
    with pytest.raises(SystemExit):
        main(["--config", str(LINEAR), *SMALL, "--trainer.max_epochs=-1"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "Triangular is a schedule over the whole training, and this one has no end" in line


def test_tuning_a_teacher_tells_the_loss_how_far_it_is() -> None:
    """A ramp raises the target over the steps: without a step of the optimizer the loss grows with it."""
    vit, loss = SmallViT(16, patch_size=8, width=12, depth=1, heads=2), Watching(1e6, ramp=1.0)
    still = functools.partial(torch.optim.SGD, lr=0.0)
    _trainer(max_epochs=2).fit(TeacherTuning(vit, loss=loss, optimizer=still), _loader())
    assert loss.seen == pytest.approx([step / 8 for step in range(8)])
    assert loss.losses == pytest.approx([1e6 * step / 8 for step in range(8)], abs=10)
