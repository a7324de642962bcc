"""``lipsim.train``: as the command line, with objects in place of options."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import nn

import lipsim
from lipsim.callbacks import CertifyRadii, ExportMetric
from lipsim.cli.stage import train as train_by_options
from lipsim.datamodules import BuiltinData
from lipsim.layers import OrthogonalLinear
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning, TeacherTuning

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
DATA = {"num_train": 16, "num_val": 8, "num_test": 8, "image_size": 16, "batch_size": 8}
pytestmark = pytest.mark.filterwarnings("error:Found .* in eval mode at the start of training")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _stage() -> FineTuning:
    torch.manual_seed(0)
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    return FineTuning(OrthogonalProjection(16, 4), optimizer=adam)


def _weight(metric: lipsim.PerceptualMetric) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in metric.parameters()])


def test_a_run_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    stage, folder = _stage(), Path("runs/x")
    start = _weight(stage.metric).clone()
    certify = CertifyRadii(eps=[0.1])
    metric = lipsim.train(stage, BuiltinData(**DATA), max_epochs=1, directory=folder, callbacks=[certify], **QUIET)
    assert not metric.training and not any(p.requires_grad for p in metric.parameters())
    assert 0 < metric.lipschitz <= 1 + 1e-5 and not torch.equal(_weight(metric), start)
    assert "Majority score in %" in capsys.readouterr().out and certify.results["eps"] == [0.1]
    exported = lipsim.load(folder / "metric.safetensors")
    assert torch.equal(_weight(exported), _weight(metric)) and exported.lipschitz == metric.lipschitz
    assert {path.name for path in folder.iterdir()} == {
        *("arguments.yaml", "checkpoints", "environment.json", "metric.safetensors", "metrics.csv"),
        *("progress.json", "report.html"),
    }
    record = yaml.safe_load((folder / "arguments.yaml").read_text())
    assert record["max_epochs"] == 1 and record["optimizer"]["init_args"] == {"lr": 0.01}
    assert record["stage"]["metric"]["init_args"]["encoder"]["init_args"] == {"image_size": 16, "out_features": 4}
    assert record["data"]["attributes"]["sizes"] == {"train": 16, "val": 8, "test": 8}

    # The stage can be trained on; what is returned is no part of it.
    last = folder / "checkpoints/last.ckpt"
    before = _weight(metric).clone()
    further = lipsim.train(stage, BuiltinData(**DATA), max_epochs=2, directory=folder, checkpoint=last, **QUIET)
    assert torch.load(last, weights_only=True)["epoch"] == 1 and not (folder / "previous").exists()
    assert torch.equal(_weight(metric), before) and not torch.equal(_weight(further), before)
    whole = lipsim.train(_stage(), BuiltinData(**DATA), max_epochs=2, directory="runs/whole", **QUIET)
    assert whole.lipschitz == pytest.approx(further.lipschitz, abs=1e-6)
    # Anew: the earlier run is kept.
    lipsim.train(stage, BuiltinData(**DATA), max_epochs=1, directory=folder, **QUIET)
    (kept,) = (folder / "previous").iterdir()
    assert {"arguments.yaml", "checkpoints", "metric.safetensors"} <= {path.name for path in kept.iterdir()}


def test_the_weights_are_those_of_the_command_line() -> None:
    model = {
        "class_path": "lipsim.training.FineTuning",
        "init_args": {
            "student": {
                "class_path": "lipsim.students.OrthogonalProjection",
                "init_args": {"image_size": 16, "out_features": 4},
            },
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        },
    }
    content = {
        "trainer": {**QUIET, "max_epochs": 2, "default_root_dir": "options"},
        "model": model,
        "data": {"class_path": "lipsim.datamodules.BuiltinData", "init_args": DATA},
    }
    Path("config.yaml").write_text(yaml.safe_dump(content))
    expected = _weight(train_by_options(["--config", "config.yaml"]).model.metric)
    L.seed_everything(0)  # as the command line does before it makes the stage
    stage = FineTuning(OrthogonalProjection(16, 4), optimizer=functools.partial(torch.optim.Adam, lr=0.01))
    metric = lipsim.train(stage, BuiltinData(**DATA), directory="objects", max_epochs=2, seed=None, **QUIET)
    assert torch.equal(_weight(metric), expected)


class _Own(nn.Module):
    """An encoder that no file can hold."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), OrthogonalLinear(768, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def lipschitz_bound(self) -> float:
        return 1.0


def test_an_encoder_that_no_file_can_hold(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        metric = lipsim.train(FineTuning(_Own()), BuiltinData(**DATA), max_epochs=1, directory="run", **QUIET)
    assert "checkpoints are all that is written of this metric: cannot export an encoder of class _Own" in caplog.text
    assert isinstance(metric.encoder, _Own) and not Path("run/metric.safetensors").exists()


def test_a_teacher_and_an_export_of_ones_own() -> None:
    vit = lipsim.teachers.SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    export = ExportMetric(Path("teacher.safetensors"))
    data = BuiltinData(**DATA)
    metric = lipsim.train(TeacherTuning(vit), data, max_epochs=1, directory="run", callbacks=[export], **QUIET)
    assert not metric.has_bound and [path.name for path in Path("run").glob("*.safetensors")] == ["teacher.safetensors"]


def test_what_cannot_be_meant_is_refused() -> None:
    data = BuiltinData(**DATA)
    for given, message in (
        ({"max_epoch": 2}, "there is no option max_epoch; did you mean max_epochs?"),
        ({"checkpoint": "nowhere.ckpt"}, "no checkpoint nowhere.ckpt"),
    ):
        with pytest.raises((lipsim.LipsimError, FileNotFoundError)) as error:
            lipsim.train(_stage(), data, **QUIET, **given)
        assert message in str(error.value)
    with pytest.raises(lipsim.LipsimError, match=r"expected a stage of lipsim\.training, got a OrthogonalProjection"):
        lipsim.train(OrthogonalProjection(16, 4), data, **QUIET)  # type: ignore[arg-type]
