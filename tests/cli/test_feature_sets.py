"""`lipsim feature-sets`: sets are made and trained on, and what is missing is said in a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipsim import PerceptualMetric
from lipsim.cli.main import main
from lipsim.metric import save
from lipsim.students import OrthogonalProjection


@pytest.fixture
def metric(tmp_path: Path) -> Path:
    """A metric of 16 pixels; beside it, images in two classes, and held-out ones."""
    rng = np.random.default_rng(0)
    for part in ("images", "held-out"):
        for i in range(8):
            file = tmp_path / part / ("dark", "light")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8) + np.uint8(150 * (i % 2))
            Image.fromarray(noise).save(file)
    return save(PerceptualMetric(OrthogonalProjection(16, 24), 16), tmp_path / "metric.safetensors")


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["feature-sets", *map(str, args)])
    return stop.value.code  # type: ignore[return-value]


def test_sets_are_made_and_trained_on(metric: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = metric.parent
    common = (folder / "images", "--output", folder / "sets")
    making = ("--model", metric, "--kind", "robust", "--accelerator", "cpu", "--steps", "5")
    assert run(*common, *making) == 0
    assert "has 8 images, 8 of them made now; relative distance of features" in capsys.readouterr().out
    assert run(*common, *making, "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["written"] == 0 and made["means"]["after"] < made["means"]["before"]
    training = ("--held-out", folder / "held-out", "--architecture", "mlp", "--width", "2", "--epochs", "2")
    assert run(*common, *training, "--seeds", "2", "--attack-steps", "2", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert [(score["name"], score["images"], len(score["clean"])) for score in scores] == [
        ("originals", 8, 2),
        ("robust", 8, 2),
    ]
    assert run(*common, *training, "--seeds", "1", "--attack-steps", "1") == 0
    assert "trained on" in capsys.readouterr().out
    assert "| robust | 8 |" in (folder / "sets/scores.md").read_text(encoding="utf-8")
    for images, held_out, message in (
        ("images", "images", "--held-out"),
        ("images", "images/dark", "is of the same images"),
        ("held-out", "images", "the sets robust in"),
    ):
        assert run(folder / images, "--output", folder / "sets", "--held-out", folder / held_out) == 1
        assert message in capsys.readouterr().err
    next((folder / "sets/robust/dark").iterdir()).unlink()
    assert run(*common, *training) == 1
    assert "has 7 of 8 images; give the command that makes it again" in capsys.readouterr().err


def test_bad_input_is_one_line(metric: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = metric.parent / "images"
    output = ("--output", metric.parent / "sets", "--accelerator", "cpu")
    for args, message in (
        ((images, *output), "expected either --kind and --model, to make sets, or --held-out"),
        ((images, *output, "--kind", "robust"), "expected both --kind and --model"),
        ((images, *output[:2], "--held-out", images), "no feature sets in"),
        ((images, *output[:2], "--held-out", images, "--eps", "3", "--steps", "7"), "--eps, --steps have no part in"),
        (
            (images, *output, "--held-out", images, "--image-size", "8", "--batch-size", "2"),
            "--image-size, --batch-size, --accelerator have no part in train",
        ),
        ((images, *output, "--kind", "robust", "--model", metric, "--epochs", "3"), "--epochs has no part in making"),
        ((images, *output, "--kind", "random", "--model", metric), "has 24 logits"),
        ((images, *output, "--kind", "robust", "random", "--steps", "1", "--model", metric), "has 24 logits"),
        ((images, "--output", metric, "--kind", "robust", "--model", metric), "expected a folder to write to"),
        ((images, *output, "--kind", "random", "--model", metric, "--layer", "1"), "--layer has no part"),
        ((images, *output, "--kind", "robust", "--model", metric, "--eps", "1"), "--eps has no part in sets of the"),
        ((images, *output[:2], "--held-out", images, "--step-size", "0"), "--step-size has no part in train"),
        (
            (images, *output, "--kind", "random", "--model", metric, "--start", "noise", "--shorten"),
            "--start, --shorten have no part in sets of the kind random",
        ),
        ((metric.parent / "no", *output, "--kind", "robust", "--model", metric), "there is no such folder"),
    ):
        assert run(*args) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (metric.parent / "sets").exists()  # no part of what cannot be done as a whole
