"""The page of a run while it trains, when it ends, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lipsim
from lipsim.callbacks import CertifyRadii, run_report
from lipsim.callbacks.run_report import RunReport
from lipsim.datamodules import BuiltinData
from lipsim.results.training_log import read_log
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning

OPTIONS: dict[str, Any] = {
    **{"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1},
    "num_sanity_val_steps": 0,
}


class Breaks(Callback):
    """Notes what the run folder says, and raises at a step."""

    def __init__(self, step: int = -1, error: BaseException | None = None) -> None:
        self.step, self.error = step, error
        self.seen: list[tuple[dict[str, Any], str]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        root = Path(trainer.default_root_dir)
        self.seen.append((json.loads((root / "progress.json").read_text()), (root / "report.html").read_text()))
        if trainer.global_step == self.step and self.error is not None:
            raise self.error


def _train(folder: Path, *callbacks: Callback, **options: Any) -> None:
    torch.manual_seed(0)
    data = BuiltinData(num_train=24, num_val=8, num_test=8, image_size=16, batch_size=8)
    given = {"max_epochs": 2, **OPTIONS, **options}
    lipsim.train(FineTuning(OrthogonalProjection(16, 4)), data, directory=folder, callbacks=callbacks, **given)


def _status(folder: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return status


def test_a_run_tells_of_itself_to_its_end(tmp_path: Path) -> None:
    spy = Breaks()
    _train(tmp_path, CertifyRadii(eps=[0.1, 0.2]), spy)
    # Before the first step, and after the validation between the epochs.
    for (status, page), step in zip((spy.seen[0], spy.seen[3]), (0, 3), strict=True):
        assert status["state"] == "running" and (status["step"], status["steps"]) == (step, 6)
        assert '<meta http-equiv="refresh" content="60">' in page
    assert "certified at 51/255:" not in spy.seen[0][1] and "certified at 51/255:" in spy.seen[3][1]
    assert spy.seen[3][0]["images_per_second"] > 0 and spy.seen[3][0]["seconds_left"] > 0
    ended, page = _status(tmp_path), (tmp_path / "report.html").read_text()
    assert (ended["state"], ended["step"], ended["epoch"], ended["seconds_left"]) == ("finished", 6, 2, None)
    assert "http-equiv" not in page and "max_epochs: 2" in page and "&#34;versions&#34;" in page
    rates = [row["train/lr"] for row in read_log(tmp_path) if "train/loss" in row]
    assert len(rates) == 6 and rates[:3] == sorted(rates[:3]) and rates[2] == max(rates) <= 1e-3  # beside its loss

    # Continued, it is one training: time and curve go on.
    _train(tmp_path, checkpoint="last", max_epochs=3)
    further = _status(tmp_path)
    assert further["seconds"] > ended["seconds"] and further["step"] == 9
    page = (tmp_path / "report.html").read_text()
    assert "2 parts, joined" in page and "certified at 51/255:" in page
    assert [row["step"] for row in read_log(tmp_path) if "train/loss" in row] == list(range(9))
    # Anew, the page of the earlier one goes with it.
    _train(tmp_path, max_epochs=1)
    (kept,) = (tmp_path / "previous").iterdir()
    assert json.loads((kept / "progress.json").read_text())["step"] == 9 and (kept / "report.html").is_file()
    assert _status(tmp_path)["step"] == 3 and "certified at" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (RuntimeError("no <memory>\nleft"), "failed", "no &lt;memory&gt; left"),
        (SIGTERMException(0), "interrupted", ""),
    ],
)
def test_a_run_that_breaks_off_says_so(tmp_path: Path, error: BaseException, state: str, message: str) -> None:
    with pytest.raises(type(error)):
        _train(tmp_path, Breaks(2, error))
    status, page = _status(tmp_path), (tmp_path / "report.html").read_text()
    assert status["state"] == state and status["step"] == 2
    assert message in page and f"{state} after 2 of 6 steps" in page and "http-equiv" not in page


def test_pages_take_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [1000.0], []

    def slow(folder: Path, **_: Any) -> None:
        written.append(now[0] - 1000)
        now[0] += 2.0

    monkeypatch.setattr(run_report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_report, "write_run_page", slow)
    report = RunReport()
    report._root = tmp_path
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(L.LightningModule())
    report._begun = 1000.0
    while now[0] < 3000:
        report._write_now_and_then(trainer, 60.0)
        now[0] += 1.0
    # One is free, and the others wait until two seconds are a hundredth of the time.
    assert len(written) == 11 and all(2 * count <= 1.04 + 0.01 * at for count, at in enumerate(written))


def test_a_full_disk_ends_no_training_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_report, "write_run_page", full)
    with caplog.at_level("INFO"):
        _train(tmp_path, max_epochs=1)
    assert "the page of the run is not brought up to date: [Errno 28] No space left" in caplog.text
    assert _status(tmp_path)["state"] == "finished"
