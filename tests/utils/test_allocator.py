"""Programs keep the memory that tensors free; libraries do not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lipsim.cli import evaluate, main
from lipsim.utils import allocator

# How many pages the system gives for eight blocks of 64 MiB, one after the other, where others of their size had been.
_FAULTS = """
import resource, torch
from lipsim.utils.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(8):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in allocator._VARIABLES}


@_glibc
def test_memory_that_was_freed_is_used_again() -> None:
    pages = {}
    for keep in (False, True):
        command = [sys.executable, "-c", _FAULTS.format(keep=keep)]
        run = subprocess.run(command, env=_environment(), check=True, capture_output=True, text=True)
        pages[keep] = int(run.stdout)
    assert pages[False] >= 8 * 32  # of 2 MiB at most, where the system has huge pages
    assert pages[True] < pages[False] / 4


@_glibc
@pytest.mark.parametrize("variable", ["MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_malloc_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize("program", [main, evaluate], ids=lambda module: module.__name__)
def test_commands_ask_for_it(program, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(program, "keep_freed_memory", lambda: asked.append(None))
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert asked == [None]


def test_the_package_does_not() -> None:
    code = "import sys, lipsim.metric; assert 'lipsim.utils.allocator' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
