"""What a long command is doing: a live line in a terminal, and a line now and then where output goes to a file."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.status import Status

# Seconds: commands shorter than the first say nothing; lines come ever more slowly, a twentieth of the time so far
# apart, so that the log of a day is no longer than that of an hour.
_FIRST, _SHORTEST, _LONGEST = 2.0, 15.0, 300.0


class Progress:
    """Tells on a stream what is going on: ``with Progress("attacking") as say: say("apgd at ε = 1")``.

    A terminal shows the latest message with a spinner and is clean afterwards. Anything else gets a line with the
    message and the time so far after two seconds and then every 15 seconds or more, also while one part lasts long.

    Args:
        title: what lasts.
        stream: where to tell it; None: stderr, so that stdout keeps results alone.
        enabled: False says nothing, as all processes but the first should.
    """

    def __init__(self, title: str, stream: TextIO | None = None, enabled: bool = True) -> None:
        self.title, self.stream, self.enabled = title, stream or sys.stderr, enabled
        self._message = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._status: Status | None = None

    def __call__(self, message: str) -> None:
        """What is going on from now on."""
        self._message = message
        if self._status is not None:
            self._status.update(escape(self._text))

    def counter(self, total: int, unit: str) -> Callable[[int], None]:
        """A function to call with how many more are done; tells how many of all, how fast, how long the rest takes."""
        pace, done = Pace(), 0
        pace.begin()

        def advance(count: int) -> None:
            nonlocal done
            done += count
            pace.add(count, count)
            each, rate = pace.seconds_per_step, pace.rate
            left = "" if each is None else f", {duration(each * (total - done))} left"
            self(f"{done} of {total} {unit}{f', {per_second(rate)}' if rate else ''}{left}")

        return advance

    def __enter__(self) -> Self:
        if self.enabled and self.stream.isatty():
            self._status = Console(file=self.stream).status(escape(self._text))
            self._status.start()
        elif self.enabled:
            self._thread = threading.Thread(target=self._tell, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._status is not None:
            self._status.stop()
        if self._thread is not None:
            self._thread.join()

    @property
    def _text(self) -> str:
        return f"{self.title}: {self._message}" if self._message else self.title

    def _tell(self) -> None:
        start = time.monotonic()
        wait = _FIRST
        while not self._done.wait(wait):
            seconds = time.monotonic() - start
            print(f"{self._text} ({duration(seconds)})", file=self.stream, flush=True)
            wait = min(_LONGEST, max(_SHORTEST, seconds / 20))


class Pace:
    """How fast something goes, in steps and in the items that they are about, whose rate matters to a reader.

    The first step counts as long as it is alone: workers are started in it, and code is compiled. What was before it
    never counts.

    Args:
        recent: seconds that :attr:`rate` looks back.
        clock: seconds, of which only differences count.
    """

    def __init__(self, recent: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._recent, self._clock = recent, clock
        self._begun: float | None = None
        self._steps, self._items, self._idle, self._paused = 0.0, 0, 0.0, 0.0
        self._first: tuple[float, float] | None = None  # time and steps after the first
        self._last = 0.0  # time of the last step
        self._marks: deque[tuple[float, int]] = deque()  # (time without pauses, items), of the recent past

    def begin(self) -> None:
        """The first step begins; later calls change nothing after a step was added."""
        if self._first is None:
            self._begun = self._clock()

    def add(self, steps: float, items: int) -> None:
        """Some more are done: at least one step, unless these are parts of one."""
        now = self._last = self._clock()
        self._steps, self._items = self._steps + steps, self._items + items
        if self._first is None:
            self._first = now, self._steps
        working = now - self._idle
        if self._marks and len(self._marks) > 1 and working - self._marks[-2][0] < self._recent / 60:
            self._marks.pop()  # marks closer than that tell no more
        self._marks.append((working, self._items))
        while len(self._marks) > 2 and self._marks[1][0] <= working - self._recent:
            self._marks.popleft()

    def pause(self) -> None:
        """Something else begins, which :attr:`rate` does not count and :attr:`seconds_per_step` does."""
        self._paused = self._clock()

    def resume(self) -> None:
        """It is over."""
        self._idle += self._clock() - self._paused

    @property
    def rate(self) -> float | None:
        """Items a second, lately, without pauses; None before there is one."""
        (then, before), (now, items) = (self._marks[0], self._marks[-1]) if self._marks else ((0.0, 0), (0.0, 0))
        if now > then:
            return (items - before) / (now - then)
        if self._begun is None or self._first is None or self._first[0] <= self._begun:
            return None
        return self._items / (self._first[0] - self._begun)

    @property
    def seconds_per_step(self) -> float | None:
        """Of all so far, pauses included; None before there is one."""
        if self._first is None:
            return None
        start, before = self._first
        if self._steps > before:
            return (self._last - start) / (self._steps - before)
        return None if self._begun is None or not before else (start - self._begun) / before


def per_second(rate: float, unit: str = "") -> str:
    """A rate as people read it: ``0.31 images/s``, ``12.5/s``, ``1,250 images/s``."""
    digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
    return f"{rate:,.{digits}f}{f' {unit}' if unit else ''}/s"


def duration(seconds: float) -> str:
    """A time as people read it: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
