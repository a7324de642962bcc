"""Tables and plots from results.json and the CSV files of a run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lipsim.plots import plot_scores
from lipsim.results import read_results

Row = Mapping[str, str]


def certified_rows(certified: Mapping[str, Any]) -> list[Row]:
    """One row an evaluation set from the section "certified" of results.json: natural and certified scores in %."""
    return [
        {
            "set": name,
            "triplets": str(scores["num_triplets"]),
            "natural": _percent(scores["majority"]),
            **_percents(scores["certified"]),
            "median R": f"{scores['radius']['median']:.3g}",
        }
        for name, scores in certified["sets"].items()
    ]


def quickstart(root: Path, console: Console) -> dict[str, Any]:
    """Print the quickstart's tables, write ``report.md`` and the plots; returns the contents of results.json."""
    results = read_results(root / "results.json")
    linear = read_results(root / "linear" / "results.json")
    (name,) = results["certified"]["sets"]
    tables = quickstart_tables(results, linear, name)
    for title, rows in tables.items():
        console.print(rich_table(rows, title))
    lines = [*null_space_lines(results, name), _violations(results, name)]
    for line in lines:
        console.print(line, highlight=False)
    _plot(root, results, name)
    text = [part for title, rows in tables.items() for part in (f"{title}:", markdown_table(rows))]
    (root / "report.md").write_text("\n\n".join(["# Quickstart", *text, *lines]) + "\n")
    console.print(f"{sum(results['seconds'].values()) / 60:.1f} minutes. Report, plots and checkpoints are in {root}/;")
    console.print(f"lipsim.load('{root}/quickstart.safetensors') gives the metric.", highlight=False)
    return results


def quickstart_tables(results: Mapping[str, Any], linear: Mapping[str, Any], name: str) -> dict[str, list[Row]]:
    """Title → rows: what is certified, and what is left under attack, for every metric."""
    certified, attacked = results["certified"]["sets"][name], results["attacked"]["sets"][name]
    own_linear = linear["certified"]["sets"][name]
    rows = {
        "student, exact radius": (certified["majority"], certified["certified"]),
        "student, published radius": (certified["majority"], certified["published"]),
        "linear map, exact radius": (own_linear["majority"], own_linear["certified"]),
    }
    names = {"metric": "student", "linear": "linear map", "teacher": "teacher (ViT, no certificate)"}
    under_attack = {title: (attacked[key]["natural"], attacked[key]["attacked"]) for key, title in names.items()}
    plain: dict[str, tuple[float, dict[str, float]]] = {
        title: (scores["majority"], {}) for title, scores in results["baselines"]["sets"][name].items()
    }
    count = certified["num_triplets"]
    return {
        f"Certified 2AFC score in % on {count} test triplets, at ℓ2 budgets ε": _rows(rows),
        f"2AFC score in % under PGD on the reference, {count} test triplets": _rows({**under_attack, **plain}),
    }


def null_space_lines(results: Mapping[str, Any], name: str) -> list[str]:
    """What the null-space search found, one sentence a metric."""
    lines = []
    for metric, found in results["null_space"]["sets"][name].items():
        title = {"metric": "student", "linear": "linear map"}.get(metric, metric)
        if found["kernel"]:
            lines.append(
                f"Null space of the {title}'s first operator ({found['layer']}): references moved by "
                f"‖δ‖ = {found['mean_length']:.2f} on average change the embedding by {found['median_change']:.0e} of "
                f"its norm (median; at most {found['largest_change']:.0e}); "
                f"{100 * found['exact']:.0f} % are exact collisions."
            )
        else:
            lines.append(f"Null space of the {title}'s first operator: none, {found['reason']}.")
    return lines


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """A table for the terminal."""
    table = Table(title=title)
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row.values())
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table in Markdown."""
    header = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*header, *(list(row.values()) for row in rows)])


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file of numbers."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    values = np.array([[_number(cell) for cell in row] for row in rows[1:]])
    return {name: values[:, i] for i, name in enumerate(rows[0])}


def certified_curve(rows: Mapping[str, np.ndarray], column: str, eps: np.ndarray) -> np.ndarray:
    """Certified majority score at each ε from the columns of radii.csv."""
    untied = rows["right_vote"] != 0.5
    agree = ((rows["margin"] > 0) & (rows["right_vote"] < 0.5)) | ((rows["margin"] < 0) & (rows["right_vote"] > 0.5))
    return (agree[untied, None] & (rows[column][untied, None] > eps)).mean(0)


def _plot(root: Path, results: Mapping[str, Any], name: str) -> None:
    attacked, budgets = results["attacked"]["sets"][name], [0.0, *results["attacked"]["eps"]]
    eps = np.linspace(0, 1.5 * budgets[-1], 200)
    student, linear = read_columns(root / "radii.csv"), read_columns(root / "linear" / "radii.csv")
    certified = {
        "student": (eps, certified_curve(student, "radius", eps)),
        "student, published radius": (eps, certified_curve(student, "published_radius", eps)),
        "linear map": (eps, certified_curve(linear, "radius", eps)),
    }
    names = {"metric": "student", "linear": "linear map", "teacher": "teacher"}
    under_attack = {
        names[key]: (budgets, [attacked[key]["natural"], *attacked[key]["attacked"].values()]) for key in names
    }
    plot_scores(root / "plots" / "scores.png", certified, under_attack, "Certified score and score under PGD")
    pair = {key: under_attack[key] for key in ("teacher", "student")}
    plot_scores(root / "plots" / "teacher-and-student.png", {}, pair, "Teacher and student under the same PGD attack")


def _violations(results: Mapping[str, Any], name: str) -> str:
    count = results["attacked"]["sets"][name]["violations"]
    return f"Answers flipped inside their certified radius: {count}."


def _rows(scores: Mapping[str, tuple[float, Mapping[str, float]]]) -> list[Row]:
    """Rows of natural score and scores at each ε; cells that were not measured stay empty."""
    rows = [{"metric": title, "natural": _percent(natural), **_percents(at)} for title, (natural, at) in scores.items()]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def _percents(scores: Mapping[str, float]) -> dict[str, str]:
    return {eps: _percent(score) for eps, score in scores.items()}


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _number(cell: str) -> float:
    return float({"True": "1", "False": "0"}.get(cell, cell))
