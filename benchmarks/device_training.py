"""Training on a device: in bf16, compiled, and on two processes, each beside plain training on one."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from device_checks import certify, images_for
from device_figures import TOLERANCE, Figure, Scale, say

from lipsim import audit
from lipsim.callbacks.run_options import quiet_warnings
from lipsim.data import BuiltinTriplets
from lipsim.data.triplet import collate_triplets
from lipsim.layers import OrthogonalLinear, OrthogonalPatches
from lipsim.students import OrthogonalShiftNetwork
from lipsim.training import FineTuning
from lipsim.training.acceleration import Acceleration
from lipsim.training.schedules import Constant

SIZE, BATCH = 32, 32


class _Losses(Callback):
    """The loss of every step, the mean over processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().float().clone()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))


def train(
    device: torch.device, steps: int, processes: int = 1, precision: Any = "32-true", compiled: bool = False
) -> tuple[FineTuning, list[float]]:
    """Some steps of fine-tuning on built-in triplets in the order of the set; the global batch is always the same."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    student = OrthogonalShiftNetwork(SIZE, 64, grid=4, widths=(32, 64), depths=(1, 1))
    stage = FineTuning(student, schedule=Constant(), acceleration=Acceleration(compile=compiled))
    triplets = BuiltinTriplets("train", 4 * BATCH, image_size=SIZE)
    rank = int(os.environ["RANK"]) if processes > 1 else 0
    own = range(rank, len(triplets), processes)  # Lightning's sampler of several processes would shuffle
    loader = DataLoader(triplets, batch_size=BATCH // processes, sampler=own, collate_fn=collate_triplets)
    watch = _Losses()
    with tempfile.TemporaryDirectory() as folder, quiet_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
        trainer = L.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            use_distributed_sampler=False,
            precision=precision,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[watch],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(stage, loader, weights_only=True)
    return stage, watch.losses


def apart_from_orthonormal(stage: FineTuning) -> float:
    """The largest entry of ``W Wᵀ − 1`` of the orthonormal maps of a student, of their smaller side, in float64."""
    worst = 0.0
    for module in stage.metric.encoder.eval().modules():
        if isinstance(module, OrthogonalLinear | OrthogonalPatches):
            weight = module.weights()[0].detach().flatten(1).double()
            weight = weight if weight.shape[0] <= weight.shape[1] else weight.mT
            gram = weight @ weight.mT
            worst = max(worst, float((gram - torch.eye(len(gram), device=gram.device)).abs().max()))
    return worst


def precision_figures(device: torch.device, scale: Scale, quick: bool = False) -> Iterator[Figure]:
    """Training in bf16 and compiled: losses near those of float32, maps as orthonormal."""
    part = f"training, {scale.steps} steps of {BATCH} triplets"
    say("training in float32")
    _, plain = train(device, scale.steps)
    last = max(1, scale.steps // 4)
    end = sum(plain[-last:]) / last
    yield Figure(part, "float32, loss at the end", f"{end:.4f}", end, note=f"{plain[0]:.4f} at first")
    ways = {"bf16-mixed": ("bf16-mixed", False, 0.05), "torch.compile": ("32-true", True, 0.005)}
    for name, (precision, compiled, allowed) in ways.items():
        if compiled and quick:
            continue
        say(f"training, {name}")
        stage, losses = train(device, scale.steps, precision=precision, compiled=compiled)
        loss = sum(losses[-last:]) / last
        note = f"allowed: {allowed:.1%} of the first loss from float32"
        near = abs(loss - end) <= allowed * plain[0]
        yield Figure(part, f"{name}, loss at the end", f"{loss:.4f}", loss, passed=near, note=note)
        apart = apart_from_orthonormal(stage)
        yield Figure(part, f"{name}, maps from orthonormal", f"{apart:.1e}", apart, passed=apart <= TOLERANCE)
        bound = audit.lipschitz_bound(stage.metric.encoder, SIZE).total
        yield Figure(part, f"{name}, audited bound", f"{bound:.7f}", bound, passed=bound <= 1 + TOLERANCE)


def processes_figures(device: torch.device, scale: Scale) -> Iterator[Figure]:
    """Two processes with half the batch each train and certify as one."""
    count = torch.accelerator.device_count() if device.type != "cpu" else 2
    backend = "nccl" if device.type == "cuda" else "gloo"
    part = f"two processes, {backend}"
    if count < 2:
        yield Figure(part, "training", note=f"{count} {device.type} device here, two are needed")
        return
    say(f"two processes, {backend}")
    steps = min(scale.steps, 12)
    alone = _outcome(device, steps, 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (device.type, steps, _free_port(), folder), nprocs=2)
        outcomes = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]
    difference = float((outcomes[0]["loss"] - alone["loss"]).abs().max() / alone["loss"][0])
    yield Figure(part, "loss of a step", f"{difference:.1e}", difference, passed=difference <= 1e-4, note="relative")
    same = all(torch.equal(value, outcomes[1][name]) for name, value in outcomes[0].items())
    yield Figure(part, "both processes", "equal" if same else "other", passed=same, note="losses, bound, certificates")
    for name in ("bound", "radius"):
        difference = float((outcomes[0][name] - alone[name]).abs().max() / alone[name].abs().max())
        passed = difference <= (TOLERANCE if name == "bound" else 1e-3)
        yield Figure(part, f"{name} after training", f"{difference:.1e}", difference, passed=passed, note="relative")


def _outcome(device: torch.device, steps: int, processes: int) -> dict[str, torch.Tensor]:
    stage, losses = train(device, steps, processes)
    metric = stage.metric.frozen_copy(device=device)
    bound = metric.audit().total
    radius = certify(metric, images_for(metric, 4))["radius"]
    return {
        "loss": torch.tensor(losses, dtype=torch.float64),
        "bound": torch.tensor([bound], dtype=torch.float64),
        "radius": radius,
    }


def _process(rank: int, kind: str, steps: int, port: int, folder: str) -> None:
    """One of two processes, as torchrun would have started it."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "device",
    }
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, rank)
    torch.save(_outcome(device, steps, 2), Path(folder, f"{rank}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
