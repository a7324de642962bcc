"""Training started by torchrun: on one node, on two that meet, and again after a process has died."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = [
    *"scripts/train.py fit --config configs/quickstart/linear.yaml --trainer.accelerator cpu".split(),
    *"--trainer.max_epochs 1 --data.num_train 32 --data.num_val 4 --data.batch_size 8".split(),
]
pytestmark = pytest.mark.slow  # each starts two or three interpreters, of seconds each

# Process 1 dies at step 6 of 12 the first time.
DYING = """
import os, signal, sys
from lightning.pytorch import Callback
import lipsim

class Steps(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.is_global_zero:
            print("step", trainer.global_step, file=open("steps.txt", "a"))
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.global_step == 6 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

data = lipsim.datamodules.BuiltinData(num_train=64, num_val=4, num_test=4, image_size=16, batch_size=8)
stage = lipsim.training.FineTuning(lipsim.students.OrthogonalProjection(16, 4))
lipsim.train(stage, data, directory="run", callbacks=[Steps()], checkpoint="last", max_epochs=3, accelerator="cpu",
             devices=2, enable_progress_bar=False)
"""


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    # As docs/clusters.md says: else those that start again may read the addresses of those that died.
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_one_node(tmp_path: Path) -> None:
    run = start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *TRAIN, "--trainer.devices", "2",
                 "--trainer.default_root_dir", str(tmp_path / "run")], ROOT)  # fmt: skip
    said, _ = run.communicate(timeout=1200)
    assert run.returncode == 0, said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "linear.safetensors").is_file()


def test_two_nodes_that_meet(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "7", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]  # fmt: skip
    options = [
        "--trainer.devices",
        "1",
        "--trainer.num_nodes",
        "2",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    nodes = [start([*TORCHRUN, *meeting, *TRAIN, *options], ROOT) for _ in range(2)]
    said = [node.communicate(timeout=1200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2


def test_all_processes_start_again_where_one_died(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DYING)
    run = start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "train.py"], tmp_path)
    said, _ = run.communicate(timeout=1200)
    assert run.returncode == 0, said
    steps = [int(line.split()[1]) for line in (tmp_path / "steps.txt").read_text().splitlines()]
    again = steps.index(5, steps.index(5) + 1)  # from the checkpoint of the first epoch, after 4 steps
    assert steps[:again] in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]) and steps[again:] == list(range(5, 13))
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 12
