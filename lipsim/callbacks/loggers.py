"""Where a run logs its numbers: always metrics.csv in its folder, and TensorBoard or W&B by name."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lipsim.callbacks.run_folder import continues, next_free
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_csv

LoggerName = Literal["tensorboard", "wandb"]
# What the command line and Python take; None and True are the CSV log alone, False is no log.
Loggers = LoggerName | Logger | list[LoggerName | Logger] | bool | None
NAMES = get_args(LoggerName)
_OPEN: list[WandbLogger] = []  # those that were made by name and whose run may be open


class RunLog(CSVLogger):
    """``metrics.csv`` in a run folder, whole whenever it is read: a row is appended, a new column replaces the file.

    Lightning writes after each row, so that a process that is killed leaves all its rows. What is logged of one step
    before it is written is one row.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """Writes the file."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics_dict, step)
        if len(self.metrics) > 1 and self.metrics[-2]["step"] == self.metrics[-1]["step"]:
            row = self.metrics.pop()
            if row.keys() & self.metrics[-1].keys() == {"step"}:
                self.metrics[-1].update(row)
            else:
                self.metrics.append(row)

    def save(self) -> None:
        columns = list(self.metrics_keys)
        try:
            super().save()
        except BaseException:  # also an interrupt, after which Lightning saves once more
            self.metrics_keys = columns
            raise

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        # Lightning's would leave a part of the rows when it is killed here.
        path = Path(self.metrics_file_path)
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        write_csv(path, fieldnames, ([row.get(name, "") for name in fieldnames] for row in rows))


def run_loggers(
    given: Loggers | Iterable[Any], directory: Path, checkpoint: str | Path | None = None, *, trial: bool = False
) -> list[Logger] | bool:
    """Loggers of a run: the CSV log of its folder, and beside it what was asked for.

    A run that begins anew keeps the logs of an earlier one under a number (``metrics-1.csv``, ``tensorboard-1``); one
    that continues goes on in the same TensorBoard folder and in the same run of W&B.

    Args:
        given: names, loggers, or a list of them; None or True: the CSV log alone; False: none.
        directory: of the run.
        checkpoint: what training resumes from; see :func:`lipsim.callbacks.run_folder.continues`.
        trial: what was asked for is checked, and nothing is logged.

    Raises:
        ValueError: a name that is none, or one whose package is not installed.
    """
    if given is None or given is True:
        asked: list[Any] = []
    elif not given:
        return False
    else:
        asked = [given] if isinstance(given, (str, Logger)) else list(given)
    for logger in asked:
        check_logger(logger)
    if trial:
        return False
    _keep(directory / "metrics.csv")
    loggers = [_named(one, directory, checkpoint) if isinstance(one, str) else one for one in asked]
    here = directory.absolute()
    if not any(isinstance(one, CSVLogger) and Path(one.log_dir).absolute() == here for one in loggers):
        loggers.insert(0, RunLog(directory))  # first: Lightning takes its folder for that of the run
    return loggers


def check_logger(logger: object) -> None:
    """Refuse what is no logger, and one by name whose package is missing.

    Raises:
        ValueError: it is.
    """
    if isinstance(logger, Logger):
        return
    if logger not in NAMES:
        raise LipsimError(f"expected {', '.join(NAMES)} or a Lightning logger, got {logger!r}")
    if importlib.util.find_spec(str(logger)) is None:
        raise LipsimError(f"the logger {logger} needs its package; pip install 'lipsim[{logger}]'")


def log_config(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Hand the configuration of a run to its loggers, once; beside the CSV log it is in a file already."""
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(config)


def _named(name: str, directory: Path, checkpoint: str | Path | None) -> Logger:
    folder, anew = directory / name, not continues(directory, checkpoint)
    if anew:
        _keep(folder)
    if name == "tensorboard":
        return TensorBoardLogger(directory, name="", version=name)
    _finish_wandb()
    project = os.environ.get("WANDB_PROJECT", "lipsim")
    directory.mkdir(parents=True, exist_ok=True)  # W&B would take another folder
    logger = WandbLogger(
        name=directory.name, save_dir=directory, project=project, id=None if anew else _wandb_id(folder)
    )
    _OPEN.append(logger)
    return logger


def _finish_wandb() -> None:
    """End the run of W&B that an earlier training of this process has begun: its next logger would go on in it."""
    wandb = sys.modules.get("wandb")
    while _OPEN:
        logger = _OPEN.pop()
        if wandb is not None and wandb.run is not None and wandb.run.id == logger.version:
            wandb.run.finish()


def _wandb_id(folder: Path) -> str | None:
    """Id of the last run of W&B in its folder, whose name ends with it; None without any."""
    runs = sorted(path.name.partition("run-")[2] for path in folder.glob("*run-*-*") if path.is_dir())
    return runs[-1].partition("-")[2] if runs else None


@rank_zero_only
def _keep(path: Path) -> None:
    """Move a log of an earlier run aside: a CSVLogger would delete it, and others would add to it."""
    if path.exists():
        path.rename(next_free(path))
