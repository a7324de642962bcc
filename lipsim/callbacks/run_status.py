"""How far a training is, how fast, how long yet, and how its metric was certified last."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer

from lipsim.data import Triplet
from lipsim.data.labelled import LabelledBatch
from lipsim.data.loading import Finished
from lipsim.results.training_log import CERTIFIED, certified, last_certified, read_log
from lipsim.utils.progress import Pace, duration, per_second


class RunStatus:
    """Follows a training; whoever tells of it calls these methods in the hooks of the same names."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.scores: dict[str, float] = {}  # certified, by column of the log, of the last validation that has some
        self.total: int | None = None  # steps of the whole training; None without an end
        self._processes = 1

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Start anew; of a training that continues, the last scores are those in its log."""
        self.pace, self._processes, self.total = Pace(), trainer.world_size, total_steps(trainer)
        self.scores = last_certified(read_log(Path(trainer.default_root_dir))) if trainer.global_step else {}

    def on_train_batch_start(self) -> None:
        """The time before the first batch does not count."""
        self.pace.begin()

    def on_train_batch_end(self, trainer: L.Trainer, batch: Any) -> None:
        """A batch is done, on every process."""
        self.total = total_steps(trainer)  # where training continues with other batches, not known when it starts
        steps = 1 / trainer.accumulate_grad_batches
        self.pace.add(steps, num_images(batch) * self._processes)

    def on_validation_start(self) -> None:
        """Validation is no part of the rate, and of the time that is left."""
        self.pace.pause()

    def on_validation_end(self, trainer: L.Trainer) -> None:
        """Keep its scores."""
        self.pace.resume()
        if not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if CERTIFIED.match(name)}
            self.scores = certified(metrics) or self.scores

    def seconds_left(self, trainer: L.Trainer) -> float | None:
        """Until the whole training ends, by its steps or its time, whichever is first; None where nobody knows."""
        left, each = [], self.pace.seconds_per_step
        if each is not None and self.total is not None:
            left.append(each * max(0, self.total - trainer.global_step))
        for timer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(timer, Timer) and (seconds := timer.time_remaining()) is not None:
                left.append(max(0.0, seconds))
        return min(left, default=None)

    @property
    def rate(self) -> str:
        """Images a second of all processes, as people read it; empty before there is one."""
        rate = self.pace.rate
        return "" if rate is None else per_second(rate, "images")

    def left(self, trainer: L.Trainer) -> str:
        """:meth:`seconds_left` as people read it, ``2 h 10 min left``; empty where nobody knows."""
        seconds = self.seconds_left(trainer)
        return "" if seconds is None else f"{duration(seconds)} left"

    @property
    def certified(self) -> str:
        """The last score at the smallest budget of the first set, as people read it; empty before there is one."""
        for column, score in self.scores.items():
            found = CERTIFIED.fullmatch(column)
            assert found is not None
            return f"{score:.1%} certified at {found['eps']} ({found['set']})".replace("%", " %", 1)
        return ""


def total_steps(trainer: L.Trainer) -> int | None:
    """Steps of the whole training; None without an end (``max_epochs`` −1, data of unknown length)."""
    total = trainer.estimated_stepping_batches
    return None if total < 0 or math.isinf(total) else int(total) - getattr(trainer.lightning_module, "steps_ahead", 0)


def num_images(batch: Any) -> int:
    """Distinct images in a batch, three of each triplet where these share none; 0 where it is finished."""
    if isinstance(batch, Finished):
        return 0
    if isinstance(batch, Triplet):
        return sum(map(len, batch.images()))
    if isinstance(batch, LabelledBatch):
        return len(batch.images)
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    return len(images)
