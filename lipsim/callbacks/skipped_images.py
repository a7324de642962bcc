"""What a training has skipped, at the end of each epoch."""

from __future__ import annotations

import logging

import lightning as L
from lightning.pytorch import Callback

from lipsim.datamodules.base import TripletData

_log = logging.getLogger(__name__)


class ReportSkipped(Callback):
    """Says how many training samples of an epoch were skipped since they could not be read, each process for itself.

    A data module skips them when it is told to (``on_error: skip``); their names are in ``skipped.csv``.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # which is not called in the middle of an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(data := _data(trainer), TripletData):
            data.skipped.start_epoch()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(data := _data(trainer), TripletData) and (message := data.skipped.message()):
            rank = "" if trainer.world_size == 1 else f"process {trainer.global_rank} "
            _log.warning("%s%s; skipped.csv has all", rank, message)


def _data(trainer: L.Trainer) -> object:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data
