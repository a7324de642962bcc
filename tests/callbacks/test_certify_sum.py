"""A sum of two metrics in an evaluation: its rows, a run that is cut short, and what a report makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import COUNT, args, config, cut_short, prepare, rows, write_config

import lipsim
from lipsim.audit import UnboundedModuleError
from lipsim.callbacks import CertifyRadii, CertifySum
from lipsim.cli.evaluate import evaluate
from lipsim.cli.main import main
from lipsim.datamodules import BuiltinData
from lipsim.metric import PerceptualMetric, SaturatingSum, load, save
from lipsim.results import read_results
from lipsim.students import ScatteringTransform
from lipsim.teachers import SmallViT
from lipsim.utils.files import file_sha256

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
NUMBERS: dict[str, Any] = {"weight": 2.0, "scale": 0.1}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)
    save(PerceptualMetric(ScatteringTransform(image_size=16, orientations=4), 16), "near.safetensors")


def _data(batch_size: int) -> BuiltinData:
    return BuiltinData(num_test=COUNT, image_size=16, batch_size=batch_size)


def _section(directory: str) -> dict[str, Any]:
    return dict(read_results(Path(directory, "results.json"))["summed"])


def test_rows_are_those_of_the_sum_in_any_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for batch_size in (2, 5):
        callbacks = [CertifyRadii(error_sample=0), CertifySum(Path("near.safetensors"), **NUMBERS)]
        lipsim.evaluate(
            "metric.safetensors", _data(batch_size), callbacks=callbacks, directory=f"run{batch_size}", **QUIET
        )
        found.append((_section(f"run{batch_size}"), rows(f"run{batch_size}/summed.csv")))
    (section, table), (again, _) = found
    assert section["sets"]["builtin"]["certified"] == again["sets"]["builtin"]["certified"]
    assert (section["second"], section["weight"], section["scale"]) == ("near", 2.0, 0.1)
    assert "and near where near, λ = 2, τ = 0.1" in " ".join(capsys.readouterr().out.split())
    assert section["second_sha256"] == file_sha256(Path("near.safetensors"))
    scores = section["sets"]["builtin"]
    assert scores["num_triplets"] == len(table) == COUNT
    # Against the metric itself, on triplets that are read again.
    metric = SaturatingSum(load("metric.safetensors"), load("near.safetensors"), **NUMBERS)
    by_index = {int(row["index"]): row for row in table}
    right = certified = 0
    data = _data(1)
    data.setup("test")
    for batch in data.test_dataloader()[0]:
        expected = metric.certify(batch.reference, batch.left, batch.right)
        row, vote = by_index[int(batch.index)], float(batch.right_vote)
        assert row["margin"] == pytest.approx(float(expected.margin), rel=1e-4)
        for name in ("radius", "left_radius", "right_radius", "joint_radius"):
            assert row[name] == pytest.approx(float(getattr(expected, name)), rel=1e-2, abs=1e-5)
        correct = vote != 0.5 and bool(expected.prefers_left) == (vote < 0.5)
        right, certified = right + correct, certified + (correct and row["radius"] > 36 / 255)
    untied = COUNT - scores["num_tied_votes"]
    assert scores["majority"] == pytest.approx(right / untied)
    assert scores["certified"]["36/255"] == pytest.approx(certified / untied)
    assert scores["joint"]["36/255"] <= scores["certified"]["36/255"] <= scores["majority"]
    assert scores["curve"]["certified"][0] == scores["majority"]


def test_a_run_that_was_cut_short_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config()
    content["trainer"]["callbacks"] = [
        {"class_path": "lipsim.callbacks.CertifySum", "init_args": {"second": "near.safetensors", **NUMBERS}}
    ]
    write_config(content)
    assert len(cut_short(monkeypatch, 4, args("run"))) == 4
    evaluate(args("run"))
    evaluate(args("whole"))
    assert _section("run") == _section("whole")
    assert Path("run/summed.csv").read_bytes() == Path("whole/summed.csv").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["report", "run", "--markdown", "report.md", "--output", "report", "--radius", "certified", "joint"])
    text = Path("report.md").read_text(encoding="utf-8")
    title = "run, and near where near, λ = 2, τ = 0.1"
    score = 100 * _section("run")["sets"]["builtin"]["certified"]["36/255"]
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    assert f"{score:.1f}" in line
    assert f"| {title}, all three images move |" in text
    assert "sum with another metric" in Path("report/report.html").read_text(encoding="utf-8")


def test_another_evaluation_leaves_nothing_of_this_one() -> None:
    callback = CertifySum(Path("near.safetensors"), **NUMBERS)
    lipsim.evaluate("metric.safetensors", _data(4), callbacks=[callback], directory="run", **QUIET)
    assert Path("run/summed.csv").exists()
    metric = load("metric.safetensors")
    metric.anchor = 2.0
    other = BuiltinData(num_test=4, image_size=16, batch_size=4)
    lipsim.evaluate(metric, other, callbacks=[CertifyRadii()], directory="run", **QUIET)
    assert not Path("run/summed.csv").exists()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no metric file nothing"):
        CertifySum(Path("nothing"))
    with pytest.raises(ValueError, match="expected a finite scale"):
        CertifySum(Path("near.safetensors"), scale=0.0)
    callback = CertifySum(Path("near.safetensors"), framing="center-crop")
    with pytest.raises(ValueError, match="center-crop"):
        lipsim.evaluate("metric.safetensors", _data(4), callbacks=[callback], directory="run", **QUIET)
    torch.manual_seed(0)
    teacher = PerceptualMetric(SmallViT(image_size=16), 16, lipschitz=math.inf)
    with pytest.raises(UnboundedModuleError):
        lipsim.evaluate(teacher, _data(4), callbacks=[CertifySum(Path("near.safetensors"))], directory="run", **QUIET)
    callback = CertifySum()  # scattering, at 64 pixels
    with pytest.raises(ValueError, match=r"16.*64|64.*16"):
        lipsim.evaluate("metric.safetensors", _data(4), callbacks=[callback], directory="run", **QUIET)
