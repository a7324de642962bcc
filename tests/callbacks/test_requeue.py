"""A job that SLURM starts again continues its own run, and nobody else's."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback

import lipsim
from lipsim.callbacks.run_folder import to_continue
from lipsim.datamodules import BuiltinData
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning

RUN = Path("run")
TASK = {
    "JOB_ID": "7",
    "NTASKS": "1",
    "NTASKS_PER_NODE": "1",
    "NNODES": "1",
    "PROCID": "0",
    "LOCALID": "0",
    "NODEID": "0",
}


class Steps(Callback):
    """The steps that were taken; a signal to this process before one of them."""

    def __init__(self, number: signal.Signals | None = None, step: int = 2) -> None:
        self.number, self.step, self.seen = number, step, list[int]()

    def on_before_backward(self, trainer: L.Trainer, *arguments: Any) -> None:
        if self.number is not None and trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.seen.append(trainer.global_step)


@pytest.fixture(autouse=True)
def _a_task_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that srun sets, and a scontrol that notes how it was called."""
    monkeypatch.chdir(tmp_path)
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in TASK.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def train(steps: Steps, directory: Path = RUN) -> torch.Tensor:
    """Train for 8 steps; the weights."""
    torch.manual_seed(0)
    data = BuiltinData(num_train=32, num_val=4, num_test=4, image_size=16, batch_size=8)
    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    stage = FineTuning(OrthogonalProjection(16, 4))
    metric = lipsim.train(stage, data, directory=directory, callbacks=[steps], max_epochs=2, **options)
    return torch.cat([parameter.flatten() for parameter in metric.parameters()])


def test_a_requeued_job_continues_and_a_new_one_begins_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, other = Steps(signal.SIGUSR1), Steps(), Steps(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train(first)
    assert stop.value.code == 75 and Path("scontrol").read_text() == "requeue 7\n"
    assert not list(RUN.glob("hpc_ckpt*")) and not (RUN / "metric.safetensors").exists()
    assert json.loads((RUN / "environment.json").read_text())["job"] == "7"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with caplog.at_level("INFO"):
        weights = train(second)  # as it was called the first time
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    torch.testing.assert_close(weights, train(Steps(), Path("whole")), rtol=0, atol=0)  # nobody stopped this one
    assert "SLURM has started this job again" in caplog.text and f"continuing the run in {RUN}" in caplog.text
    assert first.seen + second.seen == list(range(1, 9))
    assert (RUN / "metric.safetensors").is_file() and not (RUN / "previous").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # started again as well, but this is not its run
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit):
        train(other)
    assert other.seen == [1, 2] and (RUN / "previous").is_dir()


def test_what_it_was_told_counts_else(monkeypatch: pytest.MonkeyPatch) -> None:
    (RUN / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    told = "elsewhere/start.ckpt"
    assert to_continue(RUN, told) == told  # nothing is saved yet
    (RUN / "checkpoints" / "last.ckpt").touch()
    assert to_continue(RUN, None) is None  # nobody knows by whom
    for job, expected in (("6", told), ("7", "last"), (None, told)):
        (RUN / "environment.json").write_text(json.dumps({"job": job}))
        assert to_continue(RUN, told) == expected
    for text in ("[]", "{", "null"):
        (RUN / "environment.json").write_text(text)
        assert to_continue(RUN, told) == told
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert to_continue(RUN, told) == told
