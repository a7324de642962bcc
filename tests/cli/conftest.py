"""What tests of commands share."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from lipsim.cli.main import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """Runs a command line: exit status, stdout and stderr."""

    def run(line: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line))
        found = capsys.readouterr()
        return stop.value.code, found.out, found.err  # type: ignore[return-value]

    return run
