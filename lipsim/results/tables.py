"""Rows of scores, and how a terminal shows them; :mod:`lipsim.results.formats` has Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lipsim.results.schema import Certification, Smoothing, Summation

Row = Mapping[str, str]
NO_GRADIENT = (
    "no gradient: triplets that attacks with gradients could not try, as every gradient was zero or not finite"
)


def certified_rows(certified: Certification | Summation) -> list[Row]:
    """One row an evaluation set from the section "certified" or "summed" of results.json: scores in %.

    "triplets" counts those with a majority; "vote share" is there where votes are fractions.
    """
    fractional = any(scores["vote"] != scores["majority"] for scores in certified["sets"].values())
    return [
        {
            "set": name,
            # Without a majority there is nothing to agree with.
            "triplets": str(scores["num_triplets"] - scores["num_tied_votes"]),
            "natural": percent(scores["majority"]),
            **({"vote share": percent(scores["vote"])} if fractional else {}),
            **percents(scores["certified"]),
            "median R": number(scores["radius"]["median"]),
        }
        for name, scores in certified["sets"].items()
    ]


def summing(section: Summation) -> str:
    """What tables say of a sum of two metrics: the other one, what it adds at most, and at which distance."""
    return f"and {section['second']} where near, λ = {section['weight']:g}, τ = {section['scale']:g}"


def smoothed_rows(smoothed: Smoothing) -> list[Row]:
    """One row a set and metric from the section "smoothed" of results.json: natural and certified scores in %.

    "passes" are forward passes for each answer that is certified, of one image each. Where all three images have noise
    and may move, there is a second row of what is certified where one of them does.
    """
    rows: list[Row] = []
    for name, found in smoothed["sets"].items():
        for key, scores in found["metrics"].items():
            row = {
                "set": name if key == "metric" else f"{name}: {key}",
                "triplets": str(found["num_triplets"] - found["num_tied_votes"]),
                "natural": percent(scores["natural"]),
                "abstains": percent(scores["abstained"]),
                **percents(scores["certified"]),
                "median R": number(scores["radius"]["median"]),
                "passes": number(scores["passes_per_certified"], ".0f"),
            }
            rows.append(row)
            if single := scores.get("certified_single"):
                rows.append({**row, "set": f"{row['set']}, one image moves", **percents(single), "median R": ""})
    return rows


def print_table(console: Console, rows: Sequence[Row], title: str) -> None:
    """Print a table in the width of a terminal without cutting a heading or a cell.

    Where it is too wide, the first column wraps; where that is not enough, the columns that do not fit follow in
    further tables, beside the first column again.
    """
    first, *others = rows[0]
    widths = {name: max(cell_len(text) for text in (name, *(row[name] for row in rows))) for name in rows[0]}
    word = max((cell_len(word) for row in rows for word in (*first.split(), *row[first].split())), default=1)
    # Between two columns are two blanks, a padding and what stands where other tables have a line.
    room = console.width
    narrow = min(widths[first], max(word, room // 5), room // 2)
    groups: list[list[str]] = [[]]
    for name in others:
        if groups[-1] and narrow + sum(widths[n] + 2 for n in (*groups[-1], name)) > room:
            groups.append([])
        groups[-1].append(name)
    for number, names in enumerate(groups):
        table = Table(
            title=escape(title) if number == 0 else "(continued)",
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        wide = max(narrow, min(widths[first], room - sum(widths[n] + 2 for n in names)))
        table.add_column(first, width=wide, overflow="fold")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*(escape(row[name]) for name in (first, *names)))
        console.print(table)
        console.print()


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file of numbers."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    values = np.array([[_number(cell) for cell in row] for row in rows[1:]])
    return {name: values[:, i] for i, name in enumerate(rows[0])}


def certified_curve(rows: Mapping[str, np.ndarray], column: str, eps: np.ndarray) -> np.ndarray:
    """Certified majority score at each ε from the columns of radii.csv."""
    untied = rows["right_vote"] != 0.5
    agree = ((rows["margin"] > 0) & (rows["right_vote"] < 0.5)) | ((rows["margin"] < 0) & (rows["right_vote"] > 0.5))
    scores: np.ndarray = (agree[untied, None] & (rows[column][untied, None] > eps)).mean(0)
    return scores


def percents(scores: Mapping[str, float | None]) -> dict[str, str]:
    """Scores in %, by the same keys."""
    return {eps: percent(score) for eps, score in scores.items()}


def percent(score: float | None, digits: int = 1) -> str:
    """A score in %; empty where there is none, NaN say, the share of no triplets."""
    return "" if score is None or math.isnan(score) else f"{100 * score:.{digits}f}"


def number(value: float | None, form: str = ".3g") -> str:
    """A number in a format; empty where there is none."""
    return "" if value is None or math.isnan(value) else format(value, form)


def triplet_counts(counts: Iterable[tuple[int, int]]) -> str:
    """Of how many triplets a score is, from how many there are and how many of these have a tied vote, of each set."""
    found = list(counts)
    untied, tied = sorted({count - ties for count, ties in found}), max(ties for _, ties in found)
    text = f"{untied[0]} triplets" if len(untied) == 1 else f"{untied[0]} to {untied[-1]} triplets"
    return text + (f" (and {tied} with a tied vote, left out)" if tied else "")


def _number(cell: str) -> float:
    return float({"True": "1", "False": "0"}.get(cell, cell))
