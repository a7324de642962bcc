"""The quickstart's report: what its results.json says, as tables, sentences and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lipsim.results.file import read_results
from lipsim.results.formats import markdown_table
from lipsim.results.plots import plot_scores, plottable
from lipsim.results.schema import Results, Scores
from lipsim.results.seeds import percent_cell, percent_cells, seeds_note
from lipsim.results.tables import NO_GRADIENT, Row, certified_curve, number, percent, read_columns
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_text


def write_report(root: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """Write ``report.md`` and the plots of a quickstart in ``root``.

    Returns:
        Title → rows of each table, and the sentences below them.

    Raises:
        FileNotFoundError: the quickstart has not finished there.
    """
    results = read_results(root / "results.json")
    linear = read_results(root / "linear" / "results.json")
    (name,) = results["certified"]["sets"]
    tables = quickstart_tables([(results, linear)], name)
    lines = [*null_space_lines(results, name), _violations(results, name)]
    _plot(root, results, name)
    text = [part for title, rows in tables.items() for part in (f"{title}:", markdown_table(rows))]
    write_text(root / "report.md", "\n\n".join(["# Quickstart", *text, *lines]) + "\n")
    return tables, lines


def seeds_tables(roots: Sequence[Path]) -> dict[str, list[Row]]:
    """The tables of several quickstarts that differ in their seed, each cell a mean with its standard error.

    Raises:
        FileNotFoundError: one has not finished.
        ValueError: they are not of the same test triplets.
    """
    runs = [(read_results(root / "results.json"), read_results(root / "linear" / "results.json")) for root in roots]
    data = [results["certified"]["data_sha256"] for results, _ in runs]
    if any(hashes != data[0] for hashes in data):
        raise LipsimError(f"expected quickstarts on the same test triplets, got others in {roots[0]} and the rest")
    (name,) = runs[0][0]["certified"]["sets"]
    return quickstart_tables(runs, name)


def quickstart_tables(runs: Sequence[tuple[Results, Results]], name: str) -> dict[str, list[Row]]:
    """Title → rows: what is certified, and what is left under attack, for every metric.

    Args:
        runs: results of the student and of the linear map, one pair a seed.
        name: of the test set.
    """
    certified = [results["certified"]["sets"][name] for results, _ in runs]
    attacked = [results["attacked"]["sets"][name]["metrics"] for results, _ in runs]
    own_linear = [linear["certified"]["sets"][name] for _, linear in runs]
    baselines = [results["baselines"]["sets"][name]["metrics"] for results, _ in runs]
    rows: dict[str, list[tuple[float | None, Scores]]] = {
        "student, exact radius": [(scores["majority"], scores["certified"]) for scores in certified],
        "student, published radius": [(scores["majority"], scores["published"]) for scores in certified],
        "linear map, exact radius": [(scores["majority"], scores["certified"]) for scores in own_linear],
    }
    names = {"metric": "student", "linear": "linear map", "teacher": "teacher (ViT, no certificate)"}
    under_attack: dict[str, list[tuple[float | None, Scores]]] = {
        title: [(metrics[key]["natural"], metrics[key]["attacked"]) for metrics in attacked]
        for key, title in names.items()
    }
    plain: dict[str, list[tuple[float | None, Scores]]] = {
        title: [(metrics[title]["majority"], {}) for metrics in baselines] for title in baselines[0]
    }
    count = certified[0]["num_triplets"]
    suite = f"2AFC score in % under attack (APGD, minimal norm, Square) on the reference, {count} test triplets"
    left = score_rows({**under_attack, **plain})
    flat = {title: max(metrics[key]["no_gradient"] for metrics in attacked) for key, title in names.items()}
    note = seeds_note(rows)
    if any(flat.values()):
        suite += f"; {NO_GRADIENT}"
        left = [{**row, "no gradient": str(flat.get(row["metric"], ""))} for row in left]
    return {
        f"Certified 2AFC score in % on {count} test triplets, at ℓ2 budgets ε{note}": score_rows(rows),
        f"{suite}{note}": left,
    }


def score_rows(scores: Mapping[str, Sequence[tuple[float | None, Scores]]]) -> list[Row]:
    """Rows of natural score and scores at each ε, of one run or several; cells that were not measured stay empty."""
    labels = dict.fromkeys(label for found in scores.values() for _, at in found for label in at)
    return [
        {
            "metric": title,
            "natural": percent_cell(natural for natural, _ in found),
            **percent_cells([at for _, at in found], labels),
        }
        for title, found in scores.items()
    ]


def null_space_lines(results: Results, name: str) -> list[str]:
    """What the null-space search found, one sentence a metric."""
    lines = []
    for metric, found in results["null_space"]["sets"][name]["metrics"].items():
        title = {"metric": "student", "linear": "linear map"}.get(metric, metric)
        if (moves := found["moves"]) is not None:
            lines.append(
                f"Null space of the {title}'s first operator ({found['layer']}): references moved by "
                f"‖δ‖ = {number(moves['mean_length'], '.2f')} on average change the embedding by "
                f"{number(moves['median_change'], '.0e')} of its norm (median; at most "
                f"{number(moves['largest_change'], '.0e')}); "
                f"{percent(moves['exact'], digits=0)} % are exact collisions."
            )
        else:
            lines.append(f"Null space of the {title}'s first operator: none, {found['reason']}.")
    return lines


def _plot(root: Path, results: Results, name: str) -> None:
    attacked, budgets = results["attacked"]["sets"][name]["metrics"], [0.0, *results["attacked"]["eps"]]
    eps = np.linspace(0, 1.5 * budgets[-1], 200)
    student, linear = read_columns(root / "radii.csv"), read_columns(root / "linear" / "radii.csv")
    certified = {
        "student": {
            "exact radius": (eps, certified_curve(student, "radius", eps)),
            "published radius": (eps, certified_curve(student, "published_radius", eps)),
        },
        "linear map": {"exact radius": (eps, certified_curve(linear, "radius", eps))},
    }
    names = {"metric": "student", "linear": "linear map", "teacher": "teacher"}
    under_attack = {
        names[key]: {
            "under attack": (budgets, plottable([attacked[key]["natural"], *attacked[key]["attacked"].values()]))
        }
        for key in names
    }
    plot_scores(root / "plots" / "scores.png", certified, under_attack, "Certified score and score under attack")
    pair = {key: under_attack[key] for key in ("teacher", "student")}
    plot_scores(root / "plots" / "teacher-and-student.png", {}, pair, "Teacher and student under the same attacks")


def _violations(results: Results, name: str) -> str:
    count = results["attacked"]["sets"][name]["violations"]
    return f"Answers flipped inside their certified radius: {count}."
