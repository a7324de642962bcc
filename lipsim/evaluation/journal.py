"""Keeps the rows of finished batches on disk, so that an evaluation that is cut short can be continued."""

from __future__ import annotations

import lipsim.utils.matplotlib_backend  # noqa: F401  isort: skip  before Lightning, which imports matplotlib

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lipsim.certificates.numbers import check_number
from lipsim.evaluation.module import EvaluationModule
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_json

Kept = dict[str, dict[str, Tensor]]  # callback → column → (N,)
_ERROR = "feature_error"


class RowCallback(Callback, ABC):
    """A callback that finds out something about each triplet of a test, of which the rows can be kept.

    Attributes:
        latest: set, positions, sample indices and columns of the last batch.
    """

    latest: tuple[str, Tensor, Tensor, dict[str, Tensor]] | None = None

    @abstractmethod
    def restore(self, name: str, index: Tensor, position: Tensor, columns: dict[str, Tensor]) -> None:
        """Take rows of the set ``name`` that an interrupted test has found, ``(N,)`` each."""


class KeepBatches(Callback):
    """Writes what the callbacks found out about each batch to ``directory``, a file for each process, a line a batch.

    A line is written whole or, where the process is killed over it, dropped. ``fingerprint.json`` says what the rows
    belong to; rows of anything else are refused. When the test has ended the directory is removed: results.json and the
    CSV files hold everything then. A file of its own, to which it only appends, is what each process can rely on where
    many write to a network disk; SQLite's locks do not hold there.

    Processes continue with the files of their own rank. Where the number of processes has changed, they share the rows
    that the others left.

    Args:
        directory: of the files.
        settings: what, besides the data, the rows depend on (JSON).
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.directory, self.settings = directory, settings
        self.kept: dict[str, list[Kept]] = {}
        self._file: IO[str] | None = None

    def open(self, trainer: L.Trainer, data: Mapping[str, str]) -> dict[str, set[int]]:
        """Read what there is, on every process.

        Args:
            trainer: of the evaluation, its process group started.
            data: fingerprint of each set.

        Returns:
            By set, the positions of the triplets that are finished.

        Raises:
            ValueError: the rows belong to another checkpoint, other data or other settings.
        """
        self._check({**self.settings, "data": dict(data)})
        trainer.strategy.barrier()  # every process has checked before any of them writes
        self.directory.mkdir(parents=True, exist_ok=True)
        if trainer.local_rank == 0 and not self._anything():  # each node may have a disk of its own
            write_json(self.directory / "fingerprint.json", {**self.settings, "data": dict(data)})
        rank, world = trainer.global_rank, trainer.world_size
        own = self.directory / f"part-{rank}-of-{world}.jsonl"
        records = list(_read(own, repair=True))
        for path in sorted(self.directory.glob("part-*-of-*.jsonl")):
            if not path.stem.endswith(f"-of-{world}"):
                records += _read(path)
        finished: dict[str, set[int]] = {}
        self.kept = {}
        for record in records:
            finished.setdefault(record["set"], set()).update(record["position"])
            self.kept.setdefault(record["set"], []).append(_tensors(record))
        for name, indices in finished.items():
            rank_zero_info(f"continuing: {len(indices)} triplets of {name} are finished ({self.directory})")
        self._file = open(own, "a", encoding="utf-8")
        return finished

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After the other callbacks have started: this one comes last.
        self._agree_on_error(trainer, pl_module)
        for name, batches in self.kept.items():
            for key, callback in _callbacks(trainer).items():
                for batch in batches:
                    if key in batch:
                        columns = {column: values.to(pl_module.device) for column, values in batch[key].items()}
                        index, position = columns.pop("index"), columns.pop("position")
                        callback.restore(name, index, position, columns)
        self.kept = {}

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        found = {key: callback.latest for key, callback in _callbacks(trainer).items() if callback.latest}
        if not found or self._file is None or not isinstance(pl_module, EvaluationModule):
            return
        name, position, index, _ = next(iter(found.values()))
        rows = {key: {c: _json(values) for c, values in columns.items()} for key, (*_, columns) in found.items()}
        record = {"set": name, "position": position.tolist(), "index": index.tolist(), "rows": rows}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for callback in _callbacks(trainer).values():
            callback.latest = None

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        trainer.strategy.barrier()
        if trainer.local_rank == 0:
            shutil.rmtree(self.directory, ignore_errors=not trainer.is_global_zero)  # which may be the same one

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._file is not None and self._anything():
            rank_zero_info(f"what is finished is kept in {self.directory}; the same command continues")
        self._close()

    def _agree_on_error(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Certify every triplet with the same error of the features, that of the run that was cut short.

        Raises:
            ValueError: it is larger here.
        """
        path = self.directory / "fingerprint.json"
        read = (json.loads(path.read_text(encoding="utf-8")), self._anything()) if trainer.is_global_zero else None
        told = trainer.strategy.broadcast(read)
        assert told is not None
        settings, continues = told
        if not isinstance(module, EvaluationModule):
            return
        found, measured = settings.get(_ERROR), module.metric.feature_error
        if continues and found is not None:
            found = check_number(f"feature_error in {path}", found)
            if measured > found:
                raise LipsimError(
                    f"{self.directory} holds an unfinished evaluation whose features were off by at most {found:.3g}, "
                    f"here it is {measured:.3g}; finish it where it was started, or remove the folder"
                )
            kind = module.metric.feature_error_kind
            module.metric.feature_error = found
            module.metric.feature_error_kind = kind
        elif trainer.is_global_zero:
            write_json(path, {**settings, _ERROR: measured})
        trainer.strategy.barrier()  # no row before that

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _anything(self) -> bool:
        return any(path.stat().st_size for path in self.directory.glob("part-*.jsonl"))

    def _check(self, expected: Mapping[str, Any]) -> None:
        if not self._anything():
            return
        path = self.directory / "fingerprint.json"
        if not path.is_file():
            raise LipsimError(f"{self.directory} has rows and no {path.name} that says of what; remove the folder")
        found = json.loads(path.read_text(encoding="utf-8"))
        found.pop(_ERROR, None)
        differ = [key for key in dict.fromkeys([*expected, *found]) if expected.get(key) != found.get(key)]
        if differ:
            raise LipsimError(
                f"{self.directory} holds an unfinished evaluation that differs in {', '.join(differ)}; finish that "
                "one, remove the folder, or choose another --trainer.default_root_dir"
            )


def _callbacks(trainer: L.Trainer) -> dict[str, RowCallback]:
    """The callbacks with rows to keep, by class and position among them."""
    found = [c for c in trainer.callbacks if isinstance(c, RowCallback)]  # type: ignore[attr-defined]
    return {f"{i}-{type(callback).__name__}": callback for i, callback in enumerate(found)}


def _read(path: Path, repair: bool = False) -> Iterator[dict[str, Any]]:
    """Complete lines of a file; ``repair`` cuts off what a killed process or machine left after them."""
    if not path.is_file():
        return
    good = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                break
            good += len(line)
            yield record
    if repair and good < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(good)


def _json(values: Tensor) -> dict[str, Any]:
    return {"dtype": str(values.dtype).removeprefix("torch."), "values": values.tolist()}


def _tensors(record: Mapping[str, Any]) -> Kept:
    keys = {name: torch.tensor(record[name], dtype=torch.int64) for name in ("index", "position")}
    rows = {
        key: {name: torch.tensor(c["values"], dtype=getattr(torch, c["dtype"])) for name, c in columns.items()}
        for key, columns in record["rows"].items()
    }
    return {key: {**keys, **columns} for key, columns in rows.items()}
