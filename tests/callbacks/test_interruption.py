"""Signals end a run between two steps, saved; what it had still to do is done when it goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import lipsim
from lipsim.callbacks import Interruption, interruption
from lipsim.callbacks.faults import clear_faults
from lipsim.callbacks.run_options import with_defaults
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.data.triplet import collate_triplets
from lipsim.datamodules import BuiltinData
from lipsim.evaluation.exported import EvaluatedMetric
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning

LAST = Path("run/checkpoints/last.ckpt")
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Kill(Callback):
    """Sends a signal to its own process in the middle of a step, or of something else that is called."""

    def __init__(self, number: signal.Signals, hook: str, batch: int, epoch: int = 0) -> None:
        self.number, self.hook, self.batch, self.epoch, self.done = number, hook, batch, epoch, False

    def _at(self, hook: str, trainer: L.Trainer, batch: int) -> None:
        if (hook, batch, trainer.current_epoch, trainer.sanity_checking) == (self.hook, self.batch, self.epoch, False):
            os.kill(os.getpid(), self.number)
            self.done = True

    def on_before_backward(self, trainer: L.Trainer, *arguments: Any) -> None:
        self._at("backward", trainer, trainer.fit_loop.batch_idx)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._at("validation", trainer, batch_idx)


class Steps(Callback):
    """Batches, validations, epochs and the rate of learning, in the order in which they came."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, trainer.global_step))

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(("validated", trainer.global_step))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _train(*callbacks: Callback, checkpoint: Path | None = None, **options: Any) -> tuple[FineTuning, L.Trainer]:
    torch.manual_seed(0)
    given = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    given |= {"default_root_dir": "run", "callbacks": list(callbacks), "log_every_n_steps": 1, **options}
    trainer = L.Trainer(**with_defaults(given, checkpoint))
    stage = FineTuning(OrthogonalProjection(16, 4))
    train = DataLoader(BuiltinTriplets("train", 32, image_size=16), batch_size=8, collate_fn=collate_triplets)
    val = DataLoader(BuiltinTriplets("val", 16, image_size=16), batch_size=8, collate_fn=collate_triplets)
    with clear_faults(trainer):
        trainer.fit(stage, train, val, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    return stage, trainer


def _stopped(*callbacks: Callback, status: int = 0, **options: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        _train(*callbacks, **options)
    assert stop.value.code == status and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
@pytest.mark.parametrize(
    ("hook", "batch", "epoch", "saved"),
    [("backward", 1, 0, 2), ("backward", 3, 0, 4), ("validation", 0, 0, 5), ("backward", 0, 1, 5)],
)
def test_a_step_is_finished_and_saved(
    hook: str, batch: int, epoch: int, saved: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped and continued, a run takes the steps and makes the validations of one that nobody stopped."""
    whole, first, second = Steps(), Steps(), Steps()
    expected, _ = _train(whole, default_root_dir="whole")
    with caplog.at_level("INFO"):
        _stopped(first, Kill(signal.SIGTERM, hook, batch, epoch))
    assert f"stopping on SIGTERM after step {saved}; saved {LAST.resolve()}" in caplog.text
    assert torch.load(LAST, weights_only=True)["global_step"] == saved
    assert not (LAST.parent / "on_exception.ckpt").exists()
    stage, trainer = _train(second, checkpoint=LAST)
    assert first.seen + second.seen == whole.seen and trainer.global_step == 8
    if saved == 4:  # between two epochs; that data are continued within one is tested with their samplers
        for one, other in zip(stage.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
def test_accumulated_batches_belong_to_their_step() -> None:
    _stopped(Kill(signal.SIGTERM, "backward", 0), accumulate_grad_batches=2)
    saved = torch.load(LAST, weights_only=True)
    assert saved["global_step"] == 1
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 2


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
def test_what_kills_without_a_word_costs_some_minutes() -> None:
    """An epoch may take hours: ``last.ckpt`` is written within it, by the clock."""

    class Saved(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int | None]] = []

        def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
            step = torch.load(LAST, weights_only=True)["global_step"] if LAST.exists() else None
            self.seen.append((trainer.global_step, step))

    often, seldom = Saved(), Saved()
    _train(often, Interruption(save_every=0), max_epochs=1)
    assert often.seen == [(0, None), (1, 1), (2, 2), (3, 3)]
    _train(seldom, max_epochs=1)
    assert seldom.seen == [(step, None) for step in range(4)]


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
def test_without_checkpoints_it_stops_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _stopped(Kill(signal.SIGTERM, "backward", 0), enable_checkpointing=False, logger=False)
    assert "after step 1; nothing is saved, since checkpoints are switched off" in caplog.text
    assert not Path("run").exists()


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
def test_a_job_of_slurm_is_requeued_on_its_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By ``scontrol requeue``, after it has saved; on SIGTERM, which ``scancel`` sends, it is not."""
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\nls {LAST} && echo "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    _stopped(Kill(signal.SIGTERM, "backward", 0))
    assert not calls.exists()
    with caplog.at_level("INFO"):
        _stopped(Kill(signal.SIGUSR1, "backward", 0), status=75)
    assert calls.read_text() == "requeue 5_2\n" and "job 5_2 is back in the queue of SLURM" in caplog.text
    scontrol.write_text("#!/bin/sh\necho Job requeue disabled >&2; exit 1\n")
    with pytest.warns(UserWarning, match=r"job 5_2 is not put back into the queue: Job requeue disabled"):
        _stopped(Kill(signal.SIGUSR1, "backward", 0), status=75)


def test_an_evaluation_keeps_its_batches(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Told to end in its second batch, it keeps that one as well, and has two to do when it is called again."""
    data = BuiltinData(num_train=8, num_val=8, num_test=16, image_size=16, batch_size=4)
    metric = lipsim.PerceptualMetric(OrthogonalProjection(16, 4), 16)
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    expected = lipsim.evaluate(metric, data, eps=[0.1], directory="whole", **quiet)
    step, seen = EvaluatedMetric.test_step, []

    def told_in_the_second(self: Any, batch: Any, *arguments: Any) -> Any:
        if isinstance(batch, Triplet):
            seen.append(len(batch))
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, *arguments)

    monkeypatch.setattr(EvaluatedMetric, "test_step", told_in_the_second)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stop:
        lipsim.evaluate(metric, data, eps=[0.1], directory="run", **quiet)
    assert stop.value.code == 143 and seen == [4, 4] and not Path("run/results.json").exists()
    assert "called again, the evaluation continues where it was" in caplog.text
    found = lipsim.evaluate(metric, data, eps=[0.1], directory="run", **quiet)
    assert seen == [4, 4, 4, 4] and found["certified"] == expected["certified"]


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_test_of_a_training_keeps_nothing(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and on the signal that asks for the queue of SLURM its status says that it is to be called again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    loader = DataLoader(BuiltinTriplets("test", 16, image_size=16), batch_size=8, collate_fn=collate_triplets)
    seen: list[int] = []

    class KillInTest(Callback):
        def on_test_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
            seen.append(1)
            os.kill(os.getpid(), number)

    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(**with_defaults({**options, "default_root_dir": "run", "callbacks": [KillInTest()]}))
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stop, clear_faults(trainer, evaluation=True):
        trainer.test(FineTuning(OrthogonalProjection(16, 4)), loader)
    assert stop.value.code == status and len(seen) == 1
    assert f"stopping on {number.name}; called again, the test begins anew" in caplog.text


def test_one_process_alone_may_get_the_signal() -> None:
    """Processes agree on the largest of what they were told."""

    class Strategy:
        root_device = torch.device("cpu")
        others = torch.tensor(0)

        def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
            assert reduce_op == "max"
            return torch.maximum(tensor, self.others)

    class Two:
        world_size, strategy, is_global_zero = 2, Strategy(), True

    callback = interruption.Interruption()
    callback._saved = time.monotonic()
    agree: Callable[[], int] = lambda: callback._agree(Two())  # type: ignore[arg-type]  # noqa: E731
    assert agree() == 0
    Strategy.others = torch.tensor(2)  # to stop
    assert agree() == 2
    callback.received = signal.SIGUSR1
    assert agree() == 3
    callback.received, callback._saved, Strategy.others = None, -1e9, torch.tensor(0)
    assert agree() == 1
    Two.is_global_zero = False  # whose clock it is
    assert agree() == 0
