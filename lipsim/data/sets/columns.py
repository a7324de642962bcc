"""Tables of somebody's own: CSV files whose columns have names, and all that is wrong with one told at once."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lipsim.data.images import ImageSource
from lipsim.data.transforms import missing_files
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

MOST_TOLD = 20
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass
class Row:
    """One line of a table.

    Attributes:
        line: its number in the file, from 1; of a cell with line breaks, that of the last.
        cells: what its known columns hold, by our names; blanks around are taken off.
        whole: whether it has a cell for each column; where it has not, the rest that is wrong follows from that.
        problems: what is wrong with it, of the cells that were read so far.
        paths: the paths that were read so far and are within the folder.
    """

    line: int
    cells: dict[str, str]
    whole: bool = True
    problems: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def refuse(self, problem: str) -> None:
        """Note a problem."""
        if self.whole:
            self.problems.append(problem)

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        """The number in a column; NaN, and a problem, where there is none in the range."""
        text = self.cells[name]
        try:
            value = float(text) if "_" not in text else math.nan  # Python reads 0_1 as 1
        except ValueError:
            value = math.nan
        if math.isfinite(value) and least <= value <= most:
            return value
        wanted = "a number"
        if math.isfinite(most):
            wanted = f"a number in [{least:g}, {most:g}]"
        elif math.isfinite(least):
            wanted = f"a number ≥ {least:g}"
        self.refuse(f"{name} is {text!r}, expected {wanted}")
        return math.nan

    def path(self, name: str) -> str:
        """The path in a column, relative, with / between its parts; a problem where it is none or leads elsewhere.

        A table comes from somebody else as often as not: it names files beside it and below, and no others.
        """
        text = self.cells[name]
        fault = path_fault(text)
        if fault is not None:
            self.refuse(f"{name} is {fault}")
            return text
        path = relative_path(text)
        self.paths.append(path)
        return path


def relative_path(text: str) -> str:
    """A path of a table with / between its parts: backslashes, as Windows writes them, separate folders everywhere."""
    return str(PurePosixPath(text.replace("\\", "/")))


def path_fault(text: str) -> str | None:
    """What a path of a table is, where it is none of a file below the table's folder; None where it is one.

    Links in that folder are followed wherever they lead: who put them there has the folder, and a table makes none.
    """
    path = PurePosixPath(relative_path(text))
    if not path.parts:  # nothing, or the folder itself
        return f"{text or 'empty'}, expected the path of an image"
    if path.is_absolute() or PureWindowsPath(text).drive or text.startswith("~"):
        return f"{text!r}, expected a path relative to the table's folder"
    if ".." in path.parts:
        return f"{text!r}, which leads out of the table's folder"
    if "\0" in text:
        return f"{text!r}, which no file can be called"
    return None


def choose_columns(given: Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """What the columns are called in a file: each by our name for it, unless told otherwise.

    A column that is to stand for another of ours is not there under its own name: ``{"left": "right"}`` alone leaves
    out "right", of which nobody has said where it is.

    Args:
        given: our name → name in the file.
        known: our names.

    Raises:
        ValueError: a name that is not one of ours, or one column of the file for two of them.
    """
    given = dict(given or {})
    unknown = [name for name in given if name not in known]
    if unknown:
        raise LipsimError(f"expected columns among {', '.join(known)}, got {', '.join(unknown)}")
    twice = [name for name, count in Counter(given.values()).items() if count > 1]
    if twice:
        raise LipsimError(f"expected another column of the file for each of ours, got {', '.join(twice)} twice")
    taken = set(given.values())
    return {name: given.get(name, name) for name in known if name in given or name not in taken}


def read_rows(file: str | Path, columns: Mapping[str, str], chosen: Mapping[str, str] | None = None) -> list[Row]:
    """The lines of a CSV file in UTF-8, with the cells of the columns that it has.

    A byte order mark, line ends of any system, blanks around cells (but none behind a closing quote) and columns of
    other names are all fine.

    Args:
        file: the table: a line of names, and lines of as many cells, separated by commas.
        columns: our name → name in the file; those that the file lacks are left out of every row.
        chosen: the part of them that somebody named, which the file has to have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table; the message names the column or the line.
    """
    path = user_path(file)
    if path.is_dir():
        raise LipsimError(f"expected the CSV file of a table, got the folder {file}")
    if not path.is_file():
        raise FileNotFoundError(f"no table {file}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = _read(stream, path, columns, chosen or {})
    except UnicodeDecodeError as error:
        raise LipsimError(f"{file} is not text in UTF-8 ({error.reason}); save it as CSV in UTF-8") from error
    if not rows:
        raise LipsimError(f"{file} has no rows below its line of column names")
    return rows


def _read(stream: object, path: Path, columns: Mapping[str, str], chosen: Mapping[str, str]) -> list[Row]:
    reader = csv.reader(stream, skipinitialspace=True, strict=True)  # type: ignore[arg-type]
    try:
        return _rows_of(reader, path, columns, chosen)
    except csv.Error as error:
        raise LipsimError(f"{path} is no CSV file (line {reader.line_num}: {error})") from error


def _rows_of(reader: Any, path: Path, columns: Mapping[str, str], chosen: Mapping[str, str]) -> list[Row]:
    names = [name.strip() for name in next((line for line in reader if any(line)), [])]
    if not names:
        raise LipsimError(f"{path} is empty; expected a line of column names and a line for each judgement")
    # Spreadsheets leave columns without a name beside a table.
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise LipsimError(f"{path} has the column {', '.join(twice)} more than once; keep one of them")
    separator = next((s for s in _OTHER_SEPARATORS if len(names) == 1 and s in names[0]), None)
    if separator:
        raise LipsimError(f"{path} is separated by {_OTHER_SEPARATORS[separator]}, expected commas; save it as CSV")
    absent = [name for name in chosen.values() if name not in names]
    if absent:
        raise LipsimError(f"{path} has no column {', '.join(absent)}; it has {', '.join(names)}")
    places = {ours: names.index(theirs) for ours, theirs in columns.items() if theirs in names}
    rows = []
    for cells in reader:
        if not any(cells):  # a blank line, or the commas that spreadsheets leave below a table
            continue
        row = Row(reader.line_num, {n: cells[i].strip() if i < len(cells) else "" for n, i in places.items()})
        if len(cells) != len(names):
            row.refuse(f"{len(cells)} cells, expected {len(names)}")
            row.whole = False
        rows.append(row)
    return rows


def require_columns(file: str | Path, rows: Sequence[Row], columns: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse a table without some columns.

    Raises:
        ValueError: it lacks one.
    """
    missing = [name for name in names if name not in rows[0].cells]
    if missing:
        called = [_called(name, columns) for name in missing]
        raise LipsimError(
            f"{file} has no column {', '.join(called)}; name the one that stands for it, as {missing[0]}=COLUMN"
        )


def _called(name: str, columns: Mapping[str, str]) -> str:
    """A column that is missing, by our name, and why it is where that is not plain."""
    if name not in columns:
        return f"{name} (the one of that name stands for another)"
    return name if columns[name] == name else f"{name} (as {columns[name]})"


def refuse_problems(file: str | Path, rows: Sequence[Row], images: ImageSource | None = None) -> None:
    """Refuse a table with anything wrong in it, all of it in one message, by line.

    Args:
        file: the table.
        rows: its rows, whose cells have been read.
        images: where its images are; None: in its folder.

    Raises:
        FileNotFoundError: nothing is wrong but that images are missing.
        ValueError: something is.
    """
    paths = list(dict.fromkeys(path for row in rows for path in row.paths))
    missing = set(missing_files(user_path(file).parent, paths) if images is None else images.missing(paths))
    told = []
    for row in rows:
        told += [(row.line, problem) for problem in row.problems]
        told += [(row.line, f"no image {path}") for path in row.paths if path in missing]
    if not told:
        return
    message = f"{file} has {len(told)} problem{'s' * (len(told) > 1)}: {_listed(told)}"
    if any(row.problems for row in rows):
        raise LipsimError(message)
    remedy = f"paths are relative to {user_path(file).parent.absolute()}" if images is None else images.remedy
    raise FileNotFoundError(f"{message}; {remedy}")


def _listed(told: Sequence[tuple[int, str]]) -> str:
    listed = "; ".join(f"line {line}: {problem}" for line, problem in told[:MOST_TOLD])
    more = len(told) - MOST_TOLD
    return f"{listed}; and {more} more" if more > 0 else listed
