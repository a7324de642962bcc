"""Read every file of a data set once, on several processes, and tell all that is wrong with it.

What was read whole is kept in a journal by size and time of change, so that a check that was stopped goes on where it
was, and a second one reads what has changed. A file is whole where all of it decodes: other pixels than the published
ones do not show.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lipsim.certificates.numbers import check_count
from lipsim.data.check.expected import Count, Problem, expect, guess_kind
from lipsim.data.sets.bapps import read_judge
from lipsim.data.sets.folder import JOURNAL
from lipsim.data.transforms import read_image
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_states, sha256, write_text
from lipsim.utils.paths import user_path
from lipsim.utils.progress import Progress

_HEADER = {"format": "lipsim-check", "version": 1}
_BATCH = 32  # files a task of a reading process

State = tuple[int, int]  # size in bytes, time of change in ns


@dataclass(frozen=True)
class DataCheck:
    """What :func:`check_data` found.

    Attributes:
        kind: of the data, one of :data:`lipsim.data.check.KINDS`.
        root: the folder or the table.
        files: how many there should be.
        read: how many of them were read now; the others are as a former check found them whole.
        counts: of triplets and images, beside the published ones.
        problems: all that is wrong; empty where nothing is.
        passed_over: what is there and is no part of the data, in words.
        journal: where the next check goes on; None: it could be written nowhere.
        seconds: that it took.
    """

    kind: str
    root: Path
    files: int
    read: int
    counts: tuple[Count, ...]
    problems: tuple[Problem, ...]
    passed_over: str
    journal: Path | None
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """In the plain types of JSON."""
        journal = None if self.journal is None else str(self.journal)
        return asdict(self) | {"root": str(self.root), "journal": journal, "sound": self.sound}


def check_data(
    root: str | Path,
    kind: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    journal: str | Path | None = None,
    num_workers: int = 4,
    progress: Progress | None = None,
) -> DataCheck:
    """Check a data set on disk: its files, its table, its counts.

    Args:
        root: its folder; of a table, the CSV file.
        kind: "nights", "bapps", "material", "folder" or "table"; None: by its layout.
        columns: of a table, what columns are called in the file, see :class:`lipsim.data.TableTriplets`.
        journal: folder for the journal; None: beside the data, and none where nothing can be written there.
        num_workers: processes that read; 0: this one.
        progress: is told how many files are read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an unknown kind, a layout of several kinds, or a table that cannot be understood at all.
        OSError: the folder for the journal cannot be written to.
    """
    start = time.perf_counter()
    check_count("num_workers", num_workers, least=0)
    root = user_path(root)
    kind = guess_kind(root) if kind is None else kind
    expected = expect(root, kind, columns)
    states = file_states(expected.folder, expected.files)
    problems = [_problem(expected.files[i], "missing", "no such file") for i in np.flatnonzero(states[:, 0] < 0)]
    kept = Journal(_journal_file(expected.folder, root, journal), required=journal is not None)
    todo = [
        int(i)
        for i in np.flatnonzero(states[:, 0] >= 0)
        if kept.whole.get(os.fsdecode(bytes(expected.files[i]))) != tuple(states[i].tolist())
    ]
    advance = None if progress is None else progress.counter(len(todo), "files")
    with kept:
        for batch in _read(expected.folder, expected.files, todo, num_workers):
            for i, reason in batch:
                name = os.fsdecode(bytes(expected.files[i]))
                if reason is None:
                    kept.add(name, tuple(states[i].tolist()))
                else:
                    problems.append(Problem(name, _kind_of(reason.replace(name, ""), states[i, 0]), reason))
            kept.flush()
            if advance is not None:
                advance(len(batch))
        kept.keep_only(os.fsdecode(bytes(name)) for name in expected.files)
    order = {"table": 0, "count": 1}
    problems = [
        *expected.problems,
        *(
            Problem(count.name, "count", f"{count.found:,} there, {count.published:,} published")
            for count in expected.counts
            if not count.agrees
        ),
        *problems,
    ]
    problems.sort(key=lambda problem: order.get(problem.kind, 2))
    return DataCheck(
        kind=kind,
        root=root,
        files=len(expected.files),
        read=len(todo),
        counts=expected.counts,
        problems=tuple(problems),
        passed_over=expected.passed_over,
        journal=kept.file,
        seconds=time.perf_counter() - start,
    )


class Journal:
    """Files that were read whole: a line of JSON each, appended, so that a killed process loses its last lines alone.

    Args:
        file: where it is, or is to be.
        required: whether to refuse a place where it cannot be written; else there is none.

    Attributes:
        file: where it is; None where nothing can be written.
        whole: path → size and time of change.

    Raises:
        ValueError: the file is something else.
        OSError: it is required and cannot be written.
    """

    def __init__(self, file: Path, required: bool) -> None:
        self.file: Path | None = file
        self.whole: dict[str, State] = dict(_read_journal(file)) if file.is_file() else {}
        self._stream: TextIO | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._write_all()
        except OSError as error:
            if required:
                raise OSError(f"cannot write the journal {file} ({error.strerror or error})") from error
            self.file = None

    def __enter__(self) -> Journal:
        if self.file is not None:
            self._stream = open(self.file, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, name: str, state: Sequence[int]) -> None:
        """Note a file that is whole."""
        self.whole[name] = (state[0], state[1])
        if self._stream is not None:
            self._stream.write(json.dumps([name, *state]) + "\n")

    def flush(self) -> None:
        """Hand what was added to the system, where it outlives this process."""
        if self._stream is not None:
            self._stream.flush()

    def keep_only(self, names: Iterator[str]) -> None:
        """Forget the files that are no part of the data any more."""
        kept = {name: self.whole[name] for name in names if name in self.whole}
        if len(kept) < len(self.whole) and self.file is not None:
            self.whole = kept
            self._write_all()

    def _write_all(self) -> None:
        assert self.file is not None
        lines = [json.dumps(_HEADER), *(json.dumps([name, *state]) for name, state in self.whole.items())]
        write_text(self.file, "\n".join(lines) + "\n")


def _read_journal(file: Path) -> Iterator[tuple[str, State]]:
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    try:
        header = json.loads(lines[0])
    except ValueError:
        header = None
    if header != _HEADER:
        raise LipsimError(f"{file} is no journal of this version; move it, or name a folder as --journal")
    for line in lines[1:]:
        try:
            name, size, changed = json.loads(line)
        except (ValueError, TypeError):
            continue  # of a process that was killed while it wrote; the file is read again
        yield name, (size, changed)


def _journal_file(folder: Path, root: Path, chosen: str | Path | None) -> Path:
    if chosen is None:
        return folder / JOURNAL
    return user_path(chosen) / f"check-{sha256(str(root.resolve()))[:12]}.jsonl"


class _Files(Dataset[tuple[int, str | None]]):
    """Files by position: what is wrong with each; None where it is whole."""

    def __init__(self, folder: Path, names: np.ndarray) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        file = self.folder / os.fsdecode(bytes(self.names[index]))
        try:
            if file.suffix == ".npy":
                read_judge(file)
            else:
                read_image(file, file.read_bytes())
        except (LipsimError, OSError) as error:
            return index, str(error).replace(f"{self.folder}{os.sep}", "")
        return index, None


def _read(folder: Path, names: np.ndarray, todo: list[int], num_workers: int) -> Iterator[list[tuple[int, str | None]]]:
    batches = [todo[i : i + _BATCH] for i in range(0, len(todo), _BATCH)]
    return iter(
        DataLoader(
            _Files(folder, names),
            batch_sampler=batches,
            num_workers=min(num_workers, len(batches)),
            collate_fn=list,
            generator=torch.Generator(),  # a loader draws from torch's, which is the caller's
        )
    )


def _kind_of(reason: str, size: int) -> str:
    """Of a problem, by what a decoder says without the name of the file, which may be any word."""
    if size == 0:
        return "empty"
    return "truncated" if "truncated" in reason else "unreadable"


def _problem(name: bytes, kind: str, reason: str) -> Problem:
    return Problem(os.fsdecode(bytes(name)), kind, reason)
