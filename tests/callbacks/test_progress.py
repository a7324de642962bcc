"""What the lines of a log file and the bar of a terminal say of a run."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import rich.console
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer

from lipsim.callbacks.progress_bar import RunProgressBar
from lipsim.callbacks.progress_lines import ProgressLines
from lipsim.callbacks.run_status import RunStatus, num_images
from lipsim.data import SharedTriplet, Triplet
from lipsim.data.labelled import LabelledBatch
from lipsim.data.loading import Finished
from lipsim.utils import progress

COLUMNS = "val/a/certified_{}"


class Scored(L.LightningModule):
    """Trains one weight, and is certified in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        for label, score in (("1", 0.25), ("36/255", 0.719)):
            self.log(COLUMNS.format(label), score)

    def test_step(self, batch: torch.Tensor, index: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _loader(size: int) -> torch.utils.data.DataLoader[torch.Tensor]:
    return torch.utils.data.DataLoader(torch.ones(size, 1), batch_size=2)


def _trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    given: dict[str, Any] = {**quiet, "num_sanity_val_steps": 1, "max_epochs": 2, **options}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **given)


def test_lines_of_a_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress.Progress, "__call__", lambda self, message: said.append(f"{self.title}: {message}"))
    lines, module = ProgressLines(), Scored()
    trainer = _trainer(tmp_path, lines)
    trainer.fit(module, _loader(6), _loader(4))
    assert said[0] == "fit: first look at validation, 0 of 1 batches done"
    training = [line for line in said if "epoch" in line]
    assert len(training) == 6
    rate, left = r"[\d,.]+ images/s", r"\d s left"
    assert re.fullmatch(rf"fit: epoch 1 of 2, 1 of 3 batches done, {rate}, {left}", training[0])
    certified = r"71\.9 % certified at 36/255 \(a\)"
    assert re.fullmatch(rf"fit: epoch 2 of 2, 2 of 3 batches done, {rate}, {left}, {certified}", training[-2])
    (second,) = [line for line in said[-3:] if "validation" in line and "1 of" in line]
    assert re.fullmatch(rf"fit: validation, 1 of 2 batches done, {left}, {certified}", second)
    said.clear()
    trainer.test(module, [_loader(4), _loader(2)], verbose=False)
    assert said[0] == "test: test, 0 of 3 batches done" and len(said) == 3  # of both sets together
    assert re.fullmatch(rf"test: test, 2 of 3 batches done, {rate}, {left}", said[2])


def test_a_log_file_has_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_FIRST", "_SHORTEST"):
        monkeypatch.setattr(progress, name, 0.001)
    _trainer(tmp_path, ProgressLines()).fit(Scored(), _loader(40), _loader(4))
    out = capsys.readouterr().out
    assert out.endswith("\n") and not re.search(r"[\r\x1b\x08]", out)
    assert all(re.fullmatch(r"fit(: .+)? \(\d s\)", line) for line in out.splitlines())


def test_the_bar_of_a_terminal_says_the_same(tmp_path: Path) -> None:
    terminal = io.StringIO()
    options = {"file": terminal, "force_terminal": True, "width": 160, "legacy_windows": False}
    try:
        bar = RunProgressBar(console_kwargs=options)
        _trainer(tmp_path, bar).fit(Scored(), _loader(6), _loader(4))
    finally:
        rich.reconfigure()
    assert "Epoch 1/1" in terminal.getvalue() and bar.progress is not None
    shown = io.StringIO()
    for task in bar.progress.tasks:
        task.visible = True  # those of validations were put out at their end
    rich.console.Console(file=shown, width=160).print(bar.progress.make_tasks_table(bar.progress.tasks))
    _, training, *_, validation = (" ".join(line.split()) for line in shown.getvalue().splitlines())
    assert re.search(r"Epoch 1/1 .* 3/3 0 s left [\d,.]+ images/s .*71\.9 % certified at 36/255 \(a\)", training)
    assert re.search(r"Validation .* 2/2 0:00:\d\d • .*it/s", validation)  # Lightning's own


def test_what_is_left_of_a_run(tmp_path: Path) -> None:
    now = [0.0]
    status = RunStatus()

    class Clock(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            status.on_train_start(trainer)
            status.pace._clock = lambda: now[0]

        def on_train_batch_start(self, *_: Any) -> None:
            status.on_train_batch_start()

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            now[0] += 10.0
            status.on_train_batch_end(trainer, batch)
            left.append(status.seconds_left(trainer))

    def run(**options: Any) -> L.Trainer:
        left.clear()
        trainer = _trainer(tmp_path, Clock(), **{"limit_val_batches": 0, **options})
        trainer.fit(Scored(), _loader(8), _loader(2))
        return trainer

    left: list[float | None] = []
    trainer = run(max_epochs=2)
    assert left == [70, 60, 50, 40, 30, 20, 10, 0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run(max_epochs=-1, max_steps=3)
    assert left == [20, 10, 0]
    run(max_epochs=2, accumulate_grad_batches=2)  # 20 seconds a step
    assert left == [80, 60, 60, 40, 40, 20, 20, 0]
    # By time: that of the clock, as the trainer's own timer has it; or by steps, whichever ends first.
    run(max_epochs=-1, max_steps=2, max_time="00:01:00:00")
    assert left == [10, 0]
    trainer = run(max_epochs=1, max_time={"seconds": 30})
    assert all(seconds is not None and 25 < seconds <= 30 for seconds in left[:1]) and left[-1] == 0
    assert any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    # Continued after two epochs of four: their steps are no part of the rate, and the other two are left.
    left.clear()
    now[0] += 1e6
    resumed = _trainer(tmp_path, Clock(), max_epochs=4, limit_val_batches=0)
    resumed.fit(Scored(), _loader(8), _loader(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert left == [70, 60, 50, 40, 30, 20, 10, 0]


def test_scores_of_a_run_that_continues_are_those_of_its_log(tmp_path: Path) -> None:
    trainer, status = _trainer(tmp_path), RunStatus()
    trainer.strategy.connect(Scored())
    head = ",".join(["step", "train/loss", COLUMNS.format("1"), COLUMNS.format("36/255")])
    (tmp_path / "metrics-1.csv").write_text(f"{head}\n0,1.0,,\n0,,0.2,0.4\n1,0.9,,\n")
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 2
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, 10
    status.on_train_start(trainer)
    assert status.certified == "40.0 % certified at 36/255 (a)"


def test_images_of_a_batch(triplets: Triplet) -> None:
    images = torch.zeros(5, 3, 2, 2)
    assert num_images(triplets) == 36 and num_images(images) == num_images([images, torch.zeros(5)]) == 5
    assert num_images(LabelledBatch(images, torch.zeros(5), torch.arange(5))) == 5
    shared = SharedTriplet(images, torch.zeros(900, 3, dtype=torch.int64), torch.zeros(900), torch.arange(900))
    assert num_images(shared) == 5  # each is embedded once
    assert num_images(Finished()) == 0
