"""The ``lipsim`` command: the functions of this package for one image or one model."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

from lipsim.cli import attack, attack_tables, audit, certify, report, teachers, verify
from lipsim.cli.parser import OneLineParser, one_line_errors


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lipsim``."""
    parser = OneLineParser(prog="lipsim", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lipsim {importlib.metadata.version('lipsim')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    audit.add_command(commands)
    certify.add_command(commands)
    verify.add_command(commands)
    attack.add_command(commands)
    attack_tables.add_command(commands)
    report.add_command(commands)
    teachers.add_commands(commands)
    with one_line_errors():
        options = parser.parse_args(args)
        sys.exit(options.run(options))
