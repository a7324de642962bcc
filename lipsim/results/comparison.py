"""Scores of several runs side by side: as tables, as curves, and one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from lipsim.results.file import eps_label
from lipsim.results.plots import Curve, plottable
from lipsim.results.runs import Run, set_names
from lipsim.results.schema import AttackedSet, CertifiedSet, NullSpaceReach, Scores
from lipsim.results.tables import NO_GRADIENT, Row, number, percent, percents, print_table

Kind = Literal["certified", "published", "joint"]
# What the rows and the curves of a kind of radius are called.
KINDS: dict[Kind, str] = {
    "certified": "",
    "published": ", published radius",
    "joint": ", all three images move",
}
_CURVES: dict[Kind, str] = {
    "certified": "exact radius",
    "published": "published radius",
    "joint": "all three images move",
}


@dataclass(frozen=True)
class ScoreTable:
    """A table: natural score and the scores at each ε, one row a metric, cells in %."""

    title: str
    heading: str
    eps: list[str]
    rows: list[Row]


def print_tables(tables: Iterable[ScoreTable], console: Console) -> None:
    """Tables in the terminal."""
    for table in tables:
        print_table(console, table.rows, table.title)


def certified_tables(runs: Sequence[Run], name: str, kinds: Sequence[Kind]) -> list[ScoreTable]:
    """Natural and certified scores on a test set; none where no run has them."""
    sections = [(run.name, run.certified) for run in runs if run.certified and name in run.certified_sets]
    found = [(run, section["eps"], section["sets"][name]) for run, section in sections]
    if not found:
        return []
    eps = _labels(budgets for _, budgets, _ in found)
    # Where votes are fractions, agreeing with the majority and with the votes are two scores.
    fractional = any(scores["vote"] != scores["majority"] for _, _, scores in found)

    def votes(scores: CertifiedSet) -> Row:
        return {"vote share": percent(scores["vote"])} if fractional else {}

    rows = [
        _row(title + KINDS[kind], scores["majority"], scores[kind], eps, votes(scores))
        for title, _, scores in found
        for kind in kinds
    ]
    title = f"{name}: 2AFC score in %, natural and certified at ℓ2 budgets ε{_counts(s for _, _, s in found)}"
    return [ScoreTable(title, "Certified score", eps, rows)]


def attacked_tables(runs: Sequence[Run], name: str) -> list[ScoreTable]:
    """Scores that attacks left on a test set, a table for each norm and each image that moves."""
    sections = [(run.name, run.attacked) for run in runs if run.attacked and name in run.attacked_sets]
    tables = []
    for norm, target in dict.fromkeys((section["norm"], section["target"]) for _, section in sections):
        found = [(run, section) for run, section in sections if (section["norm"], section["target"]) == (norm, target)]
        sets = [section["sets"][name] for _, section in found]
        eps = _labels(section["eps"] for _, section in found)
        flat = any(score["no_gradient"] for scores in sets for score in scores["metrics"].values())
        rows: list[Row] = []
        for run, section in found:
            restarts = f" × {section['restarts']}" if section["restarts"] > 1 else ""
            for key, score in section["sets"][name]["metrics"].items():
                title = run if key == "metric" else f"{run}: {key}"
                title += f" ({', '.join(section['attacks'])}; {section['steps']} steps{restarts})"
                count = {"no gradient": str(score["no_gradient"])} if flat else {}
                rows.append({**_row(title, score["natural"], score["attacked"], eps, {}), **count})
        violations = sum(scores["violations"] for scores in sets)
        sign = "∞" if norm == "inf" else norm
        moving = "all three images" if target == "all" else f"the {target}"
        title = f"{name}: 2AFC score in % under attack on {moving}, ℓ{sign} budgets ε"
        title += f"{_counts(sets)}; {violations} certificates violated"
        title += f"; {NO_GRADIENT}" if flat else ""
        tables.append(ScoreTable(title, "Score under attack", eps, rows))
    return tables


def null_space_tables(runs: Sequence[Run], name: str) -> list[ScoreTable]:
    """How far references move on a test set while a metric says "same", and while its answer stays."""
    rows: list[Row] = []
    for run, key, what, direction, reach in _reaches(runs, name):
        title = run if key == "metric" else f"{run}: {key}"
        lpips = {} if reach["lpips"] is None else {"LPIPS": number(reach["lpips"], ".3f")}
        rows.append(
            {
                "metric": f"{title}, {what}, {direction}",
                "ℓ2": number(reach["mean_length"], ".2f"),
                "largest": number(reach["largest_length"], ".2f"),
                "RMSE": number(reach["rmse"], ".3f"),
                "SSIM": number(reach["ssim"], ".3f"),
                **lpips,
            }
        )
    columns = dict.fromkeys(column for row in rows for column in row)
    title = f"{name}: how far references move, in the kernel of the first operator and on from there, while the metric "
    title += "says the same and while its answer stays"
    searched = {run.name: _searched(run, name) for run in runs}
    counts = ", ".join(f"{run}: {count}" for run, count in searched.items() if count)
    title += f"; triplets drawn: {counts}" if counts else ""
    return [ScoreTable(title, "", [], [{c: row.get(c, "") for c in columns} for row in rows])] if rows else []


def _searched(run: Run, name: str) -> int:
    """How many triplets of a test set the null-space search looked at."""
    section = run.results.get("null_space")
    return section["sets"][name]["num_triplets"] if section and name in section["sets"] else 0


def _reaches(runs: Sequence[Run], name: str) -> Iterable[tuple[str, str, str, str, NullSpaceReach]]:
    """Run, metric, "same" or "answer", direction and what was reached."""
    for run in runs:
        section = run.results.get("null_space")
        for key, found in section["sets"][name]["metrics"].items() if section and name in section["sets"] else ():
            for what, reaches in (("same", found.get("same", {})), ("answer", found.get("answer", {}))):
                for direction, reach in reaches.items():
                    yield run.name, key, what, direction, reach


def curves(
    runs: Sequence[Run], name: str, kinds: Sequence[Kind]
) -> tuple[dict[str, dict[str, Curve]], dict[str, Curve]]:
    """Metric → kind of radius → certified curve, and metric → scores under attack in ℓ2, on a test set."""
    certified: dict[str, dict[str, Curve]] = {}
    attacked: dict[str, Curve] = {}
    for run in runs:
        title = run.name.replace("$", r"\$")  # matplotlib would read mathematics
        if name in run.certified_sets:
            curve = run.certified_sets[name]["curve"]
            certified[title] = {_CURVES[kind]: (curve["eps"], plottable(curve[kind])) for kind in kinds}
        if run.attacked and name in run.attacked_sets and run.attacked["norm"] == 2:
            score = run.attacked_sets[name]["metrics"]["metric"]
            budgets = [0.0, *run.attacked["eps"]]
            attacked[title] = budgets, plottable([score["natural"], *score["attacked"].values()])
    return certified, attacked


def numbers(runs: Sequence[Run]) -> Iterable[tuple[str, str, str, str, str, float | None]]:
    """Every score: set, run, metric, kind of score, ε and value in [0, 1]."""
    for run in runs:
        for name, scores in run.certified_sets.items():
            yield name, run.name, "metric", "majority", "", scores["majority"]
            yield name, run.name, "metric", "vote", "", scores["vote"]
            for kind in KINDS:
                for label, value in scores[kind].items():
                    yield name, run.name, "metric", kind, label, value
        for name, found in run.attacked_sets.items():
            assert run.attacked is not None
            for key, score in found["metrics"].items():
                yield name, run.name, key, "natural", "", score["natural"]
                for label, value in score["attacked"].items():
                    yield name, run.name, key, f"attacked, norm {run.attacked['norm']}", label, value
                yield name, run.name, key, "no gradient, triplets", "", score["no_gradient"]
    for name in set_names(runs):
        for title, key, what, direction, reach in _reaches(runs, name):
            place = f"null space, {what}, {direction}"
            yield name, title, key, f"{place}, length", "", reach["mean_length"]
            yield name, title, key, f"{place}, RMSE", "", reach["rmse"]
            yield name, title, key, f"{place}, SSIM", "", reach["ssim"]


def _row(title: str, natural: float | None, scores: Scores, eps: Sequence[str], others: Row) -> Row:
    cells = percents(scores)
    return {"metric": title, "natural": percent(natural), **others, **{label: cells.get(label, "") for label in eps}}


def _labels(budgets: Iterable[Sequence[float]]) -> list[str]:
    """Labels of all budgets, ascending."""
    return list(dict.fromkeys(eps_label(eps) for eps in sorted({eps for found in budgets for eps in found})))


def _counts(scores: Iterable[CertifiedSet | AttackedSet]) -> str:
    """How many triplets have a majority to agree with, and how many have none."""
    found = list(scores)
    tied = sorted({s["num_tied_votes"] for s in found})
    counts = sorted({s["num_triplets"] - s["num_tied_votes"] for s in found})
    text = f", {counts[0]} triplets" if len(counts) == 1 else f", {counts[0]} to {counts[-1]} triplets"
    return text + (f" (and {tied[-1]} with a tied vote, left out)" if tied[-1] else "")
