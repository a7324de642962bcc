"""The results of several runs side by side, as tables, curves and one page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lipsim.results.file import eps_label, read_results
from lipsim.results.plots import Curve, plot_scores
from lipsim.results.tables import (
    NO_GRADIENT,
    Row,
    html_table,
    latex_table,
    markdown_table,
    percent,
    percents,
    print_table,
)
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

# What the rows and the curves of a kind of radius are called.
KINDS = {"certified": "", "published": ", published radius", "joint": ", all three images move"}
_CURVES = {"certified": "exact radius", "published": "published radius", "joint": "all three images move"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}th,td{padding:.25em .8em;text-align:right}"
    "th:first-child,td:first-child{text-align:left}th{border-bottom:1px solid #222}tr:last-child td"
    "{border-bottom:1px solid #222}img{max-width:100%}code{font-size:.85em;overflow-wrap:anywhere}"
)


@dataclass(frozen=True)
class Run:
    """One run: the name that tables give it, its directory and the contents of its results.json."""

    name: str
    directory: Path
    results: Mapping[str, Any]

    def sets(self, section: str) -> Mapping[str, Any]:
        """Test set → scores of a section; empty where it was not measured."""
        scores: Mapping[str, Any] = self.results.get(section, {}).get("sets", {})
        return scores


@dataclass(frozen=True)
class ScoreTable:
    """A table: natural score and the scores at each ε, one row a metric, cells in %."""

    title: str
    heading: str
    eps: list[str]
    rows: list[Row]


def load_runs(paths: Sequence[str]) -> list[Run]:
    """Read runs that are given as ``DIRECTORY``, ``…/results.json`` or ``NAME=DIRECTORY``.

    Raises:
        FileNotFoundError: no results.json.
        ValueError: it cannot be read, holds no scores, or two runs have one name.
    """
    runs = []
    for path in paths:
        name, _, place = ("", "", path) if user_path(path).exists() else path.partition("=")
        file = user_path(place) if place.endswith(".json") else user_path(place) / "results.json"
        results = read_results(file)
        run = Run(name or file.absolute().parent.name, file.parent, results)
        if not run.sets("certified") and not run.sets("attacked"):
            raise LipsimError(f"{file} has neither certified nor attacked scores; run scripts/evaluate.py")
        runs.append(run)
    names = [run.name for run in runs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LipsimError(f"several runs are called {', '.join(repeated)}; tell them apart by NAME=DIRECTORY")
    return runs


def write_report(runs: Sequence[Run], output: Path, kinds: Sequence[str] = ("certified",)) -> list[ScoreTable]:
    """Write report.md, report.tex, report.csv, report.html and a curve (PDF and PNG) for each test set.

    Args:
        runs: in the order of the rows.
        output: folder, made where it is missing.
        kinds: rows for each run, of :data:`KINDS`: by the exact radius, the published one, or the joint one.

    Returns:
        The tables.
    """
    output.mkdir(parents=True, exist_ok=True)
    sets = _set_names(runs)
    tables = {name: [*certified_tables(runs, name, kinds), *attacked_tables(runs, name)] for name in sets}
    said = warnings(runs)
    curves = {name: output / (f"curves-{_file_name(name)}" if len(sets) > 1 else "curves") for name in sets}
    for name, path in curves.items():
        certified, attacked = _curves(runs, name, kinds)
        for suffix in (".pdf", ".png"):
            plot_scores(path.with_suffix(suffix), certified, attacked, name)
    flat = [table for found in tables.values() for table in found]
    markdown = [part for table in flat for part in (f"{table.title}:", markdown_table(table.rows))]
    (output / "report.md").write_text("\n\n".join(["# Report", *said, *markdown]) + "\n", encoding="utf-8")
    latex = [latex_table(table.rows, table.title, table.eps, table.heading) for table in flat]
    (output / "report.tex").write_text(
        "\n\n".join([r"% \usepackage{booktabs,multirow}", *latex]) + "\n", encoding="utf-8"
    )
    with open(output / "report.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("set", "run", "metric", "score", "eps", "value"), *_numbers(runs)])
    (output / "report.html").write_text(_page(runs, tables, curves, said), encoding="utf-8")
    return flat


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader of the tables has to know: sets that are of different data under one name."""
    return [line for name in _set_names(runs) if (line := different_data(runs, name))]


def _set_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for s in ("certified", "attacked") for name in run.sets(s)))


def print_tables(tables: Iterable[ScoreTable], console: Console) -> None:
    """The same tables in the terminal."""
    for table in tables:
        print_table(console, table.rows, table.title)


def certified_tables(runs: Sequence[Run], name: str, kinds: Sequence[str]) -> list[ScoreTable]:
    """Natural and certified scores on a test set; none where no run has them."""
    found = [(run, run.sets("certified")[name]) for run in runs if name in run.sets("certified")]
    if not found:
        return []
    eps = _labels(run.results["certified"]["eps"] for run, _ in found)
    # Where votes are fractions, agreeing with the majority and with the votes are two scores.
    fractional = any(scores["vote"] != scores["majority"] for _, scores in found)
    rows = [
        _row(run.name + KINDS[kind], scores["majority"], scores[kind], eps, scores["vote"] if fractional else None)
        for run, scores in found
        for kind in kinds
    ]
    title = f"{name}: 2AFC score in %, natural and certified at ℓ2 budgets ε{_counts(s for _, s in found)}"
    return [ScoreTable(title, "Certified score", eps, rows)]


def attacked_tables(runs: Sequence[Run], name: str) -> list[ScoreTable]:
    """Scores that attacks left on a test set, a table for each norm and each image that moves."""
    attacked = [run for run in runs if name in run.sets("attacked")]
    tables = []
    for norm, target in dict.fromkeys(map(_threat, attacked)):
        found = [run for run in attacked if _threat(run) == (norm, target)]
        eps = _labels(run.results["attacked"]["eps"] for run in found)
        rows: list[Row] = []
        flat = any(score.get("no_gradient") for run in found for score in _metrics(run, name).values())
        for run in found:
            section = run.results["attacked"]
            attacks = ", ".join(section.get("attacks", [section["attack"]]))
            restarts = f" × {section['restarts']}" if section["restarts"] > 1 else ""
            for key, score in _metrics(run, name).items():
                title = run.name if key == "metric" else f"{run.name}: {key}"
                title += f" ({attacks}; {section['steps']} steps{restarts})"
                count = {"no gradient": str(score.get("no_gradient", 0))} if flat else {}
                rows.append({**_row(title, score["natural"], score["attacked"], eps), **count})
        violations = sum(run.sets("attacked")[name]["violations"] for run in found)
        sign = "∞" if norm == "inf" else norm
        moving = "all three images" if target == "all" else f"the {target}"
        title = f"{name}: 2AFC score in % under attack on {moving}, ℓ{sign} budgets ε"
        title += f"{_counts(run.sets('attacked')[name] for run in found)}; {violations} certificates violated"
        title += f"; {NO_GRADIENT}" if flat else ""
        tables.append(ScoreTable(title, "Score under attack", eps, rows))
    return tables


def _metrics(run: Run, name: str) -> dict[str, Mapping[str, Any]]:
    """Metric → its scores under attack on a test set."""
    return {key: score for key, score in run.sets("attacked")[name].items() if isinstance(score, Mapping)}


def _threat(run: Run) -> tuple[str, str]:
    """Norm of the changes, and which image they are of."""
    section = run.results["attacked"]
    return str(section["norm"]), section.get("target", "reference")


def different_data(runs: Sequence[Run], name: str) -> str | None:
    """A warning where runs saw different data under one name."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        prints = {s.get("data_sha256", {}).get(name) for s in run.results.values() if isinstance(s, Mapping)}
        for fingerprint in prints - {None}:
            seen.setdefault(str(fingerprint), []).append(run.name)
    groups = "; ".join(", ".join(names) for names in seen.values())
    return f"Different data under the name {name}: {groups}. Their scores do not compare." if len(seen) > 1 else None


def _row(
    title: str, natural: float | None, scores: Mapping[str, float], eps: Sequence[str], vote: float | None = None
) -> Row:
    cells = percents(scores)
    share = {} if vote is None else {"vote share": percent(vote)}
    return {"metric": title, "natural": percent(natural), **share, **{label: cells.get(label, "") for label in eps}}


def _labels(budgets: Iterable[Sequence[float]]) -> list[str]:
    """Labels of all budgets, ascending."""
    return list(dict.fromkeys(eps_label(eps) for eps in sorted({eps for found in budgets for eps in found})))


def _counts(scores: Iterable[Mapping[str, Any]]) -> str:
    """How many triplets have a majority to agree with, and how many have none."""
    found = list(scores)
    tied = sorted({s.get("num_tied_votes", 0) for s in found})
    counts = sorted({s["num_triplets"] - s.get("num_tied_votes", 0) for s in found})
    text = f", {counts[0]} triplets" if len(counts) == 1 else f", {counts[0]} to {counts[-1]} triplets"
    return text + (f" (and {tied[-1]} with a tied vote, left out)" if tied[-1] else "")


def _curves(
    runs: Sequence[Run], name: str, kinds: Sequence[str]
) -> tuple[dict[str, dict[str, Curve]], dict[str, Curve]]:
    """Metric → kind of radius → certified curve, and metric → scores under attack."""
    certified: dict[str, dict[str, Curve]] = {}
    attacked: dict[str, Curve] = {}
    for run in runs:
        title = run.name.replace("$", r"\$")  # matplotlib would read mathematics
        if name in run.sets("certified"):
            scores = run.sets("certified")[name]
            # Files of older versions have no curve: their table's budgets do.
            curve = scores.get("curve") or {"eps": run.results["certified"]["eps"]}
            for kind in kinds:
                points = curve.get(kind) or list(scores[kind].values())
                certified.setdefault(title, {})[_CURVES[kind]] = curve["eps"], _numeric(points)
        if name in run.sets("attacked") and run.results["attacked"]["norm"] == 2:
            score = run.sets("attacked")[name]["metric"]
            budgets = [0.0, *run.results["attacked"]["eps"]]
            attacked[title] = budgets, _numeric([score["natural"], *score["attacked"].values()])
    return certified, attacked


def _numeric(scores: Sequence[float | None]) -> list[float]:
    return [float("nan") if score is None else score for score in scores]


def _numbers(runs: Sequence[Run]) -> Iterable[tuple[str, str, str, str, str, Any]]:
    """Every score: set, run, metric, kind of score, ε and value in [0, 1]."""
    for run in runs:
        for name, scores in run.sets("certified").items():
            for kind in ("majority", "vote"):
                yield name, run.name, "metric", kind, "", scores[kind]
            for kind in KINDS:
                for label, score in scores[kind].items():
                    yield name, run.name, "metric", kind, label, score
        for name in run.sets("attacked"):
            for key, score in _metrics(run, name).items():
                yield name, run.name, key, "natural", "", score["natural"]
                for label, value in score["attacked"].items():
                    yield name, run.name, key, f"attacked, norm {run.results['attacked']['norm']}", label, value
                if "no_gradient" in score:
                    yield name, run.name, key, "no gradient, triplets", "", score["no_gradient"]


def _page(
    runs: Sequence[Run],
    tables: Mapping[str, Sequence[ScoreTable]],
    curves: Mapping[str, Path],
    warnings: Sequence[str],
) -> str:
    parts = ["<h1>Report</h1>", *(f"<p><strong>{html.escape(line)}</strong></p>" for line in warnings)]
    for name, found in tables.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for table in found:
            parts += [f"<p>{html.escape(table.title)}</p>", html_table(table.rows)]
        parts.append(_image(curves[name].with_suffix(".png"), f"curves of {name}"))
    for run in runs:
        parts += [f"<h2>{html.escape(run.name)}</h2>", html_table(_facts(run))]
        for picture in sorted((run.directory / "plots").glob("*.png")):
            parts += [f"<h3>{html.escape(picture.stem)}</h3>", _image(picture, f"{picture.stem} of {run.name}")]
    head = f'<meta charset="utf-8"><title>lipsim report</title><style>{_STYLE}</style>'
    return "\n".join([f'<!doctype html><html lang="en"><head>{head}</head><body>', *parts, "</body></html>"]) + "\n"


def _facts(run: Run) -> list[Row]:
    """What the numbers of a run rest on."""
    certified, evaluation = run.results.get("certified", {}), run.results.get("evaluation", {})
    facts = {
        "directory": run.directory,
        "checkpoint": evaluation.get("checkpoint"),
        "checkpoint SHA-256": evaluation.get("checkpoint_sha256"),
        "weights SHA-256": (certified or run.results["attacked"]).get("weights_sha256"),
        "Lipschitz bound": certified.get("lipschitz"),
        "anchor": certified.get("anchor"),
        "feature error subtracted": certified.get("feature_error"),
        "precision": certified.get("precision"),
        "versions": ", ".join(f"{package} {v}" for package, v in run.results.get("versions", {}).items()),
    }
    return [{"fact": key, "value": str(value)} for key, value in facts.items() if value is not None]


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>'


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
