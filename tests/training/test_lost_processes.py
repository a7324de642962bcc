"""Two real processes, one of which dies, fails or is told to end: the other one stops with it, and says why."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lipsim.callbacks import process_watch
from lipsim.callbacks.faults import clear_faults
from lipsim.callbacks.interruption import TERMINATED
from lipsim.callbacks.process_watch import TIMEOUT, ProcessWatch, limit_waiting
from lipsim.utils.errors import LipsimError

ROOT = Path(__file__).parents[2]
LAST = Path("run/checkpoints/last.ckpt")
SCRIPT = """
import functools, os, signal, time
import torch
import lipsim
from lightning.pytorch import Callback
from lipsim.cli.parser import one_line_errors
from lipsim.datamodules import BuiltinData
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.utils.errors import LipsimError

FAULT, RANK = os.environ["FAULT"], int(os.environ["FAULTY"])

class Fault(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != 5:
            return
        if trainer.global_rank != RANK:
            if FAULT == "alone":  # not in a collective, where a closed connection would tell
                time.sleep(120)
            return
        if FAULT in ("kill", "alone"):
            print(f"killing {os.getpid()} at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if FAULT == "error":
            raise LipsimError("no image file x.png")

if __name__ == "__main__":
    torch.set_num_threads(1)
    data = BuiltinData(num_train=64, num_val=8, num_test=8, image_size=16, batch_size=8)
    stage = FineTuning(OrthogonalProjection(16, 4), optimizer=functools.partial(torch.optim.Adam, lr=0.01))
    with one_line_errors():
        lipsim.train(stage, data, max_epochs=3, directory="run", callbacks=[Fault()], accelerator="cpu", devices=2,
                     strategy="ddp", enable_progress_bar=False, enable_model_summary=False)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _run(launcher: str, fault: str, rank: int) -> tuple[subprocess.CompletedProcess[str], float]:
    """What two processes have said and how they ended, and seconds since the fault."""
    Path("two.py").write_text(SCRIPT)
    command = [
        sys.executable,
        *(["-m", "torch.distributed.run", "--nproc-per-node=2"] if launcher == "torchrun" else []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"FAULT": fault, "FAULTY": str(rank)}
    run = subprocess.run([*command, "two.py"], capture_output=True, text=True, env=environment, timeout=500)
    end = time.time()
    at = [line.split()[-1] for line in run.stdout.splitlines() if line.startswith("killing")]
    return run, end - float(at[0]) if at else 0.0


def _errors(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize(
    ("launcher", "fault", "rank"),
    [("lightning", "kill", 1), ("lightning", "kill", 0), ("lightning", "alone", 1), ("torchrun", "kill", 0)],
)
def test_the_others_stop_when_a_process_is_killed(launcher: str, fault: str, rank: int) -> None:
    run, seconds = _run(launcher, fault, rank)
    assert run.returncode != 0 and seconds < 60, run.stderr[-3000:]
    assert any(
        f"error: process {rank} of 2 (pid " in line and "is gone: it was killed" in line for line in _errors(run)
    )
    assert torch.load(LAST, weights_only=True)["global_step"] == 4


@pytest.mark.slow  # starts processes
def test_the_others_stop_with_the_message_of_one_that_fails() -> None:
    run, _ = _run("lightning", "error", 1)
    assert run.returncode != 0, run.stderr[-3000:]
    errors = _errors(run)
    assert "error: no image file x.png" in errors
    assert any(
        "error: process 1 of 2 (pid " in line and "stopped: no image file x.png; all stop" in line for line in errors
    )


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(rank: int) -> None:
    run, _ = _run("lightning", "term", rank)
    assert run.returncode == 0 and not _errors(run), run.stderr[-3000:]
    assert "after step 6; saved" in run.stderr and torch.load(LAST, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("stage", "remedy"),
    [("fit", "resume with --ckpt_path last"), ("test", "the same command continues an evaluation")],
)
def test_what_is_said_fits_what_runs(
    stage: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    watch = ProcessWatch()
    watch.setup(trainer, L.LightningModule(), stage)
    watch._peers = peers = Told()  # type: ignore[assignment]
    watch.on_exception(trainer, L.LightningModule(), SIGTERMException(TERMINATED))
    assert peers.told == ["it was told to by a signal"]  # and not the status, 143
    watch._stopping.clear()
    exits: list[int] = []
    monkeypatch.setattr(process_watch, "_GRACE", 0)
    monkeypatch.setattr(os, "_exit", exits.append)
    watch._stop("process 1 of 2 is gone")
    assert exits == [1] and capsys.readouterr().err == f"error: process 1 of 2 is gone; all stop, {remedy}\n"


class Told:
    """What the other processes are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def fail(self, message: str) -> None:
        self.told.append(message)


def test_how_long_processes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer(accelerator="cpu", strategy="ddp", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, DDPStrategy)
    for evaluation, expected in ((False, timedelta(minutes=30)), (True, timedelta(days=7))):
        limit_waiting(trainer, evaluation)
        assert trainer.strategy._timeout == expected
        trainer.strategy._timeout = timedelta(minutes=30)
    monkeypatch.setenv(TIMEOUT, "90")
    limit_waiting(trainer, False)
    assert trainer.strategy._timeout == timedelta(seconds=90)
    monkeypatch.setenv(TIMEOUT, "soon")
    with pytest.raises(LipsimError, match=f"expected {TIMEOUT} to be a positive number of seconds, got 'soon'"):
        limit_waiting(trainer, False)
    monkeypatch.delenv(TIMEOUT)
    own = DDPStrategy(timeout=timedelta(hours=2))
    trainer = L.Trainer(accelerator="cpu", strategy=own, logger=False, enable_checkpointing=False)
    limit_waiting(trainer, True)
    assert own._timeout == timedelta(hours=2)
    with pytest.raises(LipsimError, match=r"another process does not answer \(\[gloo.cc:1\] Timed out\); its own"):
        with clear_faults(trainer):
            raise RuntimeError("[gloo.cc:1]\nTimed out")
