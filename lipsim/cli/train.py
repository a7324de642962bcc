"""`python scripts/train.py`: the quickstart without arguments, one stage with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lipsim.cli.parser import one_line_errors
from lipsim.cli.quickstart import quickstart
from lipsim.cli.stage import train


def main(args: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Entry point of scripts/train.py and of `lipsim train`: the quickstart without arguments, one stage with them."""
    args = sys.argv[1:] if args is None else args
    with one_line_errors():
        if args:
            train(args, prog)
        else:
            quickstart()
