"""Which samples a training had to leave out, in a file of its folder and in its log."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import lightning as L

from lipsim.data.skipping import Unread
from lipsim.utils.errors import LipsimError

SKIPPED = "skipped.csv"
# Past so many samples, more than this share of which could not be read, something else is wrong than a few files.
_ENOUGH, _MOST = 200, 0.1


class SkippedSamples:
    """Counts samples of one process that could not be read, and appends each to ``skipped.csv`` at once.

    Processes beside the first write ``skipped-RANK.csv``.
    """

    def __init__(self) -> None:
        self.seen = self.skipped = 0
        self.names: set[int] = set()
        self.first = ""

    def start_epoch(self) -> None:
        """Count from 0."""
        self.__init__()  # type: ignore[misc]

    def add(self, trainer: L.Trainer, size: int, unread: Sequence[Unread]) -> None:
        """Take a batch into account.

        Args:
            trainer: of the training.
            size: samples that were asked for.
            unread: those that could not be read.

        Raises:
            ValueError: more than a tenth of many samples cannot be read.
        """
        self.seen += size
        if not unread:
            return
        self.skipped += len(unread)
        self.first = self.first or unread[0].reason
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, unread)
        if self.seen >= _ENOUGH and self.skipped > _MOST * self.seen:
            raise LipsimError(
                f"{self.skipped} of {self.seen} training samples could not be read (first: {self.first}), more than a "
                "tenth: that is no matter of a few files; see whether the disk is there, or run lipsim data check"
            )

    def message(self) -> str:
        """What was skipped in the epoch, for the log; empty where nothing was."""
        if not self.skipped:
            return ""
        return f"skipped {self.skipped} of {self.seen} training samples of this epoch (first: {self.first})"

    def _write(self, trainer: L.Trainer, unread: Sequence[Unread]) -> None:
        rank = "" if trainer.global_rank == 0 else f"-{trainer.global_rank}"
        path = Path(trainer.default_root_dir) / SKIPPED.replace(".", f"{rank}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        # A reason names a file, whose name need not be UTF-8.
        with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(["epoch", "step", "sample", "reason"])
            rows.writerows([trainer.current_epoch, trainer.global_step, *sample] for sample in unread)
