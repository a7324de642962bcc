"""Small evaluations as the tests of this room run them: a metric, a config, and ways of cutting a run short."""

from __future__ import annotations

import csv
import inspect
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from lipsim import PerceptualMetric, students
from lipsim.cli.evaluate import evaluate
from lipsim.data.loading import Finished
from lipsim.evaluation.exported import ExportedMetric
from lipsim.metric import save

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts/evaluate.py")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
COUNT, BATCH = 15, 2
CERTIFY = "--trainer.callbacks=lipsim.callbacks.CertifyRadii"


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with ``metric.safetensors`` and ``config.yaml``."""
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    save(PerceptualMetric(students.OrthogonalProjection(16, 8), 16), "metric.safetensors")
    write_config(config())


def write_config(content: dict[str, Any]) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(content))


def config(steps: int = 80) -> dict[str, Any]:
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lipsim.callbacks.CertifyRadii", "init_args": {"error_sample": 4}},
                {"class_path": "lipsim.callbacks.AttackRobustness", "init_args": {"steps": steps, "queries": 40}},
                {"class_path": "lipsim.callbacks.NullSpaceRobustness"},
                {"class_path": "lipsim.callbacks.TripletGallery", "init_args": {"num_triplets": 1, "steps": 5}},
            ],
        },
        "data": {
            "class_path": "lipsim.datamodules.BuiltinData",
            "init_args": {"num_test": COUNT, "image_size": 16, "batch_size": BATCH},
        },
    }


def args(folder: str, *more: str) -> list[str]:
    given = ["--config", "config.yaml", "--checkpoint", "metric.safetensors", "--trainer.default_root_dir", folder]
    return [*given, *more]


def rows(path: str) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def kill_after(batches: int, args: list[str]) -> list[str]:
    """Start an evaluation, kill it and its children when some batches are finished; returns the lines that are kept."""
    folder = Path(args[args.index("--trainer.default_root_dir") + 1]) / "unfinished"
    process = subprocess.Popen(
        [*SCRIPT, *args], env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines: list[str] = []
    try:
        deadline = time.monotonic() + 200
        while len(lines) < batches and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            lines = [line for path in folder.glob("part-*.jsonl") for line in path.read_text().splitlines()]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return [line for path in folder.glob("part-*.jsonl") for line in path.read_text().splitlines()]


def spy_on_embedding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the triplets that evaluations in this process embed, from now on."""
    seen: list[int] = []
    step = ExportedMetric.test_step

    def spy(self: ExportedMetric, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        seen.extend([] if isinstance(batch, Finished) else batch.index.tolist())
        return step(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(ExportedMetric, "test_step", spy)
    return seen


def cut_short(monkeypatch: pytest.MonkeyPatch, after: int, given: list[str]) -> list[str]:
    """An evaluation that fails before a batch of each set in this process; returns the lines that are kept."""
    step = ExportedMetric.test_step

    def fails(self: ExportedMetric, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == after:
            raise InterruptedError
        return step(self, batch, batch_idx, dataloader_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ExportedMetric, "test_step", fails)
        with pytest.raises(InterruptedError):
            evaluate(given)
    folder = Path(given[given.index("--trainer.default_root_dir") + 1]) / "unfinished"
    return [line for path in folder.glob("part-*.jsonl") for line in path.read_text().splitlines()]


def as_one_of_ours(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command line take a data module of these tests for one of the package, which configs may name."""
    monkeypatch.setattr(f"lipsim.datamodules.{cls.__name__}", cls, raising=False)
    monkeypatch.setattr(cls, "__module__", "lipsim.datamodules")


def command_line_of(cls: type, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """:func:`as_one_of_ours`, in this process and in others."""
    name, module = cls.__name__, Path(inspect.getfile(cls.__init__))  # its module may be said to be ours already
    as_one_of_ours(cls, monkeypatch)
    runner = folder / "run.py"
    runner.write_text(
        f"import sys; sys.path.insert(0, {str(module.parent)!r}); import {module.stem}, lipsim.datamodules\n"
        f"lipsim.datamodules.{name} = {module.stem}.{name}\n"
        f"lipsim.datamodules.{name}.__module__ = 'lipsim.datamodules'\n"
        "from lipsim.cli.evaluate import main\nif __name__ == '__main__':\n    main()\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", [sys.executable, str(runner)])


def run_command(given: list[str]) -> None:
    """An evaluation in a process of its own, which may start others."""
    run = subprocess.run([*SCRIPT, *given], env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]


def fork_two(given: list[str]) -> None:
    """An evaluation on two processes that are forked from this one, in an environment like torchrun's."""
    forked(2, evaluate, given)


def forked(count: int, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in processes that are forked from this one, in an environment like torchrun's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_as_rank, args=(world, rank, function, arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=5)
        if any(p.exitcode for p in processes):  # the others would wait for it
            break
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * count


def _as_rank(
    environment: dict[str, str], rank: int, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    rank_zero_only.rank = rank  # which Lightning reads from these when it is imported
    function(*arguments)
