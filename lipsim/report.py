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
        {"set": name, "triplets": str(scores["num_triplets"]), **_scores(scores["majority"], {"certified": scores["certified"]})}
        for name, scores in certified["sets"].items()
    ]


def quickstart(root: Path, console: Console) -> dict[str, Any]:
    """Print the quickstart's table, write ``report.md`` and the plots; returns the contents of results.json."""
    results = read_results(root / "results.json")
    linear = read_results(root / "linear" / "results.json")
    (name,) = results["certified"]["sets"]
    rows = quickstart_rows(results, linear, name)
    console.print(rich_table(rows, f"2AFC scores in % on {results['certified']['sets'][name]['num_triplets']} test triplets"))
    lines = null_space_lines(results, name) + [_violations(results, name)]
    for line in lines:
        console.print(line, highlight=False)
    _plot(root, results, name)
    text = "\n\n".join([markdown_table(rows), *lines])
    (root / "report.md").write_text(f"# Quickstart\n\n{text}\n")
    minutes = sum(results["seconds"].values()) / 60
    console.print(f"{minutes:.1f} minutes; report, plots and the metric are in {root}/ (lipsim.load('{root}/quickstart.safetensors'))")
    return results


def quickstart_rows(results: Mapping[str, Any], linear: Mapping[str, Any], name: str) -> list[Row]:
    """The rows of the quickstart's table: every metric, natural, certified and attacked."""
    certified, attacked = results["certified"]["sets"][name], results["attacked"]["sets"][name]
    own_linear = linear["certified"]["sets"][name]
    student = {"certified": certified["certified"], "PGD": attacked["metric"]["attacked"]}
    published = {"certified": certified["published"], "PGD": {}}
    projection = {"certified": own_linear["certified"], "PGD": attacked["linear"]["attacked"]}
    nothing = dict.fromkeys(certified["certified"], 0.0)
    teacher = {"certified": nothing, "PGD": attacked["teacher"]["attacked"]}
    rows = [
        {"metric": "student, exact radius", **_scores(certified["majority"], student)},
        {"metric": "student, published radius", **_scores(certified["majority"], published)},
        {"metric": "linear map", **_scores(own_linear["majority"], projection)},
        {"metric": "teacher (ViT)", **_scores(attacked["teacher"]["natural"], teacher)},
    ]
    for baseline, scores in results["baselines"]["sets"][name].items():
        rows.append({"metric": baseline, **_scores(scores["majority"], {})})
    columns = list(rows[0])
    return [{column: row.get(column, "") for column in columns} for row in rows]


def null_space_lines(results: Mapping[str, Any], name: str) -> list[str]:
    """What the null-space search found, one sentence a metric."""
    lines = []
    for metric, found in results["null_space"]["sets"][name].items():
        title = "student" if metric == "metric" else metric
        if found["kernel"]:
            lines.append(
                f"Null space of the {title}'s first operator ({found['layer']}): references moved by ‖δ‖ = "
                f"{found['mean_length']:.2f} on average, embedding changed by at most {found['largest_relative_change']:.1e} "
                f"of its norm: exact collisions."
            )
        else:
            lines.append(f"Null space of the {title}'s first operator: none. {found['reason'].capitalize()}.")
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


def _scores(natural: float, columns: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Cells: the natural score, then each kind of score at each ε."""
    cells = {"natural": f"{100 * natural:.1f}"}
    for kind, scores in columns.items():
        cells |= {f"{kind} {eps}": f"{100 * score:.1f}" for eps, score in scores.items()}
    return cells


def _number(cell: str) -> float:
    return float({"True": "1", "False": "0"}.get(cell, cell))
