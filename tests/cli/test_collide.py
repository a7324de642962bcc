"""`lipsim collide` on files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lipsim.analysis.models import load_model
from lipsim.cli import collide
from lipsim.cli.main import main
from lipsim.utils.errors import LipsimError


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "gray.png", tmp_path / "target.png"]
    Image.fromarray(rng.integers(60, 200, (40, 40), dtype=np.uint8)).save(paths[0])
    Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)).save(paths[1])
    return [str(path) for path in paths]


def test_a_whole_metric_collides(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["--model", "quickstart", "--target", files[1], "--layer", "output", "--steps", "12", "--json"]
    options += ["--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main(["collide", files[0], *options])
    assert stop.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["residual"] <= 1e-10 and facts["length"] > 1 and not facts["exact"] and 0 < facts["left"] < 1
    assert facts["distance"]["the image"]["after"] < 1e-12
    names = {"image", "target", "pattern", "collision", "difference", "picture"}
    assert {path.stem for path in output.glob("*.png")} == names
    tensors = load_file(output / "images.safetensors")
    encoder = load_model("quickstart").module.double()
    with torch.no_grad():
        torch.testing.assert_close(encoder(tensors["x_adv"]), encoder(tensors["x"]), rtol=0, atol=1e-8)


def _sees() -> torch.nn.Module:
    """Its first layer has no kernel; the one at 2 has one."""
    nn = torch.nn
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 48, 4, stride=4), nn.Tanh(), nn.Conv2d(48, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    model.image_size = 16
    return model


def _boxes() -> torch.nn.Module:
    """It finds fewer boxes in images of 8 bits."""

    class Detector(torch.nn.Module):
        image_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 6, 4, stride=4)

        def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            rounded = (x * 255 - (x * 255).round()).abs().sum() < 1e-3
            return [{"boxes": part.flatten(1)[: 2 if rounded else 3]} for part in self.stem(x)]

    torch.manual_seed(0)
    return Detector()


def test_another_number_of_boxes_is_no_number(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["collide", files[0], "--model", f"{__name__}:_boxes", "--layer", "stem", "--output", str(output)])
    assert stop.value.code == 0
    assert "with the image rounded to 8 bits no number (other shapes, or NaN)" in capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    facts = json.loads((output / "collision.json").read_text(), parse_constant=refuse)
    assert facts["largest_difference"]["output.0.boxes"] < 1e-8
    assert facts["largest_difference_of_8_bits"] == {"output.0.boxes": None}


def test_a_table_of_layers_is_of_the_collision_beside_it(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    options = ["collide", files[0], "--model", f"{__name__}:_sees", "--layer", "2", "--eps", "0.05", "--steps", "4"]
    options += ["--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main([*options, "--layer-table"])
    assert stop.value.code == 0
    facts = json.loads((output / "collision.json").read_text())
    assert 0 < facts["length"] <= 0.05 * (1 + 1e-9)
    largest = float(_sees()[0].weight.detach().flatten(1).norm(dim=1).max())
    assert 0 < float(facts["layers"][0]["float64"]) <= 0.05 * largest * 1.05  # two digits
    tables = {f"layers.{suffix}" for suffix in ("md", "tex", "csv")}
    assert tables <= {path.name for path in output.iterdir()}

    def fails(*_args: object, **_options: object) -> None:
        raise LipsimError("in float32: nothing was found")

    monkeypatch.setattr(collide, "layer_table", fails)
    (output / "images.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        main([*options, "--layer-table"])
    assert stop.value.code == 1 and "in float32: nothing was found" in capsys.readouterr().err
    left = {path.name for path in output.iterdir()}
    assert {"images.safetensors", "collision.json"} <= left and not tables & left
    (tmp_path / "own").mkdir()
    (tmp_path / "own/layers.md").write_text("of somebody")  # in a folder that no collision is in
    with pytest.raises(SystemExit) as stop:
        main([*options[:-1], str(tmp_path / "own")])
    assert stop.value.code == 0 and (tmp_path / "own/layers.md").read_text() == "of somebody"


def test_what_does_not_collide_is_one_line(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["collide", files[0], "--model", "torchvision/resnet18", "--image-size", "16"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "conv1 of torchvision/resnet18 has a trivial kernel; give --layer to look deeper" in error
    with pytest.raises(SystemExit):
        main(["collide", files[0], "--layer", "nowhere"])
    assert "there is no layer nowhere; among the layers are" in capsys.readouterr().err


def _tiny() -> torch.nn.Module:
    nn = torch.nn
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    model.image_size = 16
    return model


def _untouched() -> torch.nn.Module:
    model = _tiny()
    model[0] = torch.nn.Conv2d(3, 48, 4, stride=4)
    return torch.nn.Sequential(model[0], torch.nn.Flatten(), torch.nn.Linear(768, 3))


@pytest.mark.parametrize(("norm", "budget"), [("2", 2.0), ("inf", 0.1)])
def test_a_flipped_answer_survives_the_collision(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], norm: str, budget: float
) -> None:
    output = tmp_path / "out"
    options = ["--model", f"{__name__}:_tiny", "--attack", str(budget), "--norm", norm, "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main(["collide", files[0], *options])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "answer clean: " in printed and "flipped by the attack and stays flipped" in printed
    facts = json.loads((output / "collision.json").read_text())["attack"]
    answers = {when: classes[0][0] for when, classes in facts["answers"].items()}
    assert answers["clean"] != answers["attacked"] == answers["with the collision"]
    assert facts["length_of_collision"] > 0.1 and facts["relative"] < 1e-6
    assert (facts["length"] if norm == "2" else facts["largest_change"]) <= budget * (1 + 1e-9)
    tensors = load_file(output / "images.safetensors")
    assert (tensors["x_adv"] - tensors["x"]).norm() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "quickstart"], "quickstart is a metric"),
        (["--model", f"{__name__}:_untouched", "--image-size", "16"], "has a trivial kernel"),
        (["--model", f"{__name__}:_tiny", "--layer", "output"], "leave out --layer"),
        (["--attack", "8", "--norm", "inf"], "expected ℓ∞ budgets of pixels in [0, 1], such as 4/255, got 8"),
    ],
)
def test_what_no_attack_can_use_is_one_line(
    files: list[str], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["collide", files[0], "--attack", "1", *options])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
