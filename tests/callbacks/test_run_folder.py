"""A folder holds one run: what a second one, a trial, a move and a test do with the files of the first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lipsim
from lipsim import callbacks
from lipsim.callbacks.run_folder import continues, set_aside
from lipsim.cli.train import main

LINEAR = Path(__file__).parents[2] / "configs" / "quickstart" / "linear.yaml"
TINY = [
    *("--trainer.accelerator=cpu", "--data.num_train=32", "--data.num_val=16", "--data.num_test=16"),
    *("--model.student.out_features=4", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"),
    "--trainer.log_every_n_steps=1",
]
ROOT = Path("runs/quickstart/linear")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _run(*options: str) -> None:
    given = ("fit", *options) if options[:1] not in (("fit",), ("test",)) else options
    main([given[0], "--config", str(LINEAR), *TINY, *given[1:]])


def _files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def _weight(file: Path) -> Tensor:
    return torch.load(file, weights_only=True)["state_dict"]["metric.encoder.2.weight"]


def _exported(file: Path) -> Tensor:
    return lipsim.load(file).encoder[2].weight


def test_a_second_run_sets_the_first_aside(caplog: pytest.LogCaptureFixture) -> None:
    _run()
    assert _files(ROOT) == {
        *("config.yaml", "environment.json", "metrics.csv", "linear.safetensors", "progress.json", "report.html"),
        *("checkpoints/last.ckpt", "checkpoints/epoch=0-step=1.ckpt"),
    }
    (ROOT / "notes.txt").write_text("mine")
    first = _weight(ROOT / "checkpoints/last.ckpt")
    with caplog.at_level("INFO"):
        _run("--seed_everything=1")
    second = _weight(ROOT / "checkpoints/last.ckpt")
    assert not torch.equal(first, second)
    (kept,) = (ROOT / "previous").iterdir()
    assert f"{ROOT} had an earlier run, which is in {kept} now" in caplog.text
    assert torch.equal(_weight(kept / "checkpoints/last.ckpt"), first)
    assert torch.equal(_exported(kept / "linear.safetensors"), first)
    assert torch.equal(_exported(ROOT / "linear.safetensors"), second)
    assert (kept / "config.yaml").is_file() and "seed_everything: 1" in (ROOT / "config.yaml").read_text()
    assert (kept / "metrics-1.csv").is_file() and (ROOT / "notes.txt").is_file()
    assert sorted(p.name for p in (ROOT / "checkpoints").iterdir()) == ["epoch=0-step=1.ckpt", "last.ckpt"]

    # A test of the first run says that the exported metric is of the second, and leaves it alone.
    caplog.clear()
    with caplog.at_level("INFO"):
        _run("test", f"--ckpt_path={kept}/checkpoints/last.ckpt")
    assert torch.equal(_exported(ROOT / "linear.safetensors"), second)
    assert "linear.safetensors holds other weights than those tested, and stays as it is" in caplog.text
    # One of the second adds the error of its features.
    assert lipsim.load(ROOT / "linear.safetensors").declared_feature_error == 0
    config = (ROOT / "config.yaml").read_text()
    _run("test", f"--ckpt_path={ROOT}/checkpoints/last.ckpt")
    assert lipsim.load(ROOT / "linear.safetensors").declared_feature_error > 0
    assert torch.equal(_exported(ROOT / "linear.safetensors"), second)
    assert (ROOT / "config.yaml").read_text() == config and (ROOT / "config-test.yaml").is_file()


def test_a_trial_changes_nothing() -> None:
    _run("--trainer.fast_dev_run=true")
    assert not ROOT.exists()
    _run()
    before = {name: (ROOT / name).read_bytes() for name in _files(ROOT)}
    for stage in ("fit", "test"):
        _run(stage, "--trainer.fast_dev_run=true")
    assert {name: (ROOT / name).read_bytes() for name in _files(ROOT)} == before


@pytest.mark.filterwarnings("error:The dirpath has changed")
def test_a_moved_run_goes_on_in_its_new_place() -> None:
    _run()
    moved = Path("elsewhere/run")
    moved.parent.mkdir()
    shutil.move(ROOT, moved)
    last = moved / "checkpoints" / "last.ckpt"
    for epochs in (2, 3):
        _run(f"--trainer.default_root_dir={moved}", f"--trainer.max_epochs={epochs}", f"--ckpt_path={last}")
        assert torch.load(last, weights_only=True)["epoch"] == epochs - 1
        names = sorted(path.name for path in last.parent.iterdir())
        assert names == [f"epoch={epochs - 1}-step={epochs}.ckpt", "last.ckpt"]
        assert torch.equal(_exported(moved / "linear.safetensors"), _weight(last))
    assert not ROOT.exists() and not (moved / "previous").exists()


def test_another_folder_takes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    _run("--trainer.default_root_dir=~/run")
    _run("test", "--trainer.default_root_dir=~/run", "--ckpt_path=~/run/checkpoints/last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    expected = {"linear.safetensors", "config.yaml", "results.json", "radii.csv", "checkpoints/last.ckpt"}
    assert expected <= _files(tmp_path / "home/run")


def test_which_runs_continue(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "checkpoints").mkdir(parents=True)
    assert continues(root, root / "checkpoints" / "last.ckpt")
    assert continues(root, "last") and not continues(root, None) and not continues(root, tmp_path / "other/last.ckpt")
    assert not continues(root, root / "previous/2026-01-01_00-00-00/checkpoints/last.ckpt")
    (root / "hpc_ckpt_1.ckpt").touch()
    assert continues(root, None)


def test_setting_aside_keeps_every_run(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()  # another stage
    assert set_aside(tmp_path) is None and not (tmp_path / "previous").exists()
    for number in range(3):
        (tmp_path / "config.yaml").write_text(str(number))
        assert set_aside(tmp_path) is not None
    kept = sorted((tmp_path / "previous").glob("*/config.yaml"))
    assert {file.read_text() for file in kept} == {"0", "1", "2"} and (tmp_path / "teacher").is_dir()


def test_every_file_that_a_callback_writes_is_set_aside(tmp_path: Path) -> None:
    writers = [found for name in vars(callbacks) if isinstance(found := getattr(callbacks, name), type)]
    names = {
        pattern.replace("*", "x") for one in writers for pattern in getattr(one, "files", ()) if "/" not in pattern
    }
    assert {"radii.csv", "attacks.csv", "retrieval.csv", "smoothed.csv", "summed.csv"} <= names
    for name in names:
        (tmp_path / name).touch()
    aside = set_aside(tmp_path)
    assert aside is not None and {path.name for path in aside.iterdir()} == names
