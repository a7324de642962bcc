"""The progress of training and evaluation where no terminal shows a bar: a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lipsim.callbacks.run_status import RunStatus, num_images
from lipsim.utils.progress import Pace, Progress, duration, per_second

_EVERY = 1.0  # seconds between two looks at the losses, each of which waits for a GPU


class ProgressLines(ProgressBar):
    """Writes a line to stdout after two seconds and then every 15 seconds or more.

    It says what runs and how far it is, how fast, how long the whole of it takes yet, the losses, and the last
    certified score. The first process alone writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled, self._read, self._text = True, 0.0, ""
        self._status, self._pace = RunStatus(), Pace()
        self._losses = ""

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
        self._progress = Progress(TrainerFn(stage).value, sys.stdout, self._enabled).__enter__()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_train_start(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._status.on_train_batch_start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._status.on_train_batch_end(trainer, batch)
        if time.monotonic() - self._read >= _EVERY:
            self._read = time.monotonic()
            values = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if isinstance(v, (int, float))}
            self._losses = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        epochs = "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"
        epoch = f"epoch {trainer.current_epoch + 1}{epochs}"
        self._at(epoch, batch_idx + 1, self.total_train_batches, self._about_the_run(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_validation_start()
        self._pace = Pace()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_validation_end(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        sanity = trainer.sanity_checking
        sizes = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
        training = trainer.state.fn == TrainerFn.FITTING and not sanity
        about = self._about_the_run(trainer)[1:] if training else None  # the rate of training is no rate of this
        self._at_batch("first look at validation" if sanity else "validation", batch_idx, dataloader_idx, sizes, about)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if count := num_images(batch):  # what was finished before takes no time
            self._pace.add(1, count * trainer.world_size)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace = Pace()

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at_batch("test", batch_idx, dataloader_idx, trainer.num_test_batches)

    on_test_batch_end = on_validation_batch_end

    def _about_the_run(self, trainer: L.Trainer) -> list[str]:
        status = self._status
        return [status.rate, status.left(trainer), self._losses, status.certified]

    def _at_batch(
        self, part: str, batch: int, loader: int, sizes: Sequence[int | float], about: Sequence[str] | None = None
    ) -> None:
        """A batch of an evaluation begins: how far all its sets are, and without ``about`` how long they take yet."""
        self._pace.begin()
        done, total = int(sum(sizes[:loader])) + batch, sum(sizes)
        rate, each = self._pace.rate, self._pace.seconds_per_step
        known = each is not None and math.isfinite(total)
        left = f"{duration(each * (total - done))} left" if known and each is not None else ""
        self._at(
            part, done, total, ["" if rate is None else per_second(rate, "images"), left] if about is None else about
        )

    def _at(self, part: str, done: int, total: float, about: Sequence[str]) -> None:
        of = f" of {int(total)}" if math.isfinite(total) else ""
        self._text = ", ".join(filter(None, [part, f"{done}{of} batches done", *about]))
        if self._progress is not None:
            self._progress(self._text)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None
