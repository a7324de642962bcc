"""Runs that differ in their seed are one row of means and standard errors; the benchmark's rows become its page."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from sections import attacked_section, certified_section

from lipsim.cli.main import main
from lipsim.results import read_results, update_results
from lipsim.results.benchmark import benchmark_tables
from lipsim.results.quickstart import seeds_tables
from lipsim.results.runs import load_runs, warnings
from lipsim.results.schema import BenchmarkedSet, BenchmarkSection, JointlySmoothed
from lipsim.results.seeds import mean_and_error, mean_cell
from lipsim.utils.errors import LipsimError


def _report(*args: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, args)])
    return stop.value.code  # type: ignore[return-value]


def test_means_and_errors() -> None:
    values = [0.8, 0.9, 0.85, 0.7]
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert mean_and_error(values) == pytest.approx((mean, error))
    assert mean_cell([0.8121], factor=100) == "81.2" and mean_cell([]) == ""


@pytest.fixture
def seeds(tmp_path: Path) -> list[str]:
    eps, found = [36 / 255, 1.0], []
    for seed, score in enumerate((0.6, 0.7, 0.8)):
        source = {"weights_sha256": f"w{seed}", "data_sha256": {"builtin": "d"}}
        certified = certified_section({"builtin": [score, score / 2]}, eps, source=source, majority=score + 0.1)
        left = {"36/255": score + 0.05, "1": score / 2}
        attacked = attacked_section({"metric": (score + 0.1, left), "teacher": (0.9, left)}, eps, **source)
        update_results(tmp_path / str(seed) / "results.json", {"certified": certified, "attacked": attacked})
        found.append(f"student={tmp_path / str(seed)}")
    return found


def test_runs_of_one_name_are_one_row(seeds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _report(*seeds, f"one={tmp_path / '0'}", "--output", out) == 1
    assert "several runs are called student" in capsys.readouterr().err
    assert _report(*seeds, f"one={tmp_path / '0'}", "--output", out, "--seeds", "--title", "Own") == 0
    text = (out / "report.md").read_text()
    # 10 points between seeds: a standard deviation of 10, a standard error of 10/√3.
    assert text.startswith("# Own\n") and "| student | 80.0 ± 5.8 | 70.0 ± 5.8 | 35.0 ± 2.9 |" in text
    assert "| one | 70.0 | 60.0 | 30.0 |" in text and "mean ± standard error of 1 to 3 runs" in text
    assert "| student: teacher (apgd, square; 20 steps) | 90.0 ± 0.0 | 75.0 ± 5.8 | 35.0 ± 2.9 |" in text
    with open(out / "report.csv", newline="") as file:
        rows = {(r["run"], r["metric"], r["score"], r["eps"]): r for r in csv.DictReader(file)}
    row = rows["student", "metric", "certified", "1"]
    assert float(row["value"]) == pytest.approx(0.35) and row["runs"] == "3"
    assert float(row["standard_error"]) == pytest.approx(0.05 / math.sqrt(3))
    assert rows["one", "metric", "certified", "1"]["standard_error"] == ""


def test_the_quickstarts_of_several_seeds_are_one_table(seeds: list[str], tmp_path: Path) -> None:
    roots = [Path(run.partition("=")[2]) for run in seeds]
    for root, score in zip(roots, (0.5, 0.6, 0.7), strict=True):
        content = read_results(root / "results.json")
        metrics = content["attacked"]["sets"]["builtin"]["metrics"]
        metrics["linear"] = copy.deepcopy(metrics["teacher"])
        scores = {"pixel l2": {"majority": 0.65, "vote": 0.6}}
        baselines = {"data_sha256": {"builtin": "d"}, "sets": {"builtin": {"metrics": scores}}}
        update_results(root / "results.json", {"attacked": content["attacked"], "baselines": baselines})
        linear = certified_section({"builtin": [score, 0.1]}, [36 / 255, 1.0], majority=score)
        update_results(root / "linear" / "results.json", {"certified": linear})
    certified, attacked = seeds_tables(roots).values()
    assert [list(row.values()) for row in certified] == [
        ["student, exact radius", "80.0 ± 5.8", "70.0 ± 5.8", "35.0 ± 2.9"],
        ["student, published radius", "80.0 ± 5.8", "35.0 ± 2.9", "17.5 ± 1.4"],
        ["linear map, exact radius", "60.0 ± 5.8", "60.0 ± 5.8", "10.0 ± 0.0"],
    ]
    assert [row["metric"] for row in attacked][:2] == ["student", "linear map"]
    assert attacked[-1] == {"metric": "pixel l2", "natural": "65.0 ± 0.0", "36/255": "", "1": ""}
    one = seeds_tables(roots[:1])
    assert [row["1"] for rows in one.values() for row in rows] == ["30.0", "15.0", "10.0", "30.0", "30.0", "30.0", ""]
    assert not any("±" in title for title in one)
    content = read_results(roots[0] / "results.json")
    for name in ("certified", "attacked", "baselines"):
        content[name]["data_sha256"] = {"builtin": "other"}
    (roots[0] / "results.json").write_text(json.dumps(content))
    with pytest.raises(LipsimError, match="the same test triplets"):
        seeds_tables(roots)


def test_a_pattern_means_all_runs_that_there_are(seeds: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    found = load_runs([f"student={tmp_path}/*"], seeds=True)
    assert found == load_runs(seeds, seeds=True)
    assert [run.name for run in load_runs([f"{tmp_path}/[0-1]*"])] == ["0", "1"]
    with pytest.raises(FileNotFoundError, match=r"no folder .*/none-\*"):
        load_runs([f"{tmp_path}/none-*"])
    (tmp_path / "3").mkdir()  # a run that has not ended is not passed over
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        load_runs([f"student={tmp_path}/*"], seeds=True)


def test_one_result_under_two_seeds_is_told(seeds: list[str]) -> None:
    assert warnings(load_runs(seeds, seeds=True)) == []
    (line,) = warnings(load_runs([seeds[0], *seeds], seeds=True))
    assert "same weights" in line


def _benchmarked(natural: float, certified: dict[str, float | None]) -> BenchmarkedSet:
    return {
        "num_triplets": 300,
        "num_attacked": 64,
        "natural": natural,
        "certified": certified,
        "published": {label: 0.1 for label in certified},
        "joint": {"1": 0.2} if certified else {},
        "attacked": {"1": 0.55},
        "abstained": None,
        "pixels": 3.0 if certified else None,
        "violations": 0,
    }


def _section() -> BenchmarkSection:
    return {
        "weights_sha256": "w",
        "data_sha256": {"known": "d"},
        "task": "material, 64 px",
        "row": "ours",
        "place": 1,
        "seed": 0,
        "recipe": "hinge on the radius",
        "settings": {"time budget": "60 s", "attack steps": 10},
        "training_seconds": 60.4,
        "steps": 1000,
        "parameters": 2_345_678,
        "passes": 3.0,
        "images_per_second": 5000.0,
        "device": "a processor",
        "sets": {"known": _benchmarked(0.8, {"36/255": 0.7, "1": 0.5})},
    }


def test_the_page_of_the_benchmark(tmp_path: Path) -> None:
    section = _section()
    for seed, natural in enumerate((0.8, 0.9)):
        one = copy.deepcopy(section)
        one["seed"] = seed
        one["sets"]["known"] = _benchmarked(natural, {"36/255": 0.7, "1": 0.5})
        update_results(tmp_path / f"ours-{seed}" / "results.json", {"benchmark": one})
    pixels = copy.deepcopy(section)
    pixels |= {"row": "SSIM", "place": 0, "passes": None, "parameters": 0, "recipe": "nothing to train"}
    pixels["sets"]["known"] = {**_benchmarked(0.6, {}), "published": {}}
    update_results(tmp_path / "ssim" / "results.json", {"benchmark": pixels})
    page = tmp_path / "docs" / "results.md"
    folders = [tmp_path / name for name in ("ours-0", "ssim", "ours-1")]
    assert _report(*folders, "--output", tmp_path / "out", "--markdown", page) == 0
    lines = page.read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| metric | natural | 36/255 | 1 | joint 1 | attacked 1 | pixels |"
    assert table[2:5] == [
        "| SSIM | 60.0 |  |  |  | 55.0 |  |",
        "| ours | 85.0 ± 5.0 | 70.0 ± 0.0 | 50.0 ± 0.0 | 20.0 ± 0.0 | 55.0 ± 0.0 | 3.0 ± 0.0 |",
        "| ours, published radius | 85.0 ± 5.0 | 10.0 ± 0.0 | 10.0 ± 0.0 |  |  |  |",
    ]
    assert "| ours | 2.3 M | 60 ± 0 | 1000 ± 0 | 5000 ± 0 | 3 ± 0 |" in table
    text = "\n".join(lines)
    assert "material, 64 px, known: 2AFC score in %, ε in ℓ2, 300 triplets, of which 64 are attacked" in text
    assert "time budget: 60 s; attack steps: 10" in text and "- ours: hinge on the radius" in text
    assert "flipped inside their certified radius: 0" in text and "a processor" in text
    assert (
        not (tmp_path / "out" / "report.md").exists()
        and "<h2>benchmark</h2>" in (tmp_path / "out" / "report.html").read_text()
    )
    assert "do not compare" not in text and "twice" not in text
    pixels |= {"settings": {"time budget": "90 s", "attack steps": 10}, "data_sha256": {"known": "other"}}
    for folder in ("ssim", "again"):
        update_results(tmp_path / folder / "results.json", {"benchmark": pixels})
    assert _report(*folders, tmp_path / "again", "--output", tmp_path / "out") == 0
    said = (tmp_path / "out" / "report.md").read_text()
    assert "measured in different ways and do not compare: time budget (90 s, 60 s)." in said
    assert "different data under one name: known" in said and "stand twice: SSIM" in said


def test_a_smoothed_row_has_another_one_with_noise_on_all_images(tmp_path: Path) -> None:
    for seed, natural in enumerate((0.7, 0.8)):
        section = {**_section(), "row": "teacher, smoothed", "seed": seed}
        jointly: JointlySmoothed = {
            "natural": natural,
            "certified": {"36/255": 0.6, "1": 0.4},
            "joint": {"36/255": 0.5, "1": 0.0},
            "attacked": {"1": 0.45},
            "abstained": 0.02,
            "pixels": 2.0,
        }
        if seed:  # written before such answers were attacked
            del jointly["attacked"]
        scores: BenchmarkedSet = {**_benchmarked(0.65, {"36/255": 0.6, "1": 0.3}), "abstained": 0.1, "joint": {}}
        section["sets"] = {"known": {**scores, "published": {}, "jointly_smoothed": jointly}}
        update_results(tmp_path / f"{seed}" / "results.json", {"benchmark": section})  # type: ignore[typeddict-item]
    (_, rows), _ = benchmark_tables(load_runs([str(tmp_path / "0"), str(tmp_path / "1")]))
    row, everywhere = rows
    assert row["joint 36/255"] == "" and row["natural"] == "65.0 ± 0.0" and row["attacked 1"] == "55.0 ± 0.0"
    assert list(everywhere.values()) == [
        "teacher, smoothed, noise on all images", "75.0 ± 5.0", "60.0 ± 0.0", "40.0 ± 0.0", "50.0 ± 0.0", "0.0 ± 0.0",
        "45.0", "2.0 ± 0.0", "2.0 ± 0.0",
    ]  # fmt: skip
    assert everywhere.keys() == row.keys()


def test_what_differs_between_tasks_of_the_benchmark_is_said_of_each(tmp_path: Path) -> None:
    devices = {"material, 128 px": "a processor", "material, 64 px": "a card"}
    for task, device in devices.items():
        seconds = 60 if device == "a card" else 120
        one = _section()
        one |= {"task": task, "device": device, "settings": {"time budget in s": seconds, "steps": 10}}
        update_results(tmp_path / device / "results.json", {"benchmark": one})
    page = tmp_path / "results.md"
    folders = [tmp_path / device for device in devices.values()]
    assert _report(*folders, "--output", tmp_path / "out", "--markdown", page) == 0
    paragraphs = page.read_text().split("\n\n")
    (common,) = (part for part in paragraphs if "flipped inside" in part)
    assert "steps: 10" in common and "torch" in common and "time budget" not in common and "a card" not in common
    own = [part for part in paragraphs if part.startswith("material") and "2AFC" not in part and "costs" not in part]
    assert own == [
        "material, 64 px: measured on a card; time budget in s: 60.",
        "material, 128 px: measured on a processor; time budget in s: 120.",
    ]
