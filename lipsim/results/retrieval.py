"""Searches with labels as tables: recall and k-NN accuracy, natural, certified and under attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lipsim.results.comparison import Number, ScoreTable
from lipsim.results.file import eps_label
from lipsim.results.runs import Run
from lipsim.results.schema import Retrieval, RetrievalScores, RetrievalSet
from lipsim.results.seeds import by_name, percent_cell, percent_cells, seeds_note
from lipsim.results.tables import Row, percent, percents


def retrieval_rows(found: Retrieval) -> list[Row]:
    """One row a set and score from the section "retrieval" of results.json: natural and certified scores in %."""
    return [
        {
            "set": f"{name}: {what}",
            "natural": percent(scores["natural"]),
            **percents(scores["certified"]),
            **({"natural of attacked": percent(scores["natural_of_attacked"])} if _is_sample(of_set, scores) else {}),
            **{f"attacked, {label}": percent(score) for label, score in scores["attacked"].items()},
        }
        for name, of_set in found["sets"].items()
        for what, scores in _scores(of_set)
    ]


def retrieval_tables(runs: Sequence[Run]) -> dict[str, list[ScoreTable]]:
    """By set of queries, a table of certified scores and one of those under attack; none where no run searched."""
    tables: dict[str, list[ScoreTable]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.searched_sets):
        sets = [(run, run.searched_sets[name]) for run in runs if name in run.searched_sets]
        groups = by_name((f"{run.name}: {what}", scores) for run, found in sets for what, scores in _scores(found))
        eps = list(
            dict.fromkeys(
                eps_label(e) for e in sorted({e for run, _ in sets if run.retrieval for e in run.retrieval["eps"]})
            )
        )
        queries = _span(found["num_queries"] for _, found in sets)
        gallery = _span(found["num_gallery"] for _, found in sets)
        title = f"{name}: %, {queries} queries, gallery of {gallery} images in "
        title += f"{_span(found['num_classes'] for _, found in sets)} classes"
        note = seeds_note(groups)
        certified: list[Row] = [
            _row(key, [s["natural"] for s in found], [s["certified"] for s in found], eps)
            for key, found in groups.items()
        ]
        tables[name] = [ScoreTable(f"{title}, certified at ℓ2 budgets ε{note}", "Certified score", eps, certified)]
        if any(score["attacked"] for found in groups.values() for score in found):
            # Natural scores of the queries that were attacked, which may be some of all.
            rows: list[Row] = [
                _row(
                    key,
                    [s.get("natural_of_attacked", s["natural"]) for s in found],
                    [s["attacked"] for s in found],
                    eps,
                )
                for key, found in groups.items()
            ]
            count = ", ".join(dict.fromkeys(str(found["num_attacked"]) for _, found in sets))
            violations = sum(found["violations"] for _, found in sets)
            title += f", under attack at ℓ2 budgets ε ({count} queries; {violations} certificates violated){note}"
            tables[name].append(ScoreTable(title, "Score under attack", eps, rows))
    return tables


def retrieval_numbers(runs: Sequence[Run]) -> Iterable[Number]:
    """Every score, as :func:`lipsim.results.comparison.numbers` has those of triplets."""
    for run in runs:
        for name, found in run.searched_sets.items():
            for what, scores in _scores(found):
                yield name, run.name, "metric", what, "", scores["natural"]
                if _is_sample(found, scores):
                    natural = scores["natural_of_attacked"]
                    yield name, run.name, "metric", f"{what}, of the attacked queries", "", natural
                for kind, values in (("certified", scores["certified"]), ("attacked", scores["attacked"])):
                    for label, value in values.items():
                        yield name, run.name, "metric", f"{what}, {kind}", label, value


def _is_sample(found: RetrievalSet, scores: RetrievalScores) -> bool:
    """Whether scores under attack are of some of the queries, whose own natural score is there."""
    return "natural_of_attacked" in scores and found["num_attacked"] < found["num_queries"]


def _row(
    title: str, natural: Sequence[float | None], scores: Sequence[Mapping[str, float | None]], eps: list[str]
) -> Row:
    return {
        "metric": title,
        "natural": percent_cell(natural),
        **percent_cells([dict(score) for score in scores], eps),
    }


def _span(counts: Iterable[int]) -> str:
    """A count that all runs have, or the least and the most."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _scores(found: RetrievalSet) -> Iterable[tuple[str, RetrievalScores]]:
    yield from ((f"recall@{k}", scores) for k, scores in found["recall"].items())
    yield from ((f"{k}-NN", scores) for k, scores in found["knn"].items())
