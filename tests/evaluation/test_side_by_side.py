"""`lipsim attack-tables`: scores against single runs of the attacks, transfer, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lipsim import PerceptualMetric
from lipsim.attacks import TwoAFCObjective, apgd
from lipsim.cli.main import main
from lipsim.data import Triplet
from lipsim.evaluation.scores import agrees
from lipsim.evaluation.side_by_side import Settings, measure, tables
from lipsim.metric import save
from lipsim.metric.distances import BASELINES, pixel_l2
from lipsim.results import read_results
from lipsim.results.tables import percent
from lipsim.students import OrthogonalProjection

SETTINGS = Settings(eps=(0.05, 0.5), eps_alone=0.5, steps=8, queries=10, batch_size=5)


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(16, 24), 16, lipschitz=1.0).eval().requires_grad_(False)


def test_scores_are_those_of_the_attacks(metric: PerceptualMetric, triplets: Triplet) -> None:
    found = measure({"ours": metric, "pixels": pixel_l2}, triplets, SETTINGS)
    margin = metric.margin(*triplets.embed(metric.embed))
    right = agrees(margin, triplets.right_vote)
    untied = int((triplets.right_vote != 0.5).sum())
    scores = found["scores"]["ours"]
    assert scores["natural"] == pytest.approx(int(right.sum()) / untied)
    images = (triplets.reference, triplets.left, triplets.right)
    x_adv = apgd(TwoAFCObjective(metric, *images), images[0], eps=0.5, steps=8)
    held = right & (TwoAFCObjective(metric, *images, chosen_left=margin > 0)(x_adv) <= 0)
    assert scores["alone"]["apgd"] == pytest.approx(int(held.sum()) / untied)
    for name in ("ours", "pixels"):
        row = found["scores"][name]
        assert row["natural"] >= row["l2"]["0.05"] >= row["l2"]["0.5"]
        # The suite is no weaker than its members.
        assert row["l2"]["0.5"] <= min(row["alone"][attack] for attack in ("apgd", "minimal_norm"))


def test_distances_and_transfer(metric: PerceptualMetric, triplets: Triplet) -> None:
    copy = PerceptualMetric(OrthogonalProjection(16, 24), 16, lipschitz=1.0).eval().requires_grad_(False)
    copy.load_state_dict(metric.state_dict())
    found = measure({"one": metric, "same": copy, "pixels": pixel_l2}, triplets, SETTINGS)
    moved = found["distances"]["pixels"]
    assert all(value == pytest.approx(0.5, rel=0.02) for value in moved["reached"].values())
    natural = [pixel_l2(triplets.reference, images) for images in (triplets.left, triplets.right)]
    assert moved["natural_median"] == pytest.approx(float(torch.cat(natural).double().median()))
    reached = list(found["distances"]["one"]["reached"].values())
    assert reached == sorted(reached) and reached[0] > 0
    # d(x, x + δ) ≤ 1 − √(1 − (ε/‖e‖)²) for a 1-Lipschitz encoder.
    norm = torch.sqrt(metric.embed(triplets.reference).square().sum(1) + 1)
    assert reached[-1] <= float((1 - torch.sqrt(1 - (0.5 / norm).square())).max()) + 1e-6
    transfer = found["transfer"]
    assert transfer["one"] == pytest.approx(transfer["same"]) and transfer["one"]["one"] == transfer["one"]["same"]
    right = int(agrees(metric.margin(*triplets.embed(metric.embed)), triplets.right_vote).sum())
    broken = round((found["scores"]["one"]["natural"] - found["scores"]["one"]["alone"]["apgd"]) * 10)
    assert transfer["one"]["one"] == pytest.approx(broken / right, abs=1.5 / right)
    shown = tables(found, "toy")
    assert len(shown) == 4 and all(len(rows) == 3 for rows in shown.values())
    last = list(shown.values())[-1]
    assert last[0]["made on"] == "one" and last[0]["same"] == percent(transfer["one"]["same"])


def test_the_command_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), "m.safetensors")
    save(PerceptualMetric(OrthogonalProjection(24, 8), 24), "large.safetensors")
    small = ["--samples", "4", "--steps", "2", "--queries", "2", "--output", "out"]
    with pytest.raises(SystemExit) as stop:
        main(["attack-tables", "student=m.safetensors", *small])
    assert stop.value.code == 0
    found = read_results(Path("out/results.json"))["attack_tables"]
    assert list(found["scores"]) == ["student", *BASELINES] and found["num_triplets"] == 4
    assert not any(math.isnan(score) for row in found["scores"].values() for score in row["l2"].values())
    lines = Path("out/tables.md").read_text().splitlines()
    assert sum(line.startswith("| student |") for line in lines) == 4
    assert r"\toprule" in Path("out/tables.tex").read_text()


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), "m.safetensors")
    save(PerceptualMetric(OrthogonalProjection(24, 8), 24), "large.safetensors")
    for args, message in (
        (["m.safetensors", "large.safetensors"], "one image size"),
        (["a=m.safetensors", "a=m.safetensors"], "different names"),
        (["nothing.safetensors"], "no metric file"),
        (["m.safetensors", "--lpips", "nothing.pth"], "nothing is downloaded"),
        (["m.safetensors", "--samples", "0"], "--samples of at least 1"),
        (["m.safetensors", "--data", "material"], "--root"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["attack-tables", *args])
        error = capsys.readouterr().err
        assert stop.value.code == 1 and message in error and error.count("\n") == 1, error
