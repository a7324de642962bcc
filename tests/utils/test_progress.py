"""Progress where output goes to a file, and in a terminal."""

from __future__ import annotations

import io
import re
import threading

import lightning as L
import pytest
import torch

from lipsim.callbacks import ProgressLines
from lipsim.utils import progress
from lipsim.utils.progress import Pace, Progress, duration, per_second


class Lines(io.StringIO):
    """A file that says when a line is there."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Semaphore(0)

    def write(self, text: str) -> int:
        count = super().write(text)
        if text.endswith("\n"):
            self.written.release()
        return count

    def wait_for(self, text: str) -> None:
        while not re.search(text, self.getvalue()):
            assert self.written.acquire(timeout=10), self.getvalue()


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST", "_SHORTEST"):
        monkeypatch.setattr(progress, name, 0.01)


@pytest.mark.usefixtures("_at_once")
def test_a_file_gets_lines_also_while_one_part_lasts() -> None:
    stream = Lines()
    with Progress("attacking", stream) as say:
        say("apgd")
        for _ in range(3):
            assert stream.written.acquire(timeout=10)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3 and all(re.fullmatch(r"attacking: apgd \(\d s\)", line) for line in lines[1:])


def test_what_is_short_or_disabled_says_nothing() -> None:
    stream = io.StringIO()
    with Progress("auditing", stream) as say:
        say("layers")
    with Progress("auditing", stream, enabled=False) as say:
        say("layers")
    assert stream.getvalue() == ""


def test_a_terminal_is_clean_afterwards() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("auditing", stream) as say:
        say("layers [1]")
    assert "auditing" in stream.getvalue() and stream.getvalue().endswith("\x1b[2K")


def test_counts_and_times() -> None:
    say = Progress("rendering", io.StringIO())
    advance = say.counter(20, "triplets")
    advance(5)
    advance(5)
    assert re.fullmatch(r"rendering: 10 of 20 triplets, [\d,.]+/s, 0 s left", say._text)
    assert [per_second(rate, "images") for rate in (0.314, 12.34, 1234.5)] == [
        *("0.31 images/s", "12.3 images/s", "1,234 images/s")
    ]
    assert [duration(s) for s in (0.4, 59, 61, 3599, 7800)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 10 min",
    ]


def test_the_pace_is_that_of_the_steps_after_the_first() -> None:
    now = [100.0]
    pace = Pace(recent=10.0, clock=lambda: now[0])
    assert pace.rate is None and pace.seconds_per_step is None

    def step(seconds: float, items: int = 8) -> None:
        pace.begin()
        now[0] += seconds
        pace.add(1, items)

    now[0] += 1000.0  # whatever was before the first
    step(40.0)  # workers start, code is compiled: it counts while it is alone
    assert (pace.rate, pace.seconds_per_step) == (8 / 40, 40.0)
    for _ in range(5):
        step(2.0)
    assert (pace.rate, pace.seconds_per_step) == (4.0, 2.0)
    pace.pause()
    now[0] += 30.0  # a validation: no part of the rate, and of what the rest takes
    pace.resume()
    for _ in range(5):
        step(1.0)
    assert pace.seconds_per_step == (10 + 30 + 5) / 10
    assert pace.rate == pytest.approx(8 * 7 / 10, rel=0.1)  # five steps of the last ten seconds, and half of five
    for _ in range(100_000):
        step(0.001)
    assert pace.rate == pytest.approx(8000) and len(pace._marks) < 70


class Waiting(L.LightningModule):
    """Each step waits for a line."""

    def __init__(self, stream: Lines) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.stream = stream

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if index:
            self.stream.wait_for(f"fit: epoch 1 of 1, {index} of 3 batches done")
        loss = (self.weight * batch).sum() + 0.25
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.trainer.progress_bar_callback.say("square")  # type: ignore[union-attr]
        self.stream.wait_for(f"test: test, {index} of 3 batches done, ([\\d,.]+ images/s, . s left, )?square")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.usefixtures("_at_once")
def test_training_and_tests_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Lines()
    monkeypatch.setattr("sys.stdout", stream)
    loader = torch.utils.data.DataLoader(torch.ones(3, 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[ProgressLines()],
    )
    module = Waiting(stream)
    trainer.fit(module, loader)
    trainer.test(module, loader, verbose=False)
    stream.wait_for(r"1 of 3 batches done, [\d,.]+ images/s, \d s left, loss 0.25 \(\d s\)\n")
    trainer.progress_bar_callback.disable()  # type: ignore[union-attr]
    before = stream.getvalue()
    monkeypatch.setattr(Waiting, "test_step", lambda self, batch, index: None)
    trainer.test(module, loader, verbose=False)
    assert stream.getvalue() == before
