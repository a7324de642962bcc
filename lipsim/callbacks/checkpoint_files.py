"""Checkpoints that have their name when they are whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lipsim.utils.files import write_bytes


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints beside their place and then renames them, see :func:`lipsim.utils.files.write_file`.

    Lightning 2.6 writes them into the folder for temporary files and moves them: to another disk that is a copy, and
    whoever is killed meanwhile leaves a part of a checkpoint under the name of the one that it had.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; one that is there stays until this one is complete.

        Raises:
            OSError: it cannot be written, to a full disk say; the message has path, need and free space.
        """
        if "://" in str(path) or storage_options is not None:  # elsewhere than on a disk, or to be refused
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # as Lightning does; torch.save hides the error of a disk behind one of its own
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getbuffer())


def write_checkpoints_whole(trainer: L.Trainer) -> None:
    """Have a trainer write its checkpoints by :class:`WholeCheckpoints`, unless it has a way of its own."""
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpoints()
