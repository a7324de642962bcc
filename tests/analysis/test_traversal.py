"""One walk with its pictures and proofs, as a function and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import lipsim
from lipsim.analysis.traversal import answer_level, confidence_level, names_a_metric, same_level, traverse
from lipsim.cli.main import main


class Colours(nn.Module):
    """Three classes: which colour has the largest mean."""

    image_size = 8

    def forward(self, x: Tensor) -> Tensor:
        return 4 * x.mean((2, 3))


def smooth(seed: int, size: int = 64) -> Tensor:
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=size, mode="bilinear")[0].clamp(0, 1)


@pytest.fixture(scope="module")
def metric() -> lipsim.PerceptualMetric:
    """One for all: the error of its features is searched for once."""
    return lipsim.load("quickstart")


def test_walk_of_a_metric_is_proved(metric: lipsim.PerceptualMetric) -> None:
    source, target = smooth(7), smooth(8)
    level = same_level(metric, source, 0.05)
    walk = traverse(level, source, target, steps=60, step_size=0.05, newton=True, depth=0)
    assert float(metric(walk.outcome[None], source[None])) <= 0.05
    assert len(walk.path) == len(walk.path_steps) == 8
    assert torch.equal(walk.path[0], source)
    assert torch.equal(walk.path[-1], walk.outcome)
    assert bool((level.values(walk.path) <= 0).all())
    torch.testing.assert_close(walk.line[[0, -1]], level.values(torch.stack([source, walk.outcome])))
    torch.testing.assert_close(walk.values, level.values(torch.einsum("mk,kchw->mchw", walk.weights, walk.triangle)))
    facts = walk.facts()
    assert facts["rmse"]["outcome"] < 0.6 * facts["rmse"]["source"]
    assert facts["rmse"]["outcome"] == pytest.approx(float((walk.outcome - target).square().mean().sqrt()))
    certified = facts["certified"]
    assert certified["segment_proved"]
    assert certified["segment_share"] == 1
    assert facts["line_stays"]
    lower, upper = certified["triangle_area"]
    assert 0 < lower < upper <= 1
    assert certified["approach_ratio"] >= 1
    assert certified["approach"] >= certified["approach_bound"] > 0
    assert facts["passes"]["forward"] <= 62
    assert "closest approach" in str(walk)


def test_walk_of_an_answer_stays_nearer_to_the_source(metric: lipsim.PerceptualMetric) -> None:
    source, target, than, second = (smooth(seed) for seed in range(1, 5))
    walk = traverse(
        answer_level(metric, source, than), source, than, second=second, steps=30, step_size=0.1, newton=True, depth=0
    )
    assert walk.corners == ("source", "outcome", "second outcome")
    nearer = metric(walk.outcome[None], source[None]) < metric(walk.outcome[None], than[None])
    assert bool(nearer)
    # To the third image itself: the bound is its certified radius.
    assert walk.approach is not None
    certificate = metric.certify(than[None], source[None], than[None])
    assert float(walk.approach.level_bound) == pytest.approx(float(certificate.radius), rel=1e-6)
    with pytest.raises(ValueError, match="at distance 0"):
        answer_level(metric, source, source)
    with pytest.raises(ValueError, match=r"threshold in \[0, 2\]"):
        same_level(metric, target, 3.0)


def test_walk_of_a_classifier_has_no_proof() -> None:
    source, target = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    source[0], target[1] = 0.8, 0.8
    level = confidence_level(Colours(), source, 0.3)
    walk = traverse(level, source, target, steps=200, step_size=0.05, newton=True, noise=0)
    # Confidence falls to what may be left, and the walk ends where it has.
    clean, least = (Colours()(source[None]).softmax(1)[0, 0], level.objective.least)  # type: ignore[attr-defined]
    assert float(least) == pytest.approx(float(clean) - 0.3)
    assert float(Colours()(walk.outcome[None]).softmax(1)[0, 0]) == pytest.approx(float(least), abs=1e-4)
    assert walk.facts()["certified"] is None
    with pytest.raises(ValueError, match="expected a drop below the confidence in the source"):
        confidence_level(Colours(), source, 0.99)
    with pytest.raises(ValueError, match=r"logits \(1, classes\), got shape"):
        confidence_level(nn.Identity(), source)


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["traverse", *(str(arg) for arg in args)])
    return int(stop.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("source", "target", "third")]
    for seed, path in enumerate(paths):
        Image.fromarray((smooth(seed, 32).permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return paths


def test_command_writes_pictures_and_facts(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "10", "--step-size", "1/10", "--depth", "0", "--output", tmp_path / "out"]
    assert run(*files[:2], *options, "--than", files[2], "--rule", "published", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["level"] == "nearer to the source than to the third image"
    assert facts["certified"]["triangle_area"][0] > 0
    names = ["curve.png", "strip.png", "triangle.png", "walk.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert load_file(tmp_path / "out" / "walk.safetensors")["path"].shape == (8, 3, 64, 64)


def test_command_refuses_in_one_line(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--drop", "0.1"], "--drop says nothing about the level set of a metric"),
        (["--threshold", "0.1", "--than", files[2]], "--threshold says nothing"),
        (["--model", "timm/resnet18", "--than", files[2]], "--than says nothing about the level set of a classifier"),
        (["--step-size", "2"], "expected a step_size in (0, 1]"),
        (["--model", "nobody"], "nobody"),
        (["--output", files[2]], "expected a folder to write to"),
        (["--output", files[2] / "deeper"], "third.png is a file"),
    ):
        assert run(*files[:2], *options) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1


def test_a_classifier_of_other_images_is_named() -> None:
    gray = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    with pytest.raises(ValueError, match=r"Sequential does not take images of shape \(1, 3, 8, 8\) \(.*channels"):
        confidence_level(gray, smooth(0, 8))


def test_names_of_metrics() -> None:
    names = ["quickstart", "runs/a:b/metric.safetensors", "timm/x", "torchvision/x", "efficientnet-lite0", "a.b:c"]
    assert [names_a_metric(name) for name in names] == [True, True, False, False, False, False]
