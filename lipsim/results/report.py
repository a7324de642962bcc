"""The results of several runs side by side: tables, numbers, curves and one page that needs nothing else."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lipsim.results.benchmark import benchmark_lines, benchmark_tables, benchmark_warnings
from lipsim.results.comparison import (
    Kind,
    ScoreTable,
    attacked_tables,
    certified_tables,
    curves,
    null_space_tables,
    numbers,
    seed_means,
    smoothing,
)
from lipsim.results.formats import html_page, latex_table, markdown_table
from lipsim.results.plots import plot_scores
from lipsim.results.retrieval import retrieval_numbers, retrieval_tables
from lipsim.results.runs import Run, set_names, warnings
from lipsim.results.tables import Row, summing
from lipsim.utils.files import write_csv, write_text

_COLUMNS = ("set", "run", "metric", "score", "eps", "value", "standard_error", "runs")


def write_report(
    runs: Sequence[Run],
    output: Path,
    kinds: Sequence[Kind] = ("certified",),
    *,
    title: str = "Report",
    markdown: Path | None = None,
) -> list[ScoreTable]:
    """Write report.md, report.tex, report.csv, report.html and, for each test set with any, curves (PDF and PNG).

    Args:
        runs: in the order of the rows; those of one name are one row.
        output: folder, made where it is missing.
        kinds: rows for each run, by the exact radius, the published one, or the joint one.
        title: heading of the Markdown.
        markdown: where to write it; None: report.md in the folder.

    Returns:
        The tables.
    """
    sets = set_names(runs)
    tables = {
        name: [*certified_tables(runs, name, kinds), *attacked_tables(runs, name), *null_space_tables(runs, name)]
        for name in sets
    }
    tables |= {name: [*tables.get(name, []), *found] for name, found in retrieval_tables(runs).items()}
    benchmark = [ScoreTable(heading, "", [], rows) for heading, rows in benchmark_tables(runs)]
    said, notes = [*warnings(runs), *benchmark_warnings(runs)], benchmark_lines(runs)
    stems = _stems(sets) if len(sets) > 1 else dict.fromkeys(sets, "curves")
    pictures = {}
    for name in sets:
        certified, attacked = curves(runs, name, kinds)
        if certified or attacked:  # not of attacks in another norm than ℓ2 alone
            for suffix in (".pdf", ".png"):
                # The picture of the page is the last. Names of sets have points, which are no suffixes.
                pictures[name] = output / f"{stems[name]}{suffix}"
                # matplotlib would read mathematics
                plot_scores(pictures[name], certified, attacked, name.replace("$", r"\$"))
    flat = [*benchmark, *(table for found in tables.values() for table in found)]
    parts = [part for table in flat for part in (f"{table.title}:", markdown_table(table.rows))]
    write_text(markdown or output / "report.md", "\n\n".join([f"# {title}", *said, *notes, *parts]) + "\n")
    latex = [latex_table(table.rows, table.title, table.eps, table.heading) for table in flat]
    write_text(output / "report.tex", "\n\n".join([r"% \usepackage{booktabs,multirow}", *latex]) + "\n")
    write_csv(output / "report.csv", _COLUMNS, [*numbers(runs), *seed_means(retrieval_numbers(runs))])
    if benchmark:
        rows = [(table.title, *cell) for table in benchmark for row in table.rows for cell in _cells(row)]
        write_csv(output / "benchmark.csv", ("table", "metric", "column", "cell"), rows)
    page = {"benchmark": benchmark, **tables} if benchmark else tables
    write_text(output / "report.html", _page(runs, page, pictures, said, notes))
    return flat


def _cells(row: Row) -> list[tuple[str, str, str]]:
    return [(row["metric"], column, cell) for column, cell in row.items() if column != "metric" and cell]


def _page(
    runs: Sequence[Run],
    tables: Mapping[str, Sequence[ScoreTable]],
    curves: Mapping[str, Path],
    warnings: Sequence[str],
    notes: Sequence[str],
) -> str:
    sets = [
        {
            "name": name,
            "tables": found,
            "curves": _image(curves[name], f"curves of {name}") if name in curves else None,
        }
        for name, found in tables.items()
    ]
    shown = [{"name": run.name, "facts": _facts(run), "pictures": _pictures(run)} for run in runs]
    return html_page(warnings=warnings, notes=notes, sets=sets, runs=shown)


def _facts(run: Run) -> list[Row]:
    """What the numbers of a run rest on."""
    results = run.results
    facts: dict[str, object] = {"directory": run.directory}
    if evaluation := results.get("evaluation"):
        facts["checkpoint"] = evaluation["checkpoint"]
        facts["checkpoint SHA-256"] = evaluation["checkpoint_sha256"]
    if section := run.measured:
        facts["weights SHA-256"] = section["weights_sha256"]
    if certified := run.certified:
        facts["Lipschitz bound"] = certified["lipschitz"]
        facts["anchor"] = certified["anchor"]
        facts["feature error subtracted"] = certified["feature_error"]
        facts["precision"] = certified["precision"]
    if smoothed := run.smoothed:
        facts["randomized smoothing"] = (
            f"{smoothing(smoothed)}: each certificate holds with probability 1 − α, about the smoothed answer; "
            f"noise of seed {smoothed['seed']}, {smoothed['n0']} draws to choose an answer"
        )
    if summed := run.summed:
        facts["sum with another metric"] = f"{summing(summed)}, file SHA-256 {summed['second_sha256']}"
    facts["versions"] = ", ".join(f"{package} {v}" for package, v in results["versions"].items())
    return [{"fact": key, "value": str(value)} for key, value in facts.items() if value is not None]


def _pictures(run: Run) -> list[dict[str, str]]:
    # Hidden ones are what a killed process had begun to write.
    found = sorted(path for path in (run.directory / "plots").glob("*.png") if not path.name.startswith("."))
    return [{"heading": path.stem, **_image(path, f"{path.stem} of {run.name}")} for path in found]


def _image(path: Path, title: str) -> dict[str, str]:
    return {"title": title, "base64": base64.b64encode(path.read_bytes()).decode()}


def _stems(sets: Sequence[str]) -> dict[str, str]:
    """Set → the name of its picture without a suffix; each has its own, also where letters have no case."""
    stems: dict[str, str] = {}
    for name in sets:
        first, number = f"curves-{_file_name(name)}", 1
        stem = first
        while stem.casefold() in (other.casefold() for other in stems.values()):
            number += 1
            stem = f"{first}-{number}"
        stems[name] = stem
    return stems


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
