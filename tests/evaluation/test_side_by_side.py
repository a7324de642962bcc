"""`lipsim attack-tables`: scores against single runs of the attacks, transfer, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lipsim import PerceptualMetric
from lipsim.attacks import TwoAFCObjective, apgd
from lipsim.attacks.registry import attacks_in
from lipsim.cli.main import main
from lipsim.data import Triplet, sample_triplets
from lipsim.evaluation.scores import agrees
from lipsim.evaluation.side_by_side import Settings, attack_tables, common_images, load_metrics, measure, tables
from lipsim.metric import save
from lipsim.metric.distances import BASELINES, pixel_l2
from lipsim.results import eps_label, read_results
from lipsim.results.schema import ComparedMetric, Comparison
from lipsim.results.tables import percent, print_table
from lipsim.students import OrthogonalProjection
from lipsim.utils.errors import LipsimError

SETTINGS = Settings(eps=(0.05, 0.5), alone_eps=0.5, steps=8, queries=10, batch_size=5)


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(16, 24), 16, lipschitz=1.0).eval().requires_grad_(False)


def test_scores_are_those_of_the_attacks(metric: PerceptualMetric, triplets: Triplet) -> None:
    found = measure({"ours": metric, "pixels": pixel_l2}, triplets, SETTINGS)
    margin = metric.margin(*triplets.embed(metric.embed))
    right = agrees(margin, triplets.right_vote)
    untied = int((triplets.right_vote != 0.5).sum())
    scores = found["metrics"]["ours"]
    assert scores["natural"] == pytest.approx(int(right.sum()) / untied)
    images = (triplets.reference, triplets.left, triplets.right)
    x_adv = apgd(TwoAFCObjective(metric, *images), images[0], eps=0.5, steps=8)
    held = right & (TwoAFCObjective(metric, *images, chosen_left=margin > 0)(x_adv) <= 0)
    assert scores["alone"]["apgd"] == pytest.approx(int(held.sum()) / untied)
    for name in ("ours", "pixels"):
        row = found["metrics"][name]
        assert row["natural"] >= row["l2"]["0.05"] >= row["l2"]["0.5"]
        # The suite is no weaker than its members.
        assert row["l2"]["0.5"] <= min(row["alone"][attack] for attack in ("apgd", "minimal_norm"))


def test_distances_and_transfer(metric: PerceptualMetric, triplets: Triplet) -> None:
    copy = PerceptualMetric(OrthogonalProjection(16, 24), 16, lipschitz=1.0).eval().requires_grad_(False)
    copy.load_state_dict(metric.state_dict())
    found = measure({"one": metric, "same": copy, "pixels": pixel_l2}, triplets, SETTINGS)
    moved = found["metrics"]["pixels"]["distances"]
    assert all(value == pytest.approx(0.5, rel=0.02) for value in moved["reached"].values())
    natural = [pixel_l2(triplets.reference, images) for images in (triplets.left, triplets.right)]
    assert moved["natural_median"] == pytest.approx(float(torch.cat(natural).double().quantile(0.5)))
    reached = list(found["metrics"]["one"]["distances"]["reached"].values())
    assert reached == sorted(reached) and reached[0] > 0
    # d(x, x + δ) ≤ 1 − √(1 − (ε/‖e‖)²) for a 1-Lipschitz encoder.
    norm = torch.sqrt(metric.embed(triplets.reference).square().sum(1) + 1)
    assert reached[-1] <= float((1 - torch.sqrt(1 - (0.5 / norm).square())).max()) + 1e-6
    transfer = {name: scores["transfer"] for name, scores in found["metrics"].items()}
    assert transfer["one"] == pytest.approx(transfer["same"]) and transfer["one"]["one"] == transfer["one"]["same"]
    right = int(agrees(metric.margin(*triplets.embed(metric.embed)), triplets.right_vote).sum())
    broken = round((found["metrics"]["one"]["natural"] - found["metrics"]["one"]["alone"]["apgd"]) * 10)
    assert transfer["one"]["one"] == pytest.approx(broken / right, abs=1.5 / right)
    shown = tables(found, "toy")
    assert len(shown) == 4 and all(len(rows) == 3 for rows in shown.values())
    last = list(shown.values())[-1]
    assert last[0]["made on"] == "one" and last[0]["same"] == percent(transfer["one"]["same"])


def test_a_metric_that_is_never_right_has_scores_of_zero(metric: PerceptualMetric, triplets: Triplet) -> None:
    wrong = (metric.margin(*triplets.embed(metric.embed)) > 0).float()  # against its own answer, each time
    against = Triplet(*triplets.images(), right_vote=wrong, index=triplets.index)
    found = measure({"ours": metric, "pixels": pixel_l2}, against, SETTINGS)["metrics"]["ours"]
    assert found["natural"] == 0.0 and found["linf"] == 0.0 and set(found["l2"].values()) == {0.0}


def test_ties_are_left_out_and_said(metric: PerceptualMetric, triplets: Triplet) -> None:
    votes = triplets.right_vote.clone()
    votes[0], votes[1:] = 0.5, (triplets.right_vote[1:] >= 0.5).to(votes)
    for some, title in ((votes, f"{len(votes) - 1} triplets (and 1 with"), (0 * votes + 0.5, "0 triplets (and")):
        found = measure({"ours": metric}, Triplet(*triplets.images(), right_vote=some, index=triplets.index), SETTINGS)
        assert found["num_tied_votes"] == int((some == 0.5).sum())
        (suite, rows), *_ = tables(found, "set").items()
        assert title in suite and "nan" not in str(list(tables(found, "set").values()))
    assert rows[0]["natural"] == ""


@pytest.mark.parametrize("name", ["SSIM", "DISTS"])
def test_a_metric_does_not_take_the_place_of_a_distance_beside_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is the name of a distance that stands beside"):
        load_metrics({name: "quickstart"}, dists="weights")


def test_metrics_that_see_different_images_are_refused(tmp_path: Path, metric: PerceptualMetric) -> None:
    """Pixels resized in another way are other pixels, at the same size too."""
    metrics = {
        "float": metric,
        "pil": PerceptualMetric(metric.encoder, 16, lipschitz=1.0, resize="pil"),
        "large": PerceptualMetric(OrthogonalProjection(24, 8), 24, lipschitz=1.0),
    }
    expected = {("float", "pil"): "resized in one way", ("float", "large"): "one image size", (): "one image size"}
    for names, message in expected.items():
        chosen = {"pixels": pixel_l2, **{name: metrics[name] for name in names}}
        with pytest.raises(ValueError, match=message):
            attack_tables(chosen, tmp_path / "out", data="nights", root=tmp_path)
    files = {name: save(metrics[name], tmp_path / f"{name}.safetensors") for name in ("float", "pil")}
    assert list(load_metrics({"pil": files["pil"]})) == ["pil", *BASELINES]
    assert not (tmp_path / "out").exists()


def test_triplets_are_resized_as_the_metrics_expect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def sample(data: str, count: int, size: int, **options: Any) -> Triplet:
        seen.update(data=data, count=count, size=size, **options)
        images = [torch.rand(2, 3, 16, 16) for _ in range(3)]
        return Triplet(*images, torch.tensor([0.0, 1.0]), torch.arange(2))

    monkeypatch.setattr("lipsim.data.registry.sample_triplets", sample)
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16, lipschitz=1.0, resize="pil").requires_grad_(False)
    settings = Settings(eps=(0.1,), steps=1, queries=1, seed=5)
    shown = attack_tables({"m": metric}, tmp_path, data="nights", root="x", samples=2, settings=settings)
    assert seen == {
        "data": "nights",
        "count": 2,
        "size": 16,
        "root": Path("x"),
        "seed": 5,
        "resize": "pil",
        "framing": "stretch",
        "division": None,
    }
    assert len(shown) == 4 and all(rows[0].get("metric", rows[0].get("made on")) == "m" for rows in shown.values())
    measured = read_results(tmp_path / "results.json")["attack_tables"]
    assert measured["data"] == "nights" and measured["alone_eps"] == 1.0
    assert {"tables.md", "tables.tex"} <= {file.name for file in tmp_path.iterdir()}


def test_headings_fit_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """The suite at the default budgets, each attack alone, and distances, as long as the name of a metric is short."""
    budgets = [eps_label(eps) for eps in Settings().eps]
    levels: dict[str, float | None] = dict.fromkeys(["5 %", "25 %", "50 %", "75 %", "95 %"], 1.23e-5)
    compared: ComparedMetric = {
        "natural": 1.0,
        "no_gradient": 0,
        "l2": dict.fromkeys(budgets, 1.0),
        "linf": 1.0,
        "alone": dict.fromkeys(attacks_in(2), 1.0),
        "one_pixel": 1.0,
        "distances": {"reached": levels, "natural_median": 1.0, "shares": levels},
        "transfer": dict.fromkeys(["quickstart", *BASELINES], 1.0),
    }
    measured: Comparison = {
        "num_triplets": 200,
        "num_tied_votes": 0,
        "eps": list(Settings().eps),
        "alone_eps": 1.0,
        "linf_eps": 4 / 255,
        "steps": 100,
        "queries": 1000,
        "seed": 1,
        "metrics": {"quickstart": compared},
    }
    for title, rows in tables(measured, "builtin").items():
        print_table(Console(width=80), rows, title)
    output = capsys.readouterr().out
    assert "(continued)" not in output and "…" not in output
    assert max(map(len, output.splitlines())) <= 80


def test_the_command_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), "m.safetensors")
    save(PerceptualMetric(OrthogonalProjection(24, 8), 24), "large.safetensors")
    small = ["--samples", "4", "--steps", "2", "--queries", "2", "--output", "out"]
    with pytest.raises(SystemExit) as stop:
        main(["attack-tables", "student=m.safetensors", *small])
    assert stop.value.code == 0
    found = read_results(Path("out/results.json"))["attack_tables"]
    assert list(found["metrics"]) == ["student", *BASELINES] and found["num_triplets"] == 4
    assert not any(math.isnan(score) for row in found["metrics"].values() for score in row["l2"].values())
    lines = Path("out/tables.md").read_text().splitlines()
    assert sum(line.startswith("| student |") for line in lines) == 4
    assert r"\toprule" in Path("out/tables.tex").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["report", "out"])
    assert "those of lipsim attack-tables are in out/tables.md" in capsys.readouterr().err


def test_metrics_are_attacked_on_images_as_they_expect(
    nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for resize in ("float", "pil"):
        save(PerceptualMetric(OrthogonalProjection(16, 8), 16, resize=resize), f"{resize}.safetensors")
    given: list[Triplet] = []

    def stop(metrics: object, triplets: Triplet, *_: object) -> None:
        given.append(triplets)
        raise LipsimError("seen")

    monkeypatch.setattr("lipsim.evaluation.side_by_side.measure", stop)
    where = ["--data", "nights", "--root", str(nights), "--samples", "4"]
    for resize in ("float", "pil"):
        with pytest.raises(SystemExit):
            main(["attack-tables", f"{resize}.safetensors", *where])
        expected = sample_triplets("nights", 4, 16, resize=resize, root=nights, seed=1)
        assert torch.equal(given[-1].reference, expected.reference)
    assert not torch.equal(given[0].reference, given[1].reference)
    capsys.readouterr()
    both = ["float.safetensors", "pil.safetensors"]
    with pytest.raises(SystemExit):
        main(["attack-tables", *both, *where])
    error = capsys.readouterr().err
    assert "float for 'float', pil for 'pil'; make a table of each kind" in error and error.count("\n") == 1
    assert len(given) == 2
    with pytest.raises(SystemExit):  # built-in images are resized by nobody
        main(["attack-tables", *both, "--samples", "4"])
    assert len(given) == 3


def test_triplets_are_of_the_division_of_a_training(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), "m.safetensors")
    given: list[Triplet] = []

    def stop(metrics: object, triplets: Triplet, *_: object) -> None:
        given.append(triplets)
        raise LipsimError("seen")

    monkeypatch.setattr("lipsim.evaluation.side_by_side.measure", stop)
    line, where = ["attack-tables", "m.safetensors", "--samples", "4"], ["--data", "material", "--root", str(material)]
    division = {"seed": 1, "num_triplets": 30, "num_materials": 2}
    with pytest.raises(SystemExit):
        main([*line, *where, "--division", *(f"{name}={number}" for name, number in division.items())])
    expected = sample_triplets("material", 4, 16, resize="float", root=material, seed=1, division=division)
    assert torch.equal(given[-1].reference, expected.reference) and torch.equal(given[-1].left, expected.left)
    for wrong, message in (
        ([*where, "--division", "sed=1"], "expected seed, num_triplets or num_materials = a number, got 'sed=1'"),
        (["--division", "seed=1"], "--division is of Material, whose parts are drawn here; --data is builtin"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*line, *wrong])
        assert message in capsys.readouterr().err


def test_distances_alone_have_no_size() -> None:
    with pytest.raises(ValueError, match="metrics of one image size"):
        common_images({"pixels": pixel_l2}, "builtin")


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), "m.safetensors")
    save(PerceptualMetric(OrthogonalProjection(24, 8), 24), "large.safetensors")
    for args, message in (
        (["m.safetensors", "large.safetensors"], "one image size"),
        (["a=m.safetensors", "a=m.safetensors"], "different names"),
        (["nothing.safetensors"], "no metric file"),
        (["m.safetensors", "--lpips", "nothing.pth"], "nothing is downloaded"),
        (["m.safetensors", "--samples", "0"], "--samples: expected an integer of at least 1"),
        (["m.safetensors", "--data", "material"], "--root"),
        (["m.safetensors", "--linf", "4"], "expected ℓ∞ budgets of pixels in [0, 1], such as 4/255, got 4"),
        (["m.safetensors", "--output", "m.safetensors"], "expected a folder to write to, got 'm.safetensors'"),
        (["m.safetensors", "--root", "photos"], "built-in data lie in no folder; say what is in photos by --data"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["attack-tables", *args])
        error = capsys.readouterr().err
        assert stop.value.code == 1 and message in error and error.count("\n") == 1, error
