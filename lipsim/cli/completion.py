"""What lets a shell complete the commands of lipsim, their options, and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

from lipsim.cli.parser import metric_file, named_file, output_folder
from lipsim.utils.paths import user_path

_COMPLETED = {user_path: shtab.FILE, metric_file: shtab.FILE, named_file: shtab.FILE, output_folder: shtab.DIRECTORY}
_FILES = {"metric", "config"}


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes a command line in a shell.

    Args:
        parser: with the options of all commands.
        shell: "bash", "zsh" or "tcsh".
    """
    for command in _commands(parser):
        if len(command._actions) == 1:  # --help alone: its options are read elsewhere, by the hundred
            command.add_argument("--config")
        for action in command._actions:
            if action.choices is None and action.nargs != 0:
                file = not action.option_strings or action.dest in _FILES
                kind = _COMPLETED.get(action.type, shtab.FILE if file else None)  # type: ignore[arg-type]
                if kind is not None:
                    action.complete = kind  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell=shell)
    return script


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands, and of commands within them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from _commands(command)
