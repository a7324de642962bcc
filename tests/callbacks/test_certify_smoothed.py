"""Smoothing in an evaluation: its rows, its draws, and what a report makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import COUNT, args, config, cut_short, prepare, rows, spy_on_embedding, write_config

import lipsim
from lipsim.callbacks import CertifySmoothed
from lipsim.cli.evaluate import evaluate
from lipsim.datamodules import BuiltinData
from lipsim.metric import SmoothedMetric, load
from lipsim.results import read_results

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
OPTIONS: dict[str, Any] = {"sigma": 0.5, "n": 60, "n0": 10, "max_triplets": 9}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)


def _section(directory: str) -> dict[str, Any]:
    return dict(read_results(Path(directory, "results.json"))["smoothed"])


def test_rows_are_those_of_the_smoothed_metric_in_any_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for batch_size in (2, 5):
        data = BuiltinData(num_test=COUNT, image_size=16, batch_size=batch_size)
        callback = CertifySmoothed(**OPTIONS, others={"again": Path("metric.safetensors")})
        lipsim.evaluate("metric.safetensors", data, callbacks=[callback], directory=f"run{batch_size}", **QUIET)
        found.append((_section(f"run{batch_size}"), rows(f"run{batch_size}/smoothed.csv")))
    assert found[0] == found[1]
    section, table = found[0]
    assert "abstains" in capsys.readouterr().out
    assert (section["sigma"], section["n"], section["n0"], section["alpha"]) == (0.5, 60, 10, 0.001)
    scores = section["sets"]["builtin"]
    metrics = scores["metrics"]
    assert scores["num_triplets"] == len(table) == 9 and metrics["metric"] == metrics["again"]
    # Against the metric itself, on triplets that are read again.
    data = BuiltinData(num_test=COUNT, image_size=16, batch_size=1)
    data.setup("test")
    smoothed = SmoothedMetric(load("metric.safetensors"), 0.5, samples=60, selection=10)
    right = 0
    by_index = {int(row["index"]): row for row in table}
    for batch in data.test_dataloader()[0]:
        if (index := int(batch.index)) not in by_index:
            continue
        expected = smoothed.certify(batch.reference, batch.left, batch.right, index=batch.index)
        row = by_index[index]
        assert row["metric/radius"] == float(expected.radius) and row["metric/choice"] == float(expected.choice)
        assert [row[f"metric/said_{name}"] for name in ("left", "right", "neither")] == expected.counts[0].tolist()
        vote = float(batch.right_vote)
        right += bool(expected.choice == (1 if vote < 0.5 else -1)) and vote != 0.5
    own = metrics["metric"]
    untied = 9 - scores["num_tied_votes"]
    assert own["natural"] == pytest.approx(right / untied) and own["certified"]["36/255"] <= own["natural"]
    assert own["passes"] == 72 and own["passes_per_certified"] == pytest.approx(72 / (1 - own["abstained"]))
    assert own["curve"]["certified"][0] == own["natural"]


def test_a_run_that_was_cut_short_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    content = config()
    options = {**OPTIONS, "sigma": 0.02, "alpha": 0.01, "eps": [0.01, 0.02], "moving": "all"}
    content["trainer"]["callbacks"] = [{"class_path": "lipsim.callbacks.CertifySmoothed", "init_args": options}]
    write_config(content)
    assert len(cut_short(monkeypatch, 4, args("run"))) == 4
    seen = spy_on_embedding(monkeypatch)
    evaluate(args("run"))
    assert seen == list(range(8, COUNT))
    evaluate(args("whole"))
    assert _section("run") == _section("whole") and _section("run")["moving"] == "all"
    # One image alone moves by √3 times as much, in the share of answers that these rows have.
    section, table = _section("whole"), rows("whole/smoothed.csv")
    untied = [row for row in table if row["right_vote"] != 0.5]
    (scores,) = section["sets"]["builtin"]["metrics"].values()
    for label, eps in zip(scores["certified"], section["eps"], strict=True):
        for key, factor in (("certified", 1.0), ("certified_single", 3**0.5)):
            held = [row for row in untied if row["metric/radius"] * factor > eps]
            agree = sum(row["metric/choice"] == (1 if row["right_vote"] < 0.5 else -1) for row in held)
            assert scores[key][label] == pytest.approx(agree / len(untied))
    assert scores["certified_single"] != scores["certified"]
    assert Path("run/smoothed.csv").read_bytes() == Path("whole/smoothed.csv").read_bytes()


def test_a_metric_without_a_bound_beside_one_with() -> None:
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    metric = lipsim.PerceptualMetric(encoder, 16, lipschitz=float("inf"))
    data = BuiltinData(num_test=4, image_size=16, batch_size=4)
    callback = CertifySmoothed(sigma=0.1, n=20, n0=5, eps=[0.1])
    found = lipsim.evaluate(metric, data, callbacks=[callback], directory="run", **QUIET)
    assert set(found["smoothed"]["sets"]["builtin"]["metrics"]) == {"metric"} and "certified" not in found
    with pytest.raises(ValueError, match="no metric to smooth"):
        CertifySmoothed(own=False)
