"""Faults, each caused: what a run that is killed, that finds no room or that meets damaged files leaves and says."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import Dataset

import lipsim
from lipsim import LipsimError
from lipsim.callbacks.run_folder import set_aside
from lipsim.cli.parser import one_line_errors
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.datamodules import BuiltinData
from lipsim.datamodules.base import TripletData
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.training.checkpoints import find_last
from lipsim.utils.claim import CLAIM, claim_folder

RUN, LAST = Path("run"), Path("run/checkpoints/last.ckpt")
fork = multiprocessing.get_context("fork")
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*damaged|.*cannot read.*looking for another checkpoint"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _train(epochs: int, *callbacks: Callback, data: Any = None, **options: Any) -> lipsim.PerceptualMetric:
    torch.manual_seed(0)
    stage = FineTuning(OrthogonalProjection(16, 4), optimizer=functools.partial(torch.optim.Adam, lr=0.01))
    data = data or BuiltinData(num_train=16, num_val=8, num_test=8, image_size=16, batch_size=8)
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return lipsim.train(stage, data, max_epochs=epochs, directory=RUN, callbacks=callbacks, **quiet, **options)


def _step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _die_while_writing(content: Any) -> None:
    """In the process of a run: it is killed when half of its next checkpoint is on the disk."""

    def half(path: Path, content: Any) -> None:
        with open(path, "wb") as file:
            file.write(bytes(content)[: len(content) // 2])
        if path.suffix == ".ckpt":
            os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = half  # type: ignore[assignment, method-assign]
    _train(2, checkpoint="last")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before() -> None:
    _train(1)
    before = LAST.read_bytes()
    process = fork.Process(target=_die_while_writing, args=(None,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (half,) = (name for name in _names(LAST.parent) if name.endswith(".tmp.ckpt"))
    assert LAST.read_bytes() == before and half.startswith(".") and (RUN / CLAIM).is_file()
    _train(2, checkpoint="last")  # takes over the folder that the killed run held
    assert _step(LAST) == 4 and _names(LAST.parent) == ["epoch=1-step=4.ckpt", "last.ckpt"]
    assert not (RUN / CLAIM).exists()


class Full(Callback):
    """A disk on which nothing larger than some bytes can be written any more, from the second epoch on."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 2**10, resource.RLIM_INFINITY))


@pytest.fixture
def _limited() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_limited")
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        _train(2, Full())
    assert stop.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: cannot write {Path.cwd() / 'run/checkpoints/epoch=1-step=4.ckpt'} (File too large")
    assert re.search(r"it needs 0\.0[2-9] MB, and [\d,.]+ MB are free there", line)
    assert _step(LAST) == 2 and _names(LAST.parent) == ["epoch=0-step=2.ckpt", "last.ckpt"]


class NoRoom(Callback):
    """Of a log, whose writer does not say which file."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_said_with_its_place_by_any_writer() -> None:
    with pytest.raises(OSError, match=r"cannot write in .*run \(No space left on device: [\d.,]+ MB are free there\)"):
        _train(1, NoRoom())


class Interrupting(Callback):
    """Ctrl-C in the third step."""

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt


def test_an_interruption_has_the_exit_status_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop, one_line_errors():
            _train(2, Interrupting())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert _step(RUN / "checkpoints" / "on_exception.ckpt") == 3
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise SystemExit(3)
    assert stop.value.code == 3


def test_a_folder_that_cannot_be_written_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    RUN.touch()  # not even root can write into that
    with pytest.raises(SystemExit) as stop, one_line_errors():
        _train(1)
    assert stop.value.code == 1 and RUN.read_bytes() == b""
    assert "error: cannot write in" in (error := capsys.readouterr().err) and "so nothing is begun" in error


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _zeroed(content: bytes) -> bytes:
    return bytes(len(content))


def _empty(content: bytes) -> bytes:
    return b""


def _flipped(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 8]) + content[len(content) // 2 + 1 :]


def test_a_damaged_last_is_named_and_the_one_before_is_offered() -> None:
    _train(1)
    epoch = LAST.parent / "epoch=0-step=2.ckpt"
    good = LAST.read_bytes()
    for damage in (_truncated, _zeroed, _empty, _flipped):
        LAST.write_bytes(damage(good))
        with pytest.raises(LipsimError, match=r"last\.ckpt") as error:
            _train(2, checkpoint="last")
        offered = f"the one before it is of step 2: --ckpt_path {epoch.resolve()}, or --ckpt_path last-readable"
        assert offered in str(error.value) and LAST.read_bytes() == damage(good), damage
    _train(2, checkpoint="last-readable")
    assert _step(LAST) == 4
    for path in LAST.parent.iterdir():
        path.write_bytes(b"")
    for word in ("last", "last-readable"):
        with pytest.raises(LipsimError, match=r"it is empty; .*there is no other checkpoint in .*: training has to be"):
            _train(2, checkpoint=word)


def test_the_latest_step_counts_and_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was set back, or a copy, makes the newest checkpoint look old; names of folders never clash."""
    _train(1)
    (old := LAST.with_name("last-v1.ckpt")).write_bytes(LAST.read_bytes())
    _train(2, checkpoint="last")
    os.utime(LAST, (0, 0))
    assert find_last([LAST.parent]) == LAST and _step(old) == 2 and _step(LAST) == 4
    assert find_last([Path("nowhere")]) is None and find_last([Path("nowhere")], fall_back=True) is None
    monkeypatch.setattr(time, "time", lambda: -1e9)
    monkeypatch.setattr(time, "time_ns", lambda: -(10**18))
    _train(3, checkpoint="last")
    assert _step(LAST) == 6
    for second in (2e9, 1e9, 1e9, 2e9):  # forth, back, and the same second again
        (RUN / "config.yaml").write_text(str(second))
        for file in [path for path in RUN.rglob("*") if path.is_file() and "previous" not in path.parts]:
            os.utime(file, (second, second))
        assert set_aside(RUN) is not None
    kept = sorted(float(file.read_text()) for file in (RUN / "previous").glob("*/config.yaml"))
    assert kept == [1e9, 1e9, 2e9, 2e9]


def test_without_a_last_the_latest_is_continued(caplog: pytest.LogCaptureFixture) -> None:
    """As after a kill between the first checkpoint and the ``last.ckpt`` beside it."""
    with caplog.at_level("INFO"):
        _train(1, checkpoint="last")
    assert "there is no checkpoint to continue from yet: training begins anew" in caplog.text
    assert "continuing the run" not in caplog.text
    LAST.unlink()
    steps: list[int] = []

    class Steps(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
            steps.append(trainer.global_step)

    with caplog.at_level("INFO"):
        _train(2, Steps(), checkpoint="last")
    assert steps == [2, 3] and _step(LAST) == 4 and "continuing the run in run" in caplog.text
    assert find_last([Path("nowhere")]) is None


def test_a_trainer_that_cannot_be_made_leaves_no_folder() -> None:
    """Also while somebody keeps the error, as a notebook does."""
    for options in ({"devices": 0}, {"logger": "none"}):
        with pytest.raises(Exception, match=r"devices|logger") as kept:
            _train(1, **options)
        assert kept.value.__traceback__ is not None and not RUN.exists()


def _hold(pipe: Any) -> None:
    claim = claim_folder(RUN)
    pipe.send(os.getpid())
    pipe.recv()
    claim.release()


def test_a_second_job_in_the_folder_of_a_run_changes_nothing() -> None:
    _train(1)
    here, there = fork.Pipe()
    process = fork.Process(target=_hold, args=(there,), daemon=True)
    process.start()
    holder = here.recv()
    before = {path: path.stat().st_mtime_ns for path in RUN.rglob("*")}
    data = BuiltinData(num_train=16, num_val=8, num_test=8, image_size=16, batch_size=8)
    for call in (
        lambda: _train(2),
        lambda: _train(2, checkpoint="last"),
        lambda: lipsim.evaluate(OrthogonalMetric(), data, directory=RUN, accelerator="cpu"),
    ):
        with pytest.raises(LipsimError, match=f"is in use by process {holder} on "):
            call()
    assert {path: path.stat().st_mtime_ns for path in RUN.rglob("*")} == before
    here.send("done")
    process.join(60)


def OrthogonalMetric() -> lipsim.PerceptualMetric:
    return lipsim.PerceptualMetric(OrthogonalProjection(16, 4), 16)


class Mortal(Dataset[Triplet]):
    """Triplets whose sixth kills the process that asks for it."""

    def __init__(self) -> None:
        self.triplets = BuiltinTriplets("train", 16, image_size=16)
        self.parent = os.getpid()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Triplet:
        if index == 5 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.triplets[index]


class MortalData(TripletData):
    """Read by one loading process."""

    def __init__(self) -> None:
        super().__init__(8, num_workers=1)
        self.train_set = Mortal()  # type: ignore[assignment]
        self.val_sets = {"val": BuiltinTriplets("val", 8, image_size=16)}


def test_a_loading_process_that_is_killed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        _train(1, data=MortalData())
    assert stop.value.code == 1 and time.monotonic() - start < 30
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    # Which of the two it is depends on who notices first.
    assert re.search(
        r"loading process \d+ is gone \((signal: Killed|it exited unexpectedly)\): most often memory", line
    )
    assert "resume with --ckpt_path last" in line
