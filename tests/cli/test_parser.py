"""What options are read as, and one line for what they are not."""

from __future__ import annotations

import shlex
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest

from lipsim.cli.main import ANSWERING, COMMANDS, build_parser, main
from lipsim.cli.parser import budget, metric_file, named_file, natural_int, one_line_errors, positive_int


def test_numbers_and_files() -> None:
    assert (positive_int("3"), natural_int("0"), budget("8/255"), budget("0.5")) == (3, 0, 8 / 255, 0.5)
    assert metric_file("a/b.safetensors") == Path("a/b.safetensors")


def test_files_with_and_without_names(tmp_path: Path) -> None:
    assert named_file("student=runs/m.safetensors") == ("student", "runs/m.safetensors")
    assert named_file("runs/m.safetensors") == ("m", "runs/m.safetensors")
    assert named_file("quickstart") == ("quickstart", "quickstart")
    assert named_file("a=runs/epoch=3.ckpt") == ("a", "runs/epoch=3.ckpt")
    file = tmp_path / "lr=0.1.safetensors"  # a file is a file, whatever its name
    file.touch()
    assert named_file(str(file)) == ("lr=0.1", str(file))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (positive_int, "0", "an integer of at least 1, got '0'"),
        (positive_int, "1.5", "an integer of at least 1, got '1.5'"),
        (natural_int, "-1", "an integer of at least 0, got '-1'"),
        (budget, "1/0", "a number or a fraction such as 8/255"),
        (budget, "1e400", "a number or a fraction such as 8/255, got '1e400'"),
        (metric_file, "a.pth", "ending in .safetensors, got 'a.pth'"),
    ],
)
def test_refusals_say_what_was_expected(read: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        read(text)


def test_warnings_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    before, warning = warnings.formatwarning, UserWarning("the disk of runs\nhas no locks")
    with one_line_errors():
        assert warnings.formatwarning(warning, UserWarning, "claim.py", 3) == "warning: the disk of runs has no locks\n"
    assert warnings.formatwarning is before
    monkeypatch.setenv("LIPSIM_TRACEBACK", "1")
    with one_line_errors():
        assert "claim.py:3" in warnings.formatwarning(warning, UserWarning, "claim.py", 3)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_refuses_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: lipsim {name}" in text
    examples = text.partition("\nexamples:\n")[2].splitlines()  # line by line, not filled to the width
    assert examples
    for line in examples:
        words = shlex.split(line.partition(" && ")[0])
        assert words[:2] == ["lipsim", name] and build_parser([name]).parse_args(words[1:]).run
    with pytest.raises(SystemExit) as stop:
        main([name, "--no-such-option"])
    error = capsys.readouterr().err
    assert stop.value.code == (2 if name in ANSWERING else 1)
    assert error.startswith("error: ") and error.count("\n") == 1
