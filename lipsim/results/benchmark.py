"""The benchmark: many metrics on many data, each row a mean over seeds, as `benchmarks/results.py` measured them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lipsim.results.runs import Run
from lipsim.results.schema import BenchmarkedSet, BenchmarkSection, JointlySmoothed
from lipsim.results.seeds import by_name, mean_and_error, mean_cell, percent_cell, percent_cells, seeds_note
from lipsim.results.tables import Row

_READING = """\
A *natural* score is the share of triplets on which a metric agrees with the majority of votes; ties are left out. A
score *certified* at ε counts the triplets where it also provably keeps its answer for every change of the reference up
to ε in ℓ2 (pixels in [0, 1]); *joint*: for every change of all three images, each up to ε. *Attacked* is what the suite
`lipsim.attacks.auto` leaves when it moves the reference, on a sample. *Pixels* is the median number of pixels of the
reference that may take any colour. Cells are means ± standard errors over seeds, which draw the initial weights, the
order of the batches and the attacks; the test triplets stay. Empty cells were not measured, or there is nothing to
measure: a teacher certifies nothing."""


def benchmark_sections(runs: Iterable[Run]) -> list[BenchmarkSection]:
    """Every row of every seed, tasks by name (64 px before 128) and rows in their places."""
    found = [run.benchmark for run in runs if run.benchmark]
    return sorted(found, key=lambda s: (_numbers_by_size(s["task"]), s["place"], s["row"], s["seed"]))


def _numbers_by_size(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def benchmark_tables(runs: Iterable[Run]) -> list[tuple[str, list[Row]]]:
    """Title and rows of each table: scores on each test set of each task, and what they cost."""
    tables: list[tuple[str, list[Row]]] = []
    for task, sections in by_name((s["task"], s) for s in benchmark_sections(runs)).items():
        groups = by_name((section["row"], section) for section in sections)
        note = seeds_note(groups)
        for name in dict.fromkeys(name for section in sections for name in section["sets"]):
            rows = by_name((row, s["sets"][name]) for row, found in groups.items() for s in found if name in s["sets"])
            counts = _counts(scores for found in rows.values() for scores in found)
            tables.append((f"{task}, {name}: 2AFC score in %, ε in ℓ2{counts}{note}", _score_rows(rows)))
        costs = [_cost_row(row, found) for row, found in groups.items()]
        tables.append((f"{task}: what each row costs{note}", costs))
    return tables


def benchmark_warnings(runs: Iterable[Run]) -> list[str]:
    """What a reader of the tables has to know: rows of a task that do not compare, and seeds that stand twice."""
    lines = []
    for task, sections in by_name((s["task"], s) for s in benchmark_sections(runs)).items():
        settings = by_name(item for section in sections for item in section["settings"].items())
        mixed = [f"{name} ({', '.join(map(str, dict.fromkeys(v)))})" for name, v in settings.items() if len(set(v)) > 1]
        if mixed:
            lines.append(f"Rows of {task} were measured in different ways and do not compare: {'; '.join(mixed)}.")
        hashes = by_name(item for section in sections for item in section["data_sha256"].items())
        if other := [name for name, found in hashes.items() if len(set(found)) > 1]:
            lines.append(f"Rows of {task} saw different data under one name: {', '.join(other)}.")
        seeds = by_name((section["row"], section["seed"]) for section in sections)
        if twice := [row for row, found in seeds.items() if len(set(found)) < len(found)]:
            lines.append(f"Seeds of {task} stand twice: {', '.join(twice)}.")
    return lines


def benchmark_lines(runs: Iterable[Run]) -> list[str]:
    """What the tables rest on, as paragraphs: how to read them, recipes, settings, devices and versions.

    What differs between tasks is said of each task, and the rest once.
    """
    by_task = by_name((run.benchmark["task"], run) for run in runs if run.benchmark)
    if not by_task:
        return []
    grounds = {task: _grounds(by_task[task]) for task in sorted(by_task, key=_numbers_by_size)}
    everywhere = by_name(item for found in grounds.values() for item in found.items())
    common = {name: said[0] for name, said in everywhere.items() if said == said[:1] * len(grounds)}
    own = {task: {k: v for k, v in found.items() if k not in common} for task, found in grounds.items()}
    sections = benchmark_sections(run for found in by_task.values() for run in found)
    by_place = sorted(sections, key=lambda section: section["place"])  # tasks lack some rows each
    recipes = dict.fromkeys((section["row"], section["recipe"]) for section in by_place)
    broken = sum(scores["violations"] for section in sections for scores in section["sets"].values())
    return [
        _READING,
        f"Settings: {'; '.join(common.values())}. Answers flipped inside their certified radius: {broken}.",
        *(f"{task}: {'; '.join(found.values())}." for task, found in own.items() if found),
        "\n".join(f"- {row}: {recipe}" for row, recipe in recipes),
    ]


def _grounds(runs: Sequence[Run]) -> dict[str, str]:
    """What the numbers of a task rest on, each with how it is said: devices, versions of packages, settings."""
    sections = benchmark_sections(runs)
    versions = by_name(
        item for run in runs if run.benchmark for item in run.results["versions"].items() if item[0] in _VERSIONS
    )
    settings = by_name(item for section in sections for item in section["settings"].items())
    return {
        "device": f"measured on {', '.join(dict.fromkeys(section['device'] for section in sections))}",
        **{name: f"{name} {' and '.join(dict.fromkeys(found))}" for name, found in versions.items()},
        **{name: f"{name}: {', '.join(map(str, dict.fromkeys(values)))}" for name, values in settings.items()},
    }


_VERSIONS = ("torch", "lipsim")


def _score_rows(rows: dict[str, list[BenchmarkedSet]]) -> list[Row]:
    found = [scores for group in rows.values() for scores in group]
    both = [*found, *(scores["jointly_smoothed"] for scores in found if "jointly_smoothed" in scores)]
    labels = {
        "certified": list(dict.fromkeys(label for scores in both for label in scores["certified"])),
        "joint": list(dict.fromkeys(label for scores in both for label in scores["joint"])),
        "attacked": list(dict.fromkeys(label for scores in both for label in scores.get("attacked", {}))),
    }
    abstained = any(scores["abstained"] is not None for scores in both)
    table: list[Row] = []
    for title, group in rows.items():
        table.append(_score_row(title, group, labels, abstained))
        if everywhere := [scores["jointly_smoothed"] for scores in group if "jointly_smoothed" in scores]:
            table.append(_score_row(f"{title}, noise on all images", everywhere, labels, abstained))
        if any(scores["published"] for scores in group):
            blank = dict.fromkeys(table[-1], "")
            published = percent_cells([scores["published"] for scores in group], labels["certified"])
            natural = {"metric": f"{title}, published radius", "natural": table[-1]["natural"]}
            table.append({**blank, **natural, **published})
    return table


def _score_row(
    title: str, group: Sequence[BenchmarkedSet | JointlySmoothed], labels: Mapping[str, list[str]], abstained: bool
) -> Row:
    joint = percent_cells([scores["joint"] for scores in group], labels["joint"])
    attacked = percent_cells([scores.get("attacked", {}) for scores in group], labels["attacked"])
    return {
        "metric": title,
        "natural": percent_cell(scores["natural"] for scores in group),
        **percent_cells([scores["certified"] for scores in group], labels["certified"]),
        **{f"joint {label}": cell for label, cell in joint.items()},
        **{f"attacked {label}": cell for label, cell in attacked.items()},
        "pixels": mean_cell((scores["pixels"] for scores in group), ".1f"),
        **({"abstains": percent_cell(scores["abstained"] for scores in group)} if abstained else {}),
    }


def _cost_row(row: str, sections: Sequence[BenchmarkSection]) -> Row:
    parameters = mean_and_error(section["parameters"] for section in sections)[0]
    return {
        "metric": row,
        "parameters": "" if parameters is None else _thousands(parameters),
        "training, s": mean_cell((section["training_seconds"] for section in sections), ".0f"),
        "steps": mean_cell((section["steps"] for section in sections), ".0f"),
        "images/s": mean_cell((section["images_per_second"] for section in sections), ".0f"),
        "passes an answer": mean_cell((section["passes"] for section in sections), ".0f"),
    }


def _thousands(number: float) -> str:
    """``2.5 M`` or ``41 k``."""
    if number >= 1e6:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.0f} k" if number >= 1e3 else f"{number:.0f}"


def _counts(scores: Iterable[BenchmarkedSet]) -> str:
    found = list(scores)
    triplets = " or ".join(str(n) for n in sorted({s["num_triplets"] for s in found}, reverse=True) if n)
    attacked = " or ".join(str(n) for n in sorted({s["num_attacked"] for s in found}, reverse=True) if n)
    return f", {triplets} triplets" + (f", of which {attacked} are attacked" if attacked else "")
