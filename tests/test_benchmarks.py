"""The baseline of the benchmarks is the published network, and the script runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lipsim.students import SLLNetwork

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_baseline_computes_what_the_student_computes() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from published import PublishedNetwork  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(BENCHMARKS))
    theirs = PublishedNetwork(64, 16, channels=5, depth=3)
    ours = SLLNetwork(64, 16, channels=5, depth=3)
    state = {name.replace("convs.", "1.").replace("linear.", "5."): w for name, w in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = dict(ours.named_parameters())
    for (name, parameter), mine in zip(theirs.named_parameters(), state, strict=True):
        torch.testing.assert_close(gradients[mine].grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_the_speed_table_prints_ratios() -> None:
    command = [sys.executable, str(BENCHMARKS / "students.py"), "--image-size", "32", "--batch", "1"]
    options = ["--rounds", "1", "--only", "default student", "--skip", "compile"]
    output = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=500).stdout
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| default student")]
    assert len(rows) == 4
    assert all(float(row[3]) > 0 for row in rows) and all("GiB" in row[4] for row in rows[:3])


@pytest.mark.slow  # starts processes: a minute of two cores
def test_the_tables_of_teachers(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "teachers.py"), "--variant", "clip_vitb32", "--depth", "1"]
    options = ["--batch", "2", "--rounds", "1", "--device", "cpu"]
    output = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=500).stdout
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 5 and rows[0][0].strip() == "plain float32 loop"
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[3]) < 1e-2 for row in rows)


@pytest.mark.slow  # starts processes: a minute of two cores
def test_the_table_of_cached_steps_is_printed() -> None:
    command = [sys.executable, str(BENCHMARKS / "distillation.py"), "--image-size", "64", "--batch", "4"]
    options = ["--rounds", "1", "--teachers", "ViT-S/16"]
    output = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=500).stdout
    (row,) = (line.split("|") for line in output.splitlines() if line.startswith("| ViT-S/16"))
    assert float(row[2]) > 0 and float(row[4]) > 0


def test_the_attack_tables_print_ratios_and_scores() -> None:
    options = ["--triplets", "2", "--steps", "2", "--rounds", "1", "--reach-triplets", "4", "--reach-steps", "1"]
    command = [sys.executable, str(BENCHMARKS / "attacks.py"), *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| quickstart")]
    costs, scores = [row for row in rows if len(row) == 4], [row for row in rows if len(row) == 11]
    assert len(costs) == 6 and all(float(row[3]) > 0 for row in costs)
    assert [row[2].strip() for row in scores] == ["pgd", "mi_fgsm", "apgd"]
    assert all(0 <= float(cell) <= 100 for row in scores for cell in row[3:9])
    # A step, and a look at the clean images and at the last point.
    assert all((float(row[9]), float(row[10])) == (3, 1) for row in scores)
