"""The log of a training, ``metrics.csv`` and the ``metrics-N.csv`` of what it continues, as one table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

_MOST_STEPS = 2.0**53  # beyond, floats skip some
T = TypeVar("T")
LogRow = dict[str, float]  # column → value, of those that the row has; "step" is always there
# Columns of certified scores, labelled as eps_label writes a budget.
CERTIFIED = re.compile(r"val/(?P<set>.+)/certified_(?P<eps>\d+(?:\.\d+)?(?:e[+-]\d+)?(?:/255)?)")


def read_log(folder: Path) -> list[LogRow]:
    """Rows of the training in a run folder, by step, of all its parts joined; empty where there is no log.

    Training that continues from a checkpoint repeats the steps after it: rows of the part before give way to those of
    the part after from the first step that it trained, and before that where the same was logged. Rows of tests are
    left out, and those of an evaluation that was started by itself, which are of no step of the training.
    """
    rows: list[LogRow] = []
    for file in log_files(folder):
        part = [row for row in _read(file) if any(_is_of_training(column) for column in row)]
        trained = [row["step"] for row in part if any(column.startswith("train/") for column in row)]
        if trained:
            first = min(trained)
            again = {(row["step"], column) for row in part for column in row if _is_of_training(column)}
            rows = [row for row in rows if row["step"] < first and again.isdisjoint((row["step"], c) for c in row)]
        elif rows:
            part = [row for row in part if row["step"] > rows[-1]["step"]]
        rows += part
    return rows


def log_files(folder: Path) -> list[Path]:
    """Files of the log in a run folder, the oldest part first."""
    parts = ((int(file.stem.partition("-")[2]), file) for file in folder.glob("metrics-*.csv") if _is_part(file))
    last = folder / "metrics.csv"
    return [*(file for _, file in sorted(parts)), *([last] if last.is_file() else [])]


def last_certified(rows: Sequence[LogRow]) -> dict[str, float]:
    """Certified scores of the last validation that has some, as :func:`certified` gives them; empty where none has."""
    return next((found for row in reversed(rows) if (found := certified(row))), {})


def certified(row: LogRow) -> dict[str, float]:
    """The certified scores of a row, by column: in the order of the row's sets, and of their budgets."""
    columns = [(column, found) for column in row if (found := CERTIFIED.fullmatch(column))]
    sets = list(dict.fromkeys(found["set"] for _, found in columns))
    ordered = sorted(columns, key=lambda item: (sets.index(item[1]["set"]), budget(item[1]["eps"])))
    return {column: row[column] for column, _ in ordered}


def budget(label: str) -> float:
    """The budget that a column is labelled with: a number, or so many 255ths (:func:`lipsim.results.eps_label`)."""
    numerator, _, denominator = label.partition("/")
    return float(numerator) / float(denominator or 1)


def _is_part(file: Path) -> bool:
    return file.stem.partition("-")[2].isdecimal()


def _is_of_training(column: str) -> bool:
    return column.startswith(("train/", "val/"))


def _read(file: Path) -> list[LogRow]:
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # the last line of a process that was killed may end anywhere
    rows = [
        {name: value for name, cell in cells.items() if (value := _number(cell)) is not None}
        for cells in read_rows(csv.DictReader(readable(io.StringIO(whole, newline=""))))
    ]
    return [row for row in rows if 0 <= row.get("step", -1) < _MOST_STEPS]


def readable(lines: Iterable[str]) -> Iterator[str]:
    """Lines of a table without those that are longer than Python's reader takes, which would refuse all of it."""
    return (line for line in lines if len(line) <= csv.field_size_limit())


def read_rows(reader: Iterable[T]) -> Iterator[T]:
    """Rows of a table up to where its reader refuses one, as where a quote is opened and never closed."""
    with suppress(csv.Error):
        yield from reader


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) and cell else None
    except ValueError:
        return None
