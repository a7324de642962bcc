"""What a long command is doing: a live line in a terminal, and a line now and then where output goes to a file."""

from __future__ import annotations

import sys
import threading
import time
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
        """A function to call with how many more are done; tells how many of all, and how long the rest will take."""
        start, done = time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            left = (time.monotonic() - start) / max(done, 1) * (total - done)
            self(f"{done} of {total} {unit}, {duration(left)} left")

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


def duration(seconds: float) -> str:
    """A time as people read it: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
