"""The progress of training and evaluation where no terminal shows a bar: a line now and then."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lipsim.utils.progress import Progress, duration

_EVERY = 1.0  # seconds between two looks at the losses, each of which waits for a GPU


class ProgressLines(ProgressBar):
    """Writes a line to stdout after two seconds and then every 15 seconds or more: what runs, how far, how long yet."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled, self._begun, self._read, self._text = True, 0.0, 0.0, ""

    def disable(self) -> None:
        """Say nothing, as Lightning asks of all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def say(self, detail: str) -> None:
        """Add what a long batch is doing to the line."""
        if self._progress is not None:
            self._progress(f"{self._text}, {detail}")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._begun = time.monotonic()
        self._progress = Progress(TrainerFn(stage).value, sys.stdout, self._enabled).__enter__()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epochs = "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"
        epoch = f"epoch {trainer.current_epoch + 1}{epochs}"
        self._at(epoch, batch_idx + 1, self.total_train_batches)
        if time.monotonic() - self._read < _EVERY:
            return
        self._read = time.monotonic()
        values = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if isinstance(v, (int, float))}
        if values:
            self.say(", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx) or batch_idx == 0:
            self._begun = time.monotonic()
        self._at("validation", batch_idx, self.total_val_batches_current_dataloader)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx) or batch_idx == 0:
            self._begun = time.monotonic()
        self._at("test", batch_idx, self.total_test_batches_current_dataloader)

    def _at(self, part: str, done: int, total: float) -> None:
        """Batches done of all, and the time that the rest will take at the rate so far."""
        seconds = time.monotonic() - self._begun
        self._text = f"{part}, {done} batches done"
        if math.isfinite(total):
            self._text = f"{part}, {done} of {int(total)} batches done"
            if done:
                self._text += f", {duration(seconds / done * (total - done))} left"
        if self._progress is not None:
            self._progress(self._text)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None
