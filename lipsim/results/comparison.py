"""Scores of several runs side by side: as tables, as curves, and one by one.

Runs of one name are one row, of means and standard errors: they differ in their seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from lipsim.results.file import eps_label
from lipsim.results.plots import Curve, plottable
from lipsim.results.runs import Run, set_names
from lipsim.results.schema import (
    AttackedMetric,
    AttackedSection,
    AttackedSet,
    CertifiedSet,
    NullSpaceReach,
    Scores,
    SmoothedScores,
    SmoothedSet,
    Smoothing,
    SummedSet,
)
from lipsim.results.seeds import by_name, mean_and_error, mean_cell, percent_cell, percent_cells, seeds_note
from lipsim.results.tables import NO_GRADIENT, Row, print_table, summing, triplet_counts

Kind = Literal["certified", "published", "joint"]
AnySet = CertifiedSet | SummedSet | SmoothedSet | AttackedSet
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
# Target of an attack → what its markers are called, and the kinds of radius that are about it.
_ATTACKS: dict[str, tuple[str, tuple[Kind, ...]]] = {
    "reference": ("under attack", ("certified", "published")),
    "all": ("all three images under attack", ("joint",)),
}


_EXACT_PASSES, _SUM_PASSES = "3", "6"  # one for each image, by each metric
_ALL_MOVE, _ONE_MOVES = ", all three images move", ", noise on all, one image moves"


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
    """Natural and certified scores on a test set, sums and smoothed metrics below the others; none without scores.

    Where there are smoothed ones, the table says on how many answers they abstain, and how many forward passes an
    answer costs that is certified.
    """
    sections = [(run.name, run.certified) for run in runs if run.certified and name in run.certified_sets]
    smoothed = [(run.name, run.smoothed) for run in runs if run.smoothed and name in run.smoothed_sets]
    sums = [(run.name, run.summed) for run in runs if run.summed and name in run.summed_sets]
    budgets = [section["eps"] for part in (sections, sums, smoothed) for _, section in part]
    if not budgets:
        return []
    groups = by_name((run, section["sets"][name]) for run, section in sections)
    summed_groups = by_name((f"{run}, {summing(section)}", section["sets"][name]) for run, section in sums)
    eps = _labels(budgets)
    # Where votes are fractions, agreeing with the majority and with the votes are two scores.
    exact: list[CertifiedSet | SummedSet] = [s for found in groups.values() for s in found]
    exact += [s for found in summed_groups.values() for s in found]
    fractional = any(s["vote"] != s["majority"] for s in exact)

    def others(vote: Sequence[float | None], abstained: str, passes: str) -> Row:
        votes = {"vote share": percent_cell(vote)} if fractional else {}
        return {**votes, **({"abstains": abstained, "passes": passes} if smoothed else {})}

    rows = [
        _row(
            title + KINDS[kind],
            [s["majority"] for s in found],
            [s[kind] for s in found],
            eps,
            others([s["vote"] for s in found], "", _EXACT_PASSES),
        )
        for title, found in groups.items()
        for kind in kinds
    ]
    rows += [
        _row(
            title + KINDS[kind],
            [s["majority"] for s in summed],
            [s["certified"] if kind == "certified" else s["joint"] for s in summed],
            eps,
            others([s["vote"] for s in summed], "", _SUM_PASSES),
        )
        for title, summed in summed_groups.items()
        for kind in kinds
        if kind != "published"  # which is of one encoder's features
    ]
    smoothed_groups = by_name(
        (f"{run if key == 'metric' else f'{run}: {key}'}, {smoothing(section)}", values)
        for run, section in smoothed
        for key, values in section["sets"][name]["metrics"].items()
    )
    for title, answered in smoothed_groups.items():
        passes = mean_cell((s["passes_per_certified"] for s in answered), ".0f")
        more = others([s["vote"] for s in answered], percent_cell(s["abstained"] for s in answered), passes)
        natural = [s["natural"] for s in answered]
        rows.append(_row(title, natural, [s["certified"] for s in answered], eps, more))
        if single := [s["certified_single"] for s in answered if "certified_single" in s]:
            rows.append(_row(f"{title.removesuffix(_ALL_MOVE)}{_ONE_MOVES}", natural, single, eps, more))
    if not rows:  # of a sum alone, whose radius nobody published
        return []
    sets: list[AnySet] = [*exact]
    sets += [section["sets"][name] for _, section in smoothed]
    title = f"{name}: 2AFC score in %, natural and certified at ℓ2 budgets ε{_counts(sets)}"
    title += seeds_note({**groups, **summed_groups, **smoothed_groups})
    if smoothed:
        title += "; passes: images embedded for each answer that is certified"
    return [ScoreTable(title, "Certified score", eps, rows)]


def smoothing(section: Smoothing) -> str:
    """What tables say of a smoothed metric: noise, draws, and the probability with which a certificate is wrong."""
    draws = f", n = {section['n']}, α = {section['alpha']:g} an answer"
    return f"smoothed, σ = {section['sigma']:g}{draws}{_moves(section)}"


def _moves(section: Smoothing) -> str:
    moving = section["moving"]
    return {"reference": "", "all": _ALL_MOVE}.get(moving, f", the {moving} image moves")


def _short_names(sections: Iterable[Smoothing]) -> dict[str, str]:
    """:func:`smoothing` → what curves are called: without the draws where no two of one noise differ in them."""
    names = {smoothing(section): f"smoothed, σ = {section['sigma']:g}{_moves(section)}" for section in sections}
    shared = list(names.values())
    return {name: short if shared.count(short) == 1 else name for name, short in names.items()}


def effort(section: AttackedSection) -> str:
    """Attacks, steps and restarts, which scores under attack go by."""
    restarts = f" × {section['restarts']}" if section["restarts"] > 1 else ""
    return f"{', '.join(section['attacks'])}; {section['steps']} steps{restarts}"


def attacked_tables(runs: Sequence[Run], name: str) -> list[ScoreTable]:
    """Scores that attacks left on a test set, a table for each norm and each image that moves."""
    sections = [(run.name, run.attacked) for run in runs if run.attacked and name in run.attacked_sets]
    tables = []
    for norm, target in dict.fromkeys((section["norm"], section["target"]) for _, section in sections):
        found = [(run, section) for run, section in sections if (section["norm"], section["target"]) == (norm, target)]
        sets = [section["sets"][name] for _, section in found]
        eps = _labels(section["eps"] for _, section in found)
        flat = any(score["no_gradient"] for scores in sets for score in scores["metrics"].values())
        scored: list[tuple[str, AttackedMetric]] = []
        for run, section in found:
            for key, score in section["sets"][name]["metrics"].items():
                title = run if key == "metric" else f"{run}: {key}"
                title += f" ({effort(section)})"
                scored.append((title, score))
        groups = by_name(scored)
        rows: list[Row] = []
        for title, group in groups.items():
            count = {"no gradient": mean_cell((s["no_gradient"] for s in group), ".0f")} if flat else {}
            row = _row(title, [s["natural"] for s in group], [s["attacked"] for s in group], eps, {})
            rows.append({**row, **count})
        violations = sum(scores["violations"] for scores in sets)
        sign = "∞" if norm == "inf" else norm
        moving = "all three images" if target == "all" else f"the {target}"
        title = f"{name}: 2AFC score in % under attack on {moving}, ℓ{sign} budgets ε"
        title += f"{_counts(sets)}; {violations} certificates violated{seeds_note(groups)}"
        title += f"; {NO_GRADIENT}" if flat else ""
        tables.append(ScoreTable(title, "Score under attack", eps, rows))
    return tables


def null_space_tables(runs: Sequence[Run], name: str) -> list[ScoreTable]:
    """How far references move on a test set while a metric says "same", and while its answer stays."""
    groups = by_name(
        (f"{run if key == 'metric' else f'{run}: {key}'}, {what}, {direction}", reach)
        for run, key, what, direction, reach in _reaches(runs, name)
    )
    rows: list[Row] = []
    for title, found in groups.items():
        lpips = mean_cell((reach["lpips"] for reach in found), ".3f")
        rows.append(
            {
                "metric": title,
                "ℓ2": mean_cell((reach["mean_length"] for reach in found), ".2f"),
                "largest": mean_cell((reach["largest_length"] for reach in found), ".2f"),
                "RMSE": mean_cell((reach["rmse"] for reach in found), ".3f"),
                "SSIM": mean_cell((reach["ssim"] for reach in found), ".3f"),
                **({"LPIPS": lpips} if lpips else {}),
            }
        )
    columns = dict.fromkeys(column for row in rows for column in row)
    title = f"{name}: how far references move, in the kernel of the first operator and on from there, while the metric "
    title += f"says the same and while its answer stays{seeds_note(groups)}"
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
) -> tuple[dict[str, dict[str, Curve]], dict[str, dict[str, Curve]]]:
    """Metric → kind of radius → certified curve, and metric → kind of attack → what attacks in ℓ2 left, on a test set.

    An attack on one image proves nothing of a radius within which all three move, and one on all three goes below the
    radius of the reference: each stands beside the radius that it is about, and nowhere else. Of runs of one name the
    mean, where they have the grid of the first.
    """
    certified: dict[str, dict[str, Curve]] = {}
    attacked: dict[str, dict[str, Curve]] = {}
    short_names = _short_names([run.smoothed for run in runs if run.smoothed])
    attacks = {target: what for target, (what, about) in _ATTACKS.items() if any(kind in about for kind in kinds)}
    for run_name, group in by_name((run.name, run) for run in runs).items():
        title = run_name.replace("$", r"\$")  # matplotlib would read mathematics
        found = [run.certified_sets[name]["curve"] for run in group if name in run.certified_sets]
        if found:
            grid = found[0]["eps"]
            same = [curve for curve in found if curve["eps"] == grid]
            certified[title] = {_CURVES[kind]: (grid, _means([curve[kind] for curve in same])) for kind in kinds}
        sums = by_name(
            (summing(run.summed), run.summed_sets[name]["curve"])
            for run in group
            if run.summed and name in run.summed_sets
        )
        for what, curves_of_sum in sums.items():
            grid = curves_of_sum[0]["eps"]
            alike = [curve for curve in curves_of_sum if curve["eps"] == grid]
            of_sum: dict[str, Curve] = {
                _CURVES[kind]: (grid, _means([c["certified"] if kind == "certified" else c["joint"] for c in alike]))
                for kind in kinds
                if kind != "published"
            }
            if of_sum:
                certified[f"{title}, {what}"] = of_sum
        smoothed: list[tuple[tuple[str, str], SmoothedScores]] = [
            ((title if key == "metric" else f"{title}: {key}", short_names[smoothing(run.smoothed)]), scores)
            for run in group
            if run.smoothed and name in run.smoothed_sets
            for key, scores in run.smoothed_sets[name]["metrics"].items()
        ]
        for (metric, kind), answered in by_name(smoothed).items():
            grid = answered[0]["curve"]["eps"]
            values = [scores["curve"]["certified"] for scores in answered if scores["curve"]["eps"] == grid]
            certified.setdefault(metric, {})[kind] = grid, _means(values)
        for target, what in attacks.items():
            by_effort = by_name(
                (effort(run.attacked), ([0.0, *run.attacked["eps"]], run.attacked_sets[name]["metrics"]["metric"]))
                for run in group
                if run.attacked and name in run.attacked_sets
                if run.attacked["norm"] == 2 and run.attacked["target"] == target
            )
            for how, scored in by_effort.items():
                budgets = scored[0][0]
                values = [[score["natural"], *score["attacked"].values()] for own, score in scored if own == budgets]
                label = what if len(by_effort) == 1 else f"{what} ({how})"
                attacked.setdefault(title, {})[label] = budgets, _means(values)
    return certified, attacked


def _means(rows: Sequence[Sequence[float | None]]) -> list[float]:
    return plottable([mean_and_error(values)[0] for values in zip(*rows, strict=True)])


Number = tuple[str, str, str, str, str, float | None]


def numbers(runs: Sequence[Run]) -> Iterable[tuple[str, str, str, str, str, float | None, float | None, int]]:
    """Every score: set, run, metric, kind of score, ε, value in [0, 1], its standard error, and of how many runs."""
    return seed_means(_single_numbers(runs))


def seed_means(
    single: Iterable[Number],
) -> Iterable[tuple[str, str, str, str, str, float | None, float | None, int]]:
    """Scores of runs that differ in their seed alone, as one."""
    groups = by_name((number[:5], number[5]) for number in single)
    for (name, run, metric, kind, label), values in groups.items():
        mean, error = mean_and_error(values)
        yield name, run, metric, kind, label, mean, error, len(values)


def _single_numbers(runs: Sequence[Run]) -> Iterable[Number]:
    for run in runs:
        for name, scores in run.certified_sets.items():
            yield name, run.name, "metric", "majority", "", scores["majority"]
            yield name, run.name, "metric", "vote", "", scores["vote"]
            for kind in KINDS:
                for label, value in scores[kind].items():
                    yield name, run.name, "metric", kind, label, value
        for name, summed in run.summed_sets.items():
            assert run.summed is not None
            what = summing(run.summed)
            yield name, run.name, what, "majority", "", summed["majority"]
            yield name, run.name, what, "vote", "", summed["vote"]
            for kind, found_scores in (("certified", summed["certified"]), ("joint", summed["joint"])):
                for label, value in found_scores.items():
                    yield name, run.name, what, kind, label, value
        for name, smooth in run.smoothed_sets.items():
            assert run.smoothed is not None
            how = smoothing(run.smoothed)
            for key, values in smooth["metrics"].items():
                yield name, run.name, key, f"{how}: natural", "", values["natural"]
                yield name, run.name, key, f"{how}: abstained", "", values["abstained"]
                yield name, run.name, key, f"{how}: passes per certified", "", values["passes_per_certified"]
                for label, value in values["certified"].items():
                    yield name, run.name, key, f"{how}: certified", label, value
                for label, value in values.get("certified_single", {}).items():
                    single = how.removesuffix(_ALL_MOVE) + _ONE_MOVES
                    yield name, run.name, key, f"{single}: certified", label, value
        for name, found in run.attacked_sets.items():
            assert run.attacked is not None
            target = run.attacked["target"]
            moving = "" if target == "reference" else f", {target}"  # scores of two targets have no mean
            for key, score in found["metrics"].items():
                yield name, run.name, key, "natural", "", score["natural"]
                how = f"attacked, norm {run.attacked['norm']}{moving} ({effort(run.attacked)})"
                for label, value in score["attacked"].items():
                    yield name, run.name, key, how, label, value
                yield name, run.name, key, f"no gradient, triplets{moving}", "", score["no_gradient"]
    for name in set_names(runs):
        for title, key, what, direction, reach in _reaches(runs, name):
            place = f"null space, {what}, {direction}"
            yield name, title, key, f"{place}, length", "", reach["mean_length"]
            yield name, title, key, f"{place}, RMSE", "", reach["rmse"]
            yield name, title, key, f"{place}, SSIM", "", reach["ssim"]


def _row(title: str, natural: Sequence[float | None], scores: Sequence[Scores], eps: Sequence[str], others: Row) -> Row:
    return {"metric": title, "natural": percent_cell(natural), **others, **percent_cells(scores, eps)}


def _labels(budgets: Iterable[Sequence[float]]) -> list[str]:
    """Labels of all budgets, ascending."""
    return list(dict.fromkeys(eps_label(eps) for eps in sorted({eps for found in budgets for eps in found})))


def _counts(scores: Iterable[AnySet]) -> str:
    """How many triplets have a majority to agree with, and how many have none."""
    return ", " + triplet_counts((s["num_triplets"], s["num_tied_votes"]) for s in scores)
