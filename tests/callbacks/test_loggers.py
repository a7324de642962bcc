"""Where a run logs: its CSV file, and TensorBoard and W&B beside it."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger

import lipsim
from lipsim.callbacks import loggers
from lipsim.callbacks.loggers import RunLog, run_loggers
from lipsim.callbacks.run_folder import set_aside
from lipsim.cli.stage import StageParser
from lipsim.datamodules import BuiltinData
from lipsim.results.training_log import read_log
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.utils.errors import LipsimError

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def _names(given: list[Logger] | bool) -> list[str]:
    assert isinstance(given, list)
    return [type(logger).__name__ for logger in given]


def test_the_csv_log_is_always_there_unless_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _names(run_loggers(None, tmp_path)) == _names(run_loggers(True, tmp_path)) == ["RunLog"]
    assert run_loggers(False, tmp_path) is False and run_loggers([], tmp_path) is False
    elsewhere, own = CSVLogger(tmp_path / "logs"), CSVLogger(tmp_path, name="", version="")
    assert run_loggers(elsewhere, tmp_path)[1:] == [elsewhere]  # type: ignore[index]
    assert run_loggers([own], tmp_path) == [own]  # which is the file already
    with pytest.raises(LipsimError, match="expected tensorboard, wandb or a Lightning logger, got 'tensorbord'"):
        run_loggers("tensorbord", tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for trial in (False, True):
        with pytest.raises(LipsimError, match=r"wandb needs its package; pip install 'lipsim\[wandb\]'"):
            run_loggers(["wandb"], tmp_path, trial=trial)
    assert not any(tmp_path.iterdir())


def test_the_log_is_whole_whenever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    for step in range(3):
        log.log_metrics({"train/lr": 0.1}, step)
        log.log_metrics({"train/loss": float(step)}, step)  # of one step, and so in one row
        log.save()
        assert [row["train/loss"] for row in read_log(tmp_path)] == list(range(step + 1))
    before = (tmp_path / "metrics.csv").read_bytes()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    # A new column rewrites the file: interrupted there, it is what it was.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        log.log_metrics({"val/a/majority_score": 0.5}, 2)
        with pytest.raises(KeyboardInterrupt):
            log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before
    log.save()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and rows[-1]["val/a/majority_score"] == "0.5" and rows[-1]["train/loss"] == ""
    # The same again is no part of the row before, and a run that begins anew keeps the file under a number.
    log.log_metrics({"train/lr": 0.1}, 3)
    log.log_metrics({"train/lr": 0.2}, 3)
    log.save()
    assert [row["train/lr"] for row in read_log(tmp_path)[-2:]] == [0.1, 0.2]
    run_loggers(None, tmp_path)
    run_loggers(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics-1.csv"]


def test_folders_of_loggers_stay_while_they_are_written_to(tmp_path: Path) -> None:
    for name in ("tensorboard", "tensorboard-1", "wandb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events").touch()
    kept = set_aside(tmp_path, in_use={(tmp_path / "tensorboard").absolute()})
    assert kept is not None and {path.name for path in kept.iterdir()} == {"tensorboard-1", "wandb"}
    assert (tmp_path / "tensorboard" / "events").is_file()


def test_the_command_line_takes_names_and_loggers() -> None:
    parser = StageParser()
    parser.add_class_arguments(L.Trainer, "trainer")
    for text, expected in (
        *(("wandb", "wandb"), ("[tensorboard, wandb]", ["tensorboard", "wandb"]), ("false", False), ("null", None)),
        *(("true", True),),
    ):
        assert parser.parse_args([f"--trainer.logger={text}"]).trainer.logger == expected
    found = parser.parse_args(["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"]).trainer.logger
    assert found.class_path == "lightning.pytorch.loggers.CSVLogger" and found.init_args.save_dir == "x"


def _train(folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    data = BuiltinData(num_train=16, num_val=8, num_test=8, image_size=16, batch_size=8)
    stage = FineTuning(OrthogonalProjection(16, 4))
    lipsim.train(stage, data, directory=folder, log_every_n_steps=1, **{"max_epochs": 1, **QUIET, **options})


@pytest.mark.slow  # to import it takes seconds
def test_tensorboard_by_one_word(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(folder: Path) -> list[int]:
        events = EventAccumulator(str(folder))
        events.Reload()
        return [event.step for event in events.Scalars("train/loss")]

    folder = tmp_path / "run"
    _train(folder, logger="tensorboard")
    assert steps(folder / "tensorboard") == [0, 1] and len(read_log(folder)) >= 2
    described = yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text())
    assert described["max_epochs"] == 1 and described["logger"] == "tensorboard"
    _train(folder, logger="tensorboard", checkpoint="last", max_epochs=2)
    assert steps(folder / "tensorboard") == [0, 1, 2, 3]  # continued
    _train(folder, logger="tensorboard")
    (kept,) = (folder / "previous").iterdir()
    assert steps(folder / "tensorboard") == [0, 1] and steps(kept / "tensorboard-1") == [0, 1, 2, 3]


@pytest.mark.slow  # it starts a process
def test_wandb_by_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    _train(folder, logger="wandb")
    first = wandb.run.id
    assert wandb.run.name == "run" and wandb.run.project == "lipsim" and wandb.run.config["max_epochs"] == 1
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1 and len(read_log(folder)) >= 2
    _train(folder, logger="wandb", checkpoint="last", max_epochs=2)
    assert wandb.run.id == first  # continued
    _train(folder, logger="wandb")
    assert wandb.run.id != first  # anew, and what there was is kept
    assert len(list(folder.glob("previous/*/wandb-1/offline-run-*"))) == 2
    wandb.finish()


def test_a_wandb_run_that_continues_keeps_its_id(tmp_path: Path) -> None:
    assert loggers._wandb_id(tmp_path) is None
    for name in ("offline-run-20260102_000000-second", "run-20260101_000000-first", "run-20251231_000000-third"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest-run").symlink_to("run-20260101_000000-first")
    assert loggers._wandb_id(tmp_path) == "second"
