"""The page of a training: how far it is, its curves and scores, and what it was started with. One file, no script."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

from lipsim.results.charts import Chart, Points, chart
from lipsim.results.file import read_results
from lipsim.results.formats import run_html
from lipsim.results.runs import find_results
from lipsim.results.tables import Row, certified_rows, percent, smoothed_rows, summing
from lipsim.results.training_log import CERTIFIED, LogRow, certified, log_files, read_log, read_rows, readable
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json, write_json, write_text
from lipsim.utils.progress import duration, per_second

STATUS = "progress.json"
PAGE = "report.html"
RATE_COLUMN = "train/lr"
_NATURAL = "natural"
_MAJORITY = re.compile(r"val/(?P<set>.+)/majority_score")  # columns of natural scores
_UNSAFE = re.compile(r"[^\w.-]+")  # in the name of a file
_MOST = 1e15  # steps, images, seconds: no training has more
_MOST_VALIDATIONS = 20  # rows of the table; the curves have all
_FILES = {
    "config.yaml": "Configuration",
    "arguments.yaml": "Arguments",
    "environment.json": "Environment",
    "config-evaluate.yaml": "Configuration of the evaluation",
    "arguments-evaluate.yaml": "Arguments of the evaluation",
    "environment-evaluate.json": "Environment of the evaluation",
}

State = Literal["running", "finished", "interrupted", "failed"]


class Status(TypedDict):
    """progress.json: how far a training is, for machines as well."""

    state: State
    message: str  # why it failed or was interrupted; empty otherwise
    stage: str  # class that trains
    step: int
    steps: int | None  # of the whole training; None without an end
    epoch: int  # finished ones
    epochs: int | None
    images_per_second: float | None  # of all processes, lately
    seconds: float  # of training so far, of all its parts
    seconds_left: float | None
    written: str  # local time, ISO 8601


def write_status(folder: Path, status: Status) -> None:
    """Write progress.json into a run folder; the file is replaced as a whole."""
    write_json(folder / STATUS, status)


def read_status(folder: Path) -> Status | None:
    """The progress.json of a run folder; None where there is none as :func:`write_status` writes it."""
    try:
        found = parse_json((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(Status, found) if isinstance(found, dict) and _is_status(found) else None


def _is_status(found: dict[str, Any]) -> bool:
    """Whether what a file says can be the state of a training: the file may be somebody else's."""
    texts = [found.get(name) for name in ("message", "stage", "written")]
    counts = [found.get(name) for name in ("step", "steps", "epoch", "epochs")]
    numbers = [found.get(name) for name in ("images_per_second", "seconds", "seconds_left")]
    needed = [found.get(name) for name in ("step", "epoch", "seconds")]
    return (
        found.keys() >= Status.__annotations__.keys()
        and found["state"] in get_args(State)
        and all(isinstance(text, str) for text in texts)
        and all(count is None or (isinstance(count, int) and count >= 0) for count in counts)
        and all(number is None or isinstance(number, int | float) for number in (*counts, *numbers))
        and all(number is None or 0 <= number < _MOST for number in (*counts, *numbers))
        and None not in needed
    )


def is_training(folder: Path) -> bool:
    """Whether a folder has the log of a training, or says how far one is."""
    return read_status(folder) is not None or bool(read_log(folder))


def write_run_page(
    folder: Path, file: Path | None = None, *, name: str | None = None, refresh: int | None = None
) -> Path:
    """Write the page of the training in a run folder, from its files.

    Args:
        folder: of the run.
        file: to write; None: report.html in the folder.
        name: of the run; None: that of the folder.
        refresh: seconds after which a browser reads the page of a running training again; None: never.

    Returns:
        The file.

    Raises:
        ValueError: the folder has no training.
    """
    status, rows = read_status(folder), read_log(folder)
    if status is None and not rows:
        raise LipsimError(f"{folder} has no training: neither {STATUS} nor rows of one in metrics.csv")
    charts = {heading: plots for heading, plots in _charts(rows).items() if plots}
    tests, problems = _tests(folder)
    page = run_html(
        name=name or folder.absolute().name,
        state=status["state"] if status else "unknown",
        about=_about(status),
        share=_share(status),
        refresh=refresh if status and status["state"] == "running" else None,
        warnings=[*_warnings(folder, status, rows), *problems],
        facts=_facts(folder, status, rows),
        charts=charts,
        no_curves="nothing is logged yet." if log_files(folder) else "there is no metrics.csv.",
        scores=_validations(rows),
        tests=tests,
        texts={
            title: (folder / text).read_text(encoding="utf-8", errors="replace")
            for text, title in _FILES.items()
            if (folder / text).is_file()
        },
    )
    output = file or folder / PAGE
    write_text(output, page)
    return output


def write_training_pages(runs: Sequence[str], output: Path) -> tuple[list[Path], list[str]]:
    """Write ``training-NAME.html`` into a folder for each run that has trained.

    Args:
        runs: as :func:`lipsim.results.runs.load_runs` takes them.
        output: folder, made where a page comes.

    Returns:
        The pages, and those of the runs that have a results.json, or no training either.
    """
    pages: list[Path] = []
    others: list[str] = []
    for run in runs:
        found = find_results(run)
        for name, file in found:
            trained = is_training(file.parent)
            if trained:
                stem, number = f"training-{_UNSAFE.sub('-', name)}", 1
                page = output / f"{stem}.html"
                while page in pages:  # runs of one name, which differ in their seed
                    number += 1
                    page = output / f"{stem}-{number}.html"
                pages.append(write_run_page(file.parent, page, name=name))
            if file.is_file() or not trained:
                named = name != file.absolute().parent.name
                others.append(run if len(found) == 1 else f"{name}={file}" if named else str(file))
    return pages, others


def _about(status: Status | None) -> str:
    if status is None:
        return f"there is no {STATUS} of a training"
    if status["state"] == "running":
        left = status["seconds_left"]
        return "" if left is None else f"{duration(left)} left"
    return status["message"]


def _share(status: Status | None) -> float | None:
    if status is None:
        return None
    if status["steps"]:
        return min(1.0, status["step"] / status["steps"])
    left = status["seconds_left"]
    return None if left is None else status["seconds"] / max(status["seconds"] + left, 1e-9)


def _facts(folder: Path, status: Status | None, rows: Sequence[LogRow]) -> list[Row]:
    facts: dict[str, str] = {"folder": str(folder.absolute())}
    if status is not None:
        facts["stage"] = status["stage"]
        facts["steps"] = f"{status['step']:,}" + (f" of {status['steps']:,}" if status["steps"] else "")
        facts["epochs"] = f"{status['epoch']} finished" + (f" of {status['epochs']}" if status["epochs"] else "")
        facts["time in training"] = duration(status["seconds"])
        if status["images_per_second"] is not None:
            facts["rate"] = per_second(status["images_per_second"], "images")
    elif rows:
        facts["steps"] = f"{int(rows[-1]['step']) + 1:,} in the log"
    if len(parts := log_files(folder)) > 1:
        facts["log"] = f"{len(parts)} parts, joined"
    if status is not None:
        facts["written"] = status["written"]
        if status["state"] == "running":
            facts["written"] += "; a process that was killed cannot say so: if this is long ago, it has ended"
    return [{"fact": name, "value": value} for name, value in facts.items()]


def _charts(rows: Sequence[LogRow]) -> dict[str, list[Chart]]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    trained = [c for c in columns if c.startswith("train/") and not c.endswith("_epoch") and not _is_rate(c)]
    rates = [c for c in columns if _is_rate(c)]
    scored: dict[str, dict[str, Points]] = {}
    for (name, label), column in _scores(rows).items():
        heading = label if label == _NATURAL else f"certified at {label}"
        scored.setdefault(name, {})[heading] = _points(rows, column)
    plots = {
        "Loss": [chart(f"{c} over the steps", {c.removeprefix("train/"): _points(rows, c)}) for c in trained],
        "Learning rate": [chart("learning rate over the steps", {_name(c): _points(rows, c) for c in rates})],
        "Scores": [chart(f"{n}: score in % over the steps", curves, percent=True) for n, curves in scored.items()],
    }
    return {heading: [plot for plot in found if plot is not None] for heading, found in plots.items()}


def _is_rate(column: str) -> bool:
    return column == RATE_COLUMN or column.startswith(("lr-", f"{RATE_COLUMN}/"))  # the latter of Lightning's monitor


def _name(column: str) -> str:
    return "learning rate" if column == RATE_COLUMN else column.removeprefix("train/")


def _scores(rows: Sequence[LogRow]) -> dict[tuple[str, str], str]:
    """(set, "natural" or label of a budget) → column of the score, natural before certified ones, by their budgets."""
    columns = dict.fromkeys(column for row in rows for column in row)
    natural = [(found["set"], column) for column in columns if (found := _MAJORITY.fullmatch(column))]
    scores = {(name, _NATURAL): column for name, column in natural}
    for column in certified(dict.fromkeys(columns, 0.0)):
        found = CERTIFIED.fullmatch(column)
        assert found is not None
        scores[found["set"], found["eps"]] = column
    sets = list(dict.fromkeys(name for name, _ in scores))
    return {key: scores[key] for key in sorted(scores, key=lambda key: sets.index(key[0]))}


def _points(rows: Sequence[LogRow], column: str) -> Points:
    return [(row["step"] + 1, row[column]) for row in rows if column in row]


def _validations(rows: Sequence[LogRow]) -> list[Row]:
    """The last validations, the latest first: natural and certified scores in %."""
    columns = {f"{name}, {label}": column for (name, label), column in _scores(rows).items()}
    found = [row for row in rows if not row.keys().isdisjoint(columns.values())][: -_MOST_VALIDATIONS - 1 : -1]
    return [
        {"step": f"{row['step'] + 1:,.0f}", **{title: percent(row.get(column)) for title, column in columns.items()}}
        for row in found
    ]


def _tests(folder: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """Title → rows of what tests have certified, and what is wrong with their results."""
    file = folder / "results.json"
    if not file.is_file():
        return {}, []
    try:
        results = read_results(file)
    except LipsimError as error:
        return {}, [str(error)]
    tables: dict[str, list[Row]] = {}
    title = "majority score in %, natural and certified at ℓ2 budgets ε"
    if certified := results.get("certified"):
        tables[title] = certified_rows(certified)
    if summed := results.get("summed"):
        tables[f"{title}, {summing(summed)}"] = certified_rows(summed)
    if smoothed := results.get("smoothed"):
        tables[f"{title}, smoothed"] = smoothed_rows(smoothed)
    return {title: rows for title, rows in tables.items() if rows}, []


def _warnings(folder: Path, status: Status | None, rows: Sequence[LogRow]) -> list[str]:
    found = []
    if status and status["state"] in ("failed", "interrupted") and status["step"] < (status["steps"] or 0):
        found.append(f"{status['state']} after {status['step']:,} of {status['steps']:,} steps")
    bad = sorted(file.name for file in folder.glob("not_finite*.safetensors"))
    found += [f"a loss was not finite; its batch is in {name}" for name in bad]
    # One file a process; a sample is in it once an epoch.
    if count := sum(map(_num_skipped, folder.glob("skipped*.csv"))):
        found.append(f"{count:,} samples could not be read and were left out, each epoch counted; see skipped.csv")
    infinite = sum(not math.isfinite(value) for row in rows for value in row.values())
    if infinite:
        found.append(f"{infinite:,} logged values are not finite; the curves leave them out")
    return found


def _num_skipped(file: Path) -> int:
    with open(file, encoding="utf-8", errors="replace", newline="") as lines:
        # Without its header, of which a process that was killed may have written nothing.
        return max(0, sum(1 for _ in read_rows(csv.reader(readable(lines)))) - 1)
