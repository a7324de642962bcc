"""`lipsim attack` on files, and the functions behind it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import lipsim
from lipsim import PerceptualMetric
from lipsim.attacks.images import attack_pair, attack_triplet
from lipsim.attacks.projections import sample_norm
from lipsim.cli.main import main
from lipsim.metric import save
from lipsim.metric.distances import pixel_l2
from lipsim.students import OrthogonalProjection


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(PerceptualMetric(OrthogonalProjection(16, 24), 16), "m.safetensors")
    for name in "abc":
        save_image(torch.rand(3, 20, 24), f"{name}.png")


def _attack(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["attack", *args, "--metric", "m.safetensors", "--steps", "20"])
    return stop.value.code  # type: ignore[return-value]


def _margin(images: dict[str, Tensor], suffix: str) -> float:
    metric = lipsim.load("m.safetensors")
    triplet = [images.get(name + suffix, images[name])[None] for name in ("reference", "left", "right")]
    return float(metric.margin(*(metric.embed(image) for image in triplet)))


@pytest.mark.parametrize("target", ["reference", "right", "all"])
def test_a_triplet_of_files(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", target, "--eps", "1/255", "1/2", "2", "8", "--output", "out", "--json"]
    assert _attack("a.png", "b.png", "c.png", *options) == 0
    facts = json.loads(capsys.readouterr().out)
    images = load_file("out/images.safetensors")
    assert _margin(images, "") * _margin(images, "-attacked") < 0
    moving = ["reference", "left", "right"] if target == "all" else [target]
    lengths = [float(sample_norm((images[f"{n}-attacked"] - images[n])[None])) for n in moving]
    assert facts["length"] == pytest.approx(max(lengths)) and max(lengths) <= facts["eps"] + 1e-6
    before, after = facts["before"], facts["after"]
    nearer = [d["reference, left"] < d["reference, right"] for d in (before, after)]
    assert nearer[0] != nearer[1]
    for name in moving:
        with Image.open(f"out/{name}-attacked.png") as image:
            found = pil_to_tensor(image).float() / 255
        torch.testing.assert_close(found, images[f"{name}-attacked"], rtol=0, atol=0.51 / 255)
    assert Path("out/picture.png").stat().st_size > 5000


def test_a_pair_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for goal in ("different", "alike"):
        assert _attack("a.png", "b.png", "--goal", goal, "--norm", "inf", "--eps", "8/255", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        found[goal] = facts["after"]["image, other"] - facts["before"]["image, other"]
        images = load_file("attacked/images.safetensors")
        assert sample_norm((images["image-attacked"] - images["image"])[None], "inf") <= 8 / 255 + 1e-6
        assert "other-attacked" not in images
    assert found["alike"] < -0.01 and found["different"] > 0.01
    assert _attack("a.png", "a.png") == 0
    output = capsys.readouterr().out
    assert "d(image, other)" in output and "changed within ε = 1 in ℓ2" in output and "picture.png" in output


def test_what_holds_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert _attack("a.png", "b.png", "c.png", "--eps", "1e-6") == 0
    assert "holds within every budget that was tried" in capsys.readouterr().out


def test_a_tie_is_no_answer_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert _attack("a.png", "b.png", "b.png", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tie"] and facts["length"] == 0 and facts["eps"] is None and not facts["no_gradient"]
    assert _attack("a.png", "b.png", "b.png") == 0
    output = capsys.readouterr().out
    assert "a tie" in output and "holds" not in output


def _stairs(x: Tensor, y: Tensor) -> Tensor:
    return (8 * pixel_l2(x, y)).floor() / 8


def test_a_metric_without_gradients_is_not_called_robust() -> None:
    x, y, z = torch.rand(3, 3, 12, 12).unbind(0)
    near = x + 0.5 * (y - x)
    found = attack_triplet(_stairs, x, near, z, eps=[0.01], steps=5)
    assert math.isinf(found.eps) and found.no_gradient and not found.tie
    assert "no gradient to attack with" in found.outcome and "holds" not in found.outcome
    pair = attack_pair(_stairs, x, y, eps=0.5, steps=5)
    assert pair.no_gradient and "says nothing" in pair.outcome
    assert not attack_pair(pixel_l2, x, y, eps=0.5, steps=5).no_gradient
    with pytest.raises(ValueError, match="not numbers"):
        attack_triplet(lambda x, y: pixel_l2(x, y) * math.nan, x, y, z)
    with pytest.raises(ValueError, match="expected norm 2"):
        attack_triplet(pixel_l2, x, y, z, norm=3)  # type: ignore[arg-type]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["a.png"], "two or three images, got 1"),
        (["a.png", "missing.png"], "no image file missing.png"),
        (["a.png", "b.png", "--eps", "1/0"], "a number or a fraction such as 8/255"),
        (["a.png", "b.png", "--eps", "-1"], "finite budget"),
        (["a.png", "b.png", "--norm", "inf", "--eps", "4"], "ℓ∞ budgets of pixels in [0, 1], such as 4/255, got 4"),
        (["a.png", "b.png", "--output", "a.png"], "expected a folder to write to, got 'a.png', and a.png is a file"),
        (["a.png", "b.png", "--eps", "1", "2"], "within one budget"),
        (["a.png", "b.png", "--target", "left"], "--target is for a triplet"),
        (["a.png", "b.png", "c.png", "--goal", "alike"], "--goal is for a pair"),
        (["a.png", "b.png", "c.png", "--attacks", "magic"], "expected different attacks among"),
    ):
        assert _attack(*args) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_any_distance_in_python() -> None:
    x, y, z = torch.rand(3, 3, 12, 12).unbind(0)
    found = attack_triplet(pixel_l2, x, y, z, eps=[0.01, 6.0], steps=40)
    # Points equally far from both candidates form the plane that bisects them.
    gap = abs(float(pixel_l2(x[None], y[None]) ** 2 - pixel_l2(x[None], z[None]) ** 2))
    exact = gap / (2 * float((y - z).norm()))
    assert math.isfinite(found.eps) and found.length >= exact * (1 - 1e-4)
    pair = attack_pair(pixel_l2, x, y, goal="alike", eps=0.5, steps=50)
    assert pair.after["image, other"] == pytest.approx(pair.before["image, other"] - 0.5, rel=1e-2)
    with pytest.raises(ValueError, match="goal 'different' or 'alike'"):
        attack_pair(pixel_l2, x, y, goal="odd")  # type: ignore[arg-type]


def test_pictures_of_an_earlier_attack_do_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine.png").write_bytes(b"of somebody else")
    written = []
    for images in (("a.png", "b.png", "c.png"), ("a.png", "b.png"), ("c.png", "a.png")):
        assert _attack(*images, "--eps", "8", "--output", "out") == 0
        written.append({path.name for path in Path("out").glob("*.png")} - {"mine.png", "picture.png"})
        assert written[-1] == {f"{name}.png" for name in load_file("out/images.safetensors")}
    assert "reference.png" in written[0] and written[1] == written[2] == {
        "image.png",
        "image-attacked.png",
        "other.png",
    }
    assert Path("out/mine.png").is_file()
    # A file of tensors that is anybody's names nothing that is removed.
    Path("photos").mkdir()
    Path("photos/mine.png").write_bytes(b"of somebody else")
    save_file({"../photos/*": torch.zeros(1), "mine": torch.zeros(1)}, "out/images.safetensors")
    assert _attack("a.png", "b.png", "--eps", "8", "--output", "out") == 0
    assert Path("photos/mine.png").is_file() and Path("out/mine.png").is_file()


@pytest.mark.parametrize("nearer", ["left", "right"])
def test_a_tie_after_rounding_is_no_answer_turned_around(nearer: str) -> None:
    level = torch.full((3, 2, 2), 0.5)
    candidates = [level + 0.1, level - 0.11]
    if nearer == "right":
        candidates.reverse()
    found = attack_triplet(pixel_l2, level, *candidates, eps=[0.1], steps=20)
    assert math.isfinite(found.eps) and "8 bits" not in found.outcome
    tied = dataclasses.replace(found, rounded=dict.fromkeys(found.rounded, 0.2))
    assert "rounding to 8 bits undoes it" in tied.outcome
