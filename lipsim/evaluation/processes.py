"""Several processes that share one piece of work, started here or by a launcher."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor

from lipsim.utils.errors import LipsimError
from lipsim.utils.slurm import check_slurm


class ProcessFailed(LipsimError):
    """One of several processes could not do its share; it has said why on stderr."""


def processes(accelerator: str, devices: int = 1, num_nodes: int = 1) -> Fabric:
    """One process, or several that this command or a launcher starts; the slowest may take a week longer.

    Raises:
        ValueError: no such accelerator, or not so many of its devices.
    """
    check_slurm()
    alone = devices * num_nodes == 1 and os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy="auto" if alone else DDPStrategy(timeout=timedelta(days=7)),
        )
    except (RuntimeError, ValueError) as error:  # a device that is not there has the former, an unknown name the latter
        raise LipsimError(f"no {devices} device(s) of the accelerator {accelerator!r} here: {error}") from error


def total(fabric: Fabric, done: int, failure: Exception | None = None) -> int:
    """What all processes have done together, once the slowest is through.

    Raises:
        ProcessFailed: one of them had a failure.
    """
    counts = fabric.all_reduce(torch.tensor([float(done), float(failure is not None)]), reduce_op="sum")
    assert isinstance(counts, Tensor)
    if counts[1]:
        raise ProcessFailed(f"{int(counts[1])} of {fabric.world_size} processes could not finish") from failure
    return int(counts[0])
