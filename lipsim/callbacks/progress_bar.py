"""The progress bar of training and evaluation in a terminal."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn, Task
from rich.text import Text

from lipsim.callbacks.run_status import RunStatus


class RunProgressBar(RichProgressBar):
    """Lightning's bar, which says of a training as well what :class:`ProgressLines` does.

    Instead of the batches a second it has images a second, of all processes; instead of the time that the epoch takes
    yet, that of the whole training; and the last certified score follows the losses.
    """

    def __init__(self, console_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(console_kwargs=console_kwargs)
        self._status = RunStatus()

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Lightning's description, bar and count of batches, then what is left, and the rate."""
        *first, time, speed = super().configure_columns(trainer)
        return [*first, _OrField("left", time), _OrField("rate", speed)]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands at the end of the bar."""
        metrics: dict[str, Any] = {**super().get_metrics(trainer, pl_module)}
        # A name of its own would say "certified" twice.
        return {**metrics, "last": self._status.certified} if self._status.certified else metrics

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._status.on_train_start(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._status.on_train_batch_start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._status.on_train_batch_end(trainer, batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, left=self._status.left(trainer), rate=self._status.rate)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._status.on_validation_start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_validation_end(trainer)
        super().on_validation_end(trainer, pl_module)


class _OrField(ProgressColumn):
    """A field of a task that has it, or what another column shows."""

    max_refresh = 0.5  # seconds: figures that change more often cannot be read

    def __init__(self, field: str, other: ProgressColumn) -> None:
        super().__init__()
        self._field, self._other = field, other

    def render(self, task: Task) -> Any:
        text = task.fields.get(self._field)
        return self._other.render(task) if text is None else Text(text, style=getattr(self._other, "style", ""))
