"""The model of costs says what one computes by hand, of the figures that the file has or the user."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling  # type: ignore[import-not-found]

    module: ModuleType = scaling
    return module


def figures(scaling: ModuleType) -> object:
    """Numbers that are easily multiplied."""
    return scaling.Figures(
        image_size=10, features=100, student_features=20, parameters=1000, teacher_parameters=5000, step_seconds=0.01,
        image_seconds=0.001, teacher_seconds=0.004, step_bytes=7, activation_bytes=3, reading_core_seconds=0.002,
        pack_core_seconds=0.0005, image_bytes=50, pack_bytes=300,
    )  # fmt: skip


def test_one_gpu(scaling: ModuleType) -> None:
    cluster = scaling.Cluster(gpus_per_node=2, cores_per_node=4, disk=1e6, node_link=1e9, network=1e6)
    run = scaling.Run(gpus=1, cached=False, packed=False, batch=10, images=1000, epochs=3)
    found = scaling.cost(figures(scaling), cluster, run)
    # 0.01 + 10·0.001 of the student, 10·0.004 of the teacher; 10·0.002/4 of the cores, 10·50/1e6 of the disk
    expected = {"student": 0.02, "teacher": 0.04, "network": 0, "reading": 0.005, "disk": 0.0005}
    assert found.parts == pytest.approx(expected)
    assert found.step == pytest.approx(0.06) and found.bound == "teacher"
    assert found.images_per_second == pytest.approx(10 / 0.06)
    assert found.epoch == pytest.approx(100 * 0.06) and found.run == pytest.approx(18) and found.caching == 0
    assert found.read_epoch == 50_000 and found.read_node == pytest.approx(500 / 0.06)
    # weights, gradients and two moments of 4 bytes; the teacher; what is kept; 10 images of 3·10·10 numbers
    assert found.memory == 16 * 1000 + 4 * 5000 + 7 + 30 + 10 * 1200
    assert found.cache == 0 and found.sent == 0


def test_a_cache_and_two_nodes(scaling: ModuleType) -> None:
    cluster = scaling.Cluster(gpus_per_node=2, cores_per_node=4, disk=1e6, node_link=1e9, network=1e6)
    run = scaling.Run(gpus=4, cached=True, packed=False, batch=10, images=1000, epochs=3)
    found = scaling.cost(figures(scaling), cluster, run)
    # A ring of gradients, and 20 features of two views and targets of every image but one's own
    assert found.sent == 2 * 3 / 4 * 4000 + 3 * 10 * 3 * 20 * 4
    # The two GPUs of a node share its cores and its disk; each image comes with 100 numbers of 2 bytes.
    expected = {"student": 0.02, "teacher": 0, "network": 0.0132, "reading": 0.01, "disk": 20 * 250 / 1e6}
    assert found.parts == pytest.approx(expected)
    assert found.step == pytest.approx(0.0332) and found.bound == "student"
    assert found.epoch == pytest.approx(25 * 0.0332)
    # Two views in the teacher on four GPUs: 1000·2·0.004/4, against 1000·0.002/4/2 of reading
    assert found.caching == pytest.approx(2.0) and found.run == pytest.approx(3 * 25 * 0.0332 + 2)
    assert found.cache == 1000 * 2 * 200
    assert found.memory == 16 * 1000 + 4000 + 7 + 30 + 12_000
    # Within a node gradients take the faster way; all of a ring's are sent where there are many.
    assert scaling.cost(figures(scaling), cluster, replace(run, gpus=2)).parts["network"] == pytest.approx(6.4e-6)


@pytest.mark.parametrize(
    ("changes", "packed", "bound", "step"),
    [
        ({"cores_per_node": 1}, False, "reading", 20 * 0.002),
        ({"cores_per_node": 1}, True, "student", 0.02 + 6.4e-6),  # a quarter of the work, 0.01
        ({"disk": 1e5}, False, "disk", 20 * 250 / 1e5),
        ({"disk": 1e5}, True, "disk", 20 * 500 / 1e5),
        ({"node_link": 1e5}, False, "network", 0.02 + 0.064),
    ],
)
def test_what_bounds(scaling: ModuleType, changes: dict[str, float], packed: bool, bound: str, step: float) -> None:
    cluster = replace(scaling.Cluster(2, 4, 1e6, 1e9, 1e6), **changes)
    found = scaling.cost(figures(scaling), cluster, scaling.Run(2, True, packed, batch=10, images=1000))
    assert found.bound == bound and found.step == pytest.approx(step)


def test_the_table(scaling: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case in json.loads((BENCHMARKS / "scaling.json").read_text(encoding="utf-8")):
        scaling.main(["--case", case])
        said = capsys.readouterr().out
        assert said.count("\n| 64 |") == 4 and "| measured |" in said
    # A file of the user's, of one case.
    values = {name: [value, "given", "by hand"] for name, value in vars(figures(scaling)).items()}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"title": "mine", "figures": values}))
    scaling.main(["--figures", str(file), "--gpus", "3", "--batch", "10", "--count", "3000", "--epochs", "1", "--json"])
    first, *rest = json.loads(capsys.readouterr().out)
    assert len(rest) == 3 and first["bound"] == "teacher" and first["epoch"] == pytest.approx(6, rel=1e-3)
    for change, message in (
        ({"nonsense": [1, "given", ""]}, "unknown: nonsense"),
        ({"features": [-1, "given", ""]}, "at least 0, got features = -1"),
        ({"features": "many"}, "at least 0, got features = many"),
        ({"image_seconds": [0, "given", ""]}, "image_seconds above 0"),
    ):
        file.write_text(json.dumps({"title": "mine", "figures": {**values, **change}}))
        with pytest.raises(SystemExit):
            scaling.main(["--figures", str(file)])
        assert message in capsys.readouterr().err
    file.write_text(json.dumps({"title": "mine", "figures": {"features": [1, "given", ""]}}))
    with pytest.raises(SystemExit):
        scaling.main(["--figures", str(file)])
    assert "--measure FILE writes all figures" in capsys.readouterr().err
    for content, message in ((vars(figures(scaling)), "--measure FILE writes one"), ({"a": [1]}, "writes one")):
        file.write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            scaling.main(["--figures", str(file)])
        assert message in capsys.readouterr().err
    # Values alone do, too.
    file.write_text(json.dumps({"figures": vars(figures(scaling))}))
    with pytest.raises(SystemExit):
        scaling.main(["--figures", str(file), "--case", "other"])
    assert "expected no case" in capsys.readouterr().err
    scaling.main(["--figures", str(file)])
    assert "mine; 1,281,167 images" in capsys.readouterr().out
    # Where reading is what a cache waits for, making it from files takes another time than from a pack.
    scaling.main(["--case", "photographs-64", "--cores", "16", "--disk", "1e8", "--gpus", "8"])
    said = capsys.readouterr().out
    made = re.search(r"made in (\S+) h on 8 GPUs from files, and from a pack in (\S+) h on 8 GPUs, which", said)
    assert made and made[1] != made[2]
    assert [scaling.hours(hours * 3600) for hours in (9.994, 999.4, 999.6, 12345)] == ["9.99", "999", "1,000", "12,345"]
    for wrong, message in (
        (["--figures", str(tmp_path / "none.json")], "No such file"),
        (["--gpus", "8", "0"], "expected --gpus above 0"),
        (["--cores", "0"], "expected --cores above 0"),
    ):
        with pytest.raises(SystemExit):
            scaling.main(wrong)
        assert message in capsys.readouterr().err


def test_the_page_has_what_the_command_prints(scaling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """And its figures are those of the tables that they are said to be of."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for options in (["--case", "imagenet-224"], ["--case", "photographs-64", "--batch", "256", "--epochs", "90"]):
        scaling.main(options)
        rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d+ \| (cached|each)", line)]
        assert len(rows) == 12 and "\n".join(rows) in page
    tables = (BENCHMARKS / "README.md").read_text(encoding="utf-8").partition("## Reading images")[2]
    for case in json.loads((BENCHMARKS / "scaling.json").read_text(encoding="utf-8")).values():
        for name, way in (("reading_core_seconds", "files, `CentralCrop`"), ("pack_core_seconds", "pack")):
            value, _, source = case["figures"][name]
            rate = re.search(r"([\d,]+) images/s", source)[1]  # type: ignore[index]
            assert f"| {way}, batches of 64 | {rate} |" in tables
            assert 1 / value == pytest.approx(float(rate.replace(",", "")), rel=1e-3)


@pytest.mark.slow  # it trains and embeds
def test_figures_are_measured(scaling: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.json"
    scaling.main(["--measure", str(file), "--image-size", "32", "--batch", "4", "--rounds", "1"])
    assert "| 8 | cached | pack |" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))["figures"]
    assert all(kind == "measured" for _, kind, _ in found.values()) and "torch" not in sys.modules["scaling"].__dict__
    assert found["teacher_seconds"][0] > 0 and found["image_bytes"][0] > 100
    assert found["pack_bytes"][0] == pytest.approx(3 * 32 * 32, rel=0.2)
