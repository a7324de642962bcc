"""How commands read their options and fail: one clear line and a non-zero exit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lipsim.utils.errors import one_line, speak_any_encoding


def budget(text: str) -> float:
    """A number or a fraction such as 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


def device(name: str) -> torch.device:
    """A device that has float64."""
    try:
        torch.empty(1, dtype=torch.float64, device=name)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {name!r} ({str(error).splitlines()[0]})") from error
    return torch.device(name)


class OneLineParser(argparse.ArgumentParser):
    """A parser of the command line that says what is wrong in one line, through :func:`one_line_errors`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise ValueError(f"{message}; --help shows the options")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that are the user's to mend into one line on stderr and exit status 1.

    ``LIPSIM_TRACEBACK=1`` shows the whole traceback instead. Other classes of exceptions pass unchanged. Within, stdout
    and stderr write whatever they cannot encode in plain signs.
    """
    speak_any_encoding()
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("LIPSIM_TRACEBACK"):
            raise
        print(f"error: {one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
