"""What AttackRobustness writes, for every target and norm."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import lipsim
from lipsim import PerceptualMetric
from lipsim.attacks.projections import sample_norm
from lipsim.callbacks import AttackRobustness, CertifyRadii, NullSpaceRobustness
from lipsim.callbacks.attack_robustness import verdicts
from lipsim.cli.evaluate import evaluate
from lipsim.data import BuiltinTriplets, Triplet, collate_triplets
from lipsim.datamodules import BuiltinData
from lipsim.evaluation.scores import agrees
from lipsim.evaluation.side_by_side import Settings
from lipsim.metric import save
from lipsim.results import read_results
from lipsim.students import OrthogonalProjection
from lipsim.teachers import SmallViT

COUNT = 10


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    save(PerceptualMetric(OrthogonalProjection(16, 8), 16), "metric.safetensors")
    vit = SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    save(PerceptualMetric(vit, 16, anchor=0.0, lipschitz=math.inf), "teacher.safetensors")


def _evaluate(**options: Any) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The section of results.json and the rows of attacks.csv."""
    given = {"steps": 10, "others": {"teacher": "teacher.safetensors"}, **options}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lipsim.callbacks.AttackRobustness", "init_args": given}],
        },
        "data": {
            "class_path": "lipsim.datamodules.BuiltinData",
            "init_args": {"num_test": COUNT, "image_size": 16, "batch_size": 4},
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    evaluate(["--config", "config.yaml", "--checkpoint", "metric.safetensors", "--trainer.default_root_dir", "out"])
    with open("out/attacks.csv", newline="") as file:
        rows = [
            {key: float({"False": 0, "True": 1}.get(value, value)) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    return read_results(Path("out/results.json"))["attacked"], rows


def test_scores_follow_from_the_rows() -> None:
    section, rows = _evaluate(eps=[0.1, 0.3, 1.0])
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert section["suite"] and section["attacks"] == ["apgd", "minimal_norm", "square"]
    found = section["sets"]["builtin"]
    assert found["num_triplets"] == COUNT and found["violations"] == 0
    metrics = found["metrics"]
    triplets = BuiltinTriplets("test", COUNT, image_size=16)
    reference, left, right = (t.float() / 255 for t in triplets.images.unbind(1))
    for key in ("metric", "teacher"):
        metric = lipsim.load(f"{key}.safetensors")
        margin = metric.margin(*(metric.embed(t) for t in (reference, left, right)))
        agree = agrees(margin, triplets.right_vote)
        broken_at = torch.tensor([row[f"{key}/broken_at"] for row in rows])
        assert ((broken_at > 0) == agree).all()
        natural = metrics[key]["natural"]
        assert natural == pytest.approx(float(agree.double().mean()))
        scores = [natural, *metrics[key]["attacked"].values()]
        assert scores == sorted(scores, reverse=True) and list(metrics[key]["attacked"]) == ["0.1", "0.3", "1"]
        for label, eps in (("0.1", 0.1), ("0.3", 0.3), ("1", 1.0)):
            assert metrics[key]["attacked"][label] == pytest.approx(float((broken_at > eps).double().mean()))
            after = [metrics[key]["after"][attack][label] for attack in section["attacks"]]
            assert after == sorted(after, reverse=True) and after[-1] == metrics[key]["attacked"][label]
    for row in rows:
        if 0 < row["metric/broken_at"] < math.inf:
            assert row["radius"] <= row["metric/length"] <= row["metric/broken_at"] + 1e-6
            assert min(row[f"metric/{attack}"] for attack in section["attacks"]) == row["metric/broken_at"]


@pytest.mark.parametrize(
    ("target", "norm", "eps"), [("all", 2, [0.5]), ("left", "inf", [0.05]), ("reference", 0, [1, 8]), ("right", 2, [1])]
)
def test_images_that_are_saved_are_what_the_rows_say(target: str, norm: Any, eps: list[float]) -> None:
    section, rows = _evaluate(target=target, norm=norm, eps=eps, num_examples=2, queries=60)
    assert section["target"] == target and section["norm"] == norm
    assert section["sets"]["builtin"]["violations"] == 0
    assert Path("out/plots/attacked-builtin.png").stat().st_size > 5000
    images = load_file("out/adversarial/builtin.safetensors")
    assert images["index"].tolist() == [0, 1]
    moving = ["reference", "left", "right"] if target == "all" else [target]
    for key in ("metric", "teacher"):
        metric = lipsim.load(f"{key}.safetensors")
        triplet = {name: images.get(f"{key}/{name}", images[name]) for name in ("reference", "left", "right")}
        margin = metric.margin(*(metric.embed(t) for t in triplet.values()))
        for i, row in enumerate(rows[:2]):
            delta = torch.cat([images[f"{key}/{name}"][i : i + 1] - images[name][i : i + 1] for name in moving], 1)
            assert float(sample_norm(delta, norm, len(moving))) <= eps[-1] + 1e-6
            flipped = float(margin[i]) * row[f"{key}/margin"] < 0
            assert flipped == (0 < row[f"{key}/broken_at"] < math.inf)
            if flipped:
                assert row[f"{key}/length"] == pytest.approx(float(sample_norm(delta, 2, len(moving))), rel=1e-5)
    for name in moving:
        with Image.open(f"out/adversarial/builtin/000000-teacher-{name}.png") as image:
            assert image.size == (16, 16)


def test_bad_settings_are_refused_at_once() -> None:
    for options, message in (
        ({"eps": []}, "at least one budget"),
        ({"eps": [-1.0]}, "budget eps ≥ 0"),
        ({"eps": [float("nan")]}, "budget eps ≥ 0"),
        ({"eps": ["1"]}, "budget eps ≥ 0"),
        ({"eps": [1.0, 0.5]}, "ascending order"),
        ({"norm": 0, "eps": [0.5]}, "whole number of pixels"),
        ({"attacks": ["nothing"]}, "expected different attacks"),
        ({"target": "both"}, "expected target"),
        ({"steps": 0}, "steps ≥ 1, got 0"),
        ({"restarts": 0}, "restarts ≥ 1, got 0"),
        ({"queries": 0}, "queries ≥ 1, got 0"),
        ({"num_examples": -1}, "num_examples ≥ 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackRobustness(**options)
    assert AttackRobustness(eps=[36 / 255, 1.0]).eps == [36 / 255, 1.0]
    for name in ("steps", "queries", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} ≥ 1, got 0"):
            Settings(**{name: 0})


def test_radii_cover_rounding_without_certify_radii() -> None:
    """Else the smallest change that flips an answer, found in float32, may be within a radius that is too large."""
    metric, found = lipsim.load("metric.safetensors"), []
    for before in ([], [CertifyRadii()]):
        attack = AttackRobustness(steps=1, queries=1, eps=[0.1])
        data = BuiltinData(num_test=COUNT, image_size=16, batch_size=4)
        quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        lipsim.evaluate(metric, data, callbacks=[*before, attack], directory="radii", **quiet)
        with open("radii/attacks.csv", newline="") as file:
            table = list(csv.DictReader(file))
        assert "drawn" not in table[0]
        found.append([float(row["radius"]) for row in table])
    assert found[0] == found[1]
    batch = collate_triplets([BuiltinTriplets("test", COUNT, image_size=16)[i] for i in range(COUNT)])
    bare = metric.certify(batch.reference, batch.left, batch.right).radius.tolist()
    assert any(ours < radius for ours, radius in zip(found[0], bare, strict=True))


def test_rows_of_another_process_have_no_pictures() -> None:
    """A run that is continued on fewer processes draws what none of the processes before has drawn."""
    for kind in (AttackRobustness, NullSpaceRobustness):
        callback = kind()
        for drawn in (0, 1):
            column = torch.tensor([drawn, 0])
            callback.restore("set", torch.tensor([4, 5]), torch.tensor([0, 1]), {"drawn": column, "searched": column})
            assert ("set" in callback.pictured) == bool(drawn)


class Rounded(torch.nn.Module):
    """Pixels as features, in steps: no gradient anywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) * 8).round() / 8


def test_triplets_without_a_gradient_are_counted_apart(triplets: Triplet) -> None:
    callback = AttackRobustness(eps=[0.01], steps=3)
    batch = triplets
    found = {}
    for name, encoder in (("flat", Rounded()), ("smooth", OrthogonalProjection(16, 8))):
        metric = PerceptualMetric(encoder, 16, lipschitz=1.0).eval().requires_grad_(False)
        margin = metric.margin(*batch.embed(metric.embed))
        found[name] = callback.attack(metric, batch, margin)
        right = agrees(margin, batch.right_vote)
        assert right.any() and not right.all()
        assert torch.equal(found[name].no_gradient, right if name == "flat" else torch.zeros_like(right))
        columns = callback._columns(found[name], batch)
        assert torch.equal(columns["no_gradient"], found[name].no_gradient)
    held = found["flat"].no_gradient & torch.isinf(found["flat"].broken_at)
    assert [text == "no gradient to attack with" for text in verdicts(found["flat"])] == held.tolist()
    assert "no gradient to attack with" not in verdicts(found["smooth"])
