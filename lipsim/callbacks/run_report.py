"""A page in the run folder that shows a training while it runs."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lipsim.callbacks.run_status import RunStatus
from lipsim.results.run_page import RATE_COLUMN, STATUS, State, Status, read_status, write_run_page, write_status
from lipsim.utils.terminal import one_line

_SHORTEST = 60.0  # seconds between two pages
_FREE, _SHARE = 1.0, 0.01  # seconds that pages may take at least, and their share of the time beyond that


class RunReport(Callback):
    """Writes ``report.html`` and ``progress.json`` into the run folder: while training runs, when it ends, how it ends.

    The first process writes, each file as a whole, after a validation or a minute, and more seldom where that took more
    than a hundredth of the time so far (a second is free). A browser reads the page of a running training again by
    itself. It logs the learning rate as well, as ``train/lr``. A test in the folder of a training adds its scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self._status = RunStatus()
        self._root: Path | None = None  # None: nothing to write
        self._earlier, self._begun = 0.0, 0.0  # seconds of the parts before; when this one began
        self._written, self._spent = 0.0, 0.0  # when the last page was begun, and what all of this part took

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._root = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            root = Path(trainer.default_root_dir)
            if stage == "fit" or (stage == "test" and (root / STATUS).is_file()):
                self._root = root
        self._begun = time.monotonic()
        earlier = read_status(self._root) if self._root is not None else None  # of a training that this one continues
        self._earlier = earlier["seconds"] if earlier is not None else 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_train_start(trainer)
        self._begun, self._spent = time.monotonic(), 0.0
        self._write(trainer, "running")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._status.on_train_batch_start()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # To the loggers, and where they log: LightningModule.log would have a GPU wait at every step.
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics({RATE_COLUMN: optimizer.param_groups[0]["lr"]}, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._status.on_train_batch_end(trainer, batch)
        self._write_now_and_then(trainer, _SHORTEST)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_validation_start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._status.on_validation_end(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_now_and_then(trainer, 0.0)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "finished")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._root is not None and read_status(self._root) is not None:
            write_run_page(self._root)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit":
            return
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        message = one_line(str(exception)) or type(exception).__name__
        self._write(trainer, "interrupted" if stopped else "failed", "" if stopped else message)

    def _write_now_and_then(self, trainer: L.Trainer, shortest: float) -> None:
        now = time.monotonic()
        if now - self._written >= shortest and self._spent <= _FREE + _SHARE * (now - self._begun):
            self._write(trainer, "running")

    def _write(self, trainer: L.Trainer, state: State, message: str = "") -> None:
        if self._root is None:
            return
        start = self._written = time.monotonic()
        status: Status = {
            "state": state,
            "message": message,
            "stage": type(trainer.lightning_module).__name__,
            "step": trainer.global_step,
            "steps": self._status.total,
            "epoch": trainer.current_epoch,
            "epochs": None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
            "images_per_second": self._status.pace.rate,
            "seconds": self._earlier + start - self._begun,
            "seconds_left": self._status.seconds_left(trainer) if state == "running" else None,
            "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        try:
            write_status(self._root, status)
            write_run_page(self._root, refresh=int(_SHORTEST))
        except OSError as error:  # a full disk, say: no reason to end a training, or to hide why it ended
            rank_zero_info(f"the page of the run is not brought up to date: {error}")
        self._spent += time.monotonic() - start
