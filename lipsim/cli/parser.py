"""How commands read their options and fail: one clear line and a non-zero exit."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lipsim.utils.framings import DEFAULT_GRID, FRAMINGS
from lipsim.utils.paths import user_path
from lipsim.utils.terminal import one_line, speak_any_encoding

if TYPE_CHECKING:
    import torch

    from lipsim.metric import PerceptualMetric

DEFAULT_METRIC = "photos"  # lipsim.metric.files.DEFAULT, without loading torch


def budget(text: str) -> float:
    """A number or a fraction such as 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):  # the last of 1e400
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _int_of_at_least(1, text)


def natural_int(text: str) -> int:
    """An integer of at least 0."""
    return _int_of_at_least(0, text)


def _int_of_at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return number


def metric_file(text: str) -> Path:
    """A file to write a metric to."""
    path = user_path(text)
    if path.suffix != ".safetensors" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected an output file ending in .safetensors, got {text!r}")
    return path


def output_folder(text: str) -> Path:
    """A folder to write to, which need not be there yet."""
    path = user_path(text)
    if (taken := file_in_place_of(path)) is not None:
        raise argparse.ArgumentTypeError(f"expected a folder to write to, got {text!r}, and {taken} is a file")
    return path


def file_in_place_of(folder: Path) -> Path | None:
    """The file that keeps a folder from being made, if there is one."""
    taken = next((part for part in (folder, *folder.parents) if part.exists()), folder)
    return taken if taken.exists() and not taken.is_dir() else None


def named_file(text: str) -> tuple[str, str]:
    """``NAME=FILE``, or a file, or the name of a bundled metric: then the name is that of the file."""
    name, equals, file = text.partition("=")
    if not equals or user_path(text).is_file():  # whose name may have the sign, as those of checkpoints do
        return Path(text).stem, text
    return name, file


def column(text: str) -> tuple[str, str]:
    """``OURS=THEIRS``: what one of our columns is called in a file."""
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"expected OURS=THEIRS, such as dmos=distortion, got {text!r}")
    return ours, theirs


def device(name: str) -> torch.device:
    """A device that has float64."""
    import torch  # which `lipsim --help` does without

    try:
        torch.empty(1, dtype=torch.float64, device=name)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {name!r} ({str(error).splitlines()[0]})") from error
    return torch.device(name)


def share(text: str) -> float:
    """A number in [0, 1], or a fraction such as 1/1000."""
    value = budget(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")
    return value


def add_metric_argument(
    parser: argparse.ArgumentParser,
    *,
    option: bool = False,
    framing: bool = True,
    default: str | None = DEFAULT_METRIC,
    kinds: str = "a .safetensors file, or the name of a bundled metric",
    otherwise: str = "%(default)s",
) -> None:
    """The file of a metric, and how images come to it: what :func:`load_metric` reads.

    Args:
        parser: of a command.
        option: ``--metric`` in the place of an optional positional argument.
        framing: options for how images come to it.
        default: the metric that is not named.
        kinds: what may be named.
        otherwise: the default in words.
    """
    help_text = f"{kinds} ({otherwise})"
    if option:
        parser.add_argument("--metric", default=default, help=help_text)
    else:
        parser.add_argument("metric", nargs="?", default=default, help=help_text)
    if not framing:
        parser.set_defaults(framing=None, grid=None)
        return
    parser.add_argument(
        "--framing",
        choices=FRAMINGS,
        help="how an image comes to the metric: stretched, its centred square, padded, or in tiles whose distances are "
        "averaged (as the file says)",
    )
    parser.add_argument(
        "--grid", type=positive_int, help=f"of --framing tiles: that many a side (the file's, or {DEFAULT_GRID})"
    )


def load_metric(options: argparse.Namespace) -> PerceptualMetric:
    """The metric that the arguments of :func:`add_metric_argument` name."""
    from lipsim.metric import load  # torch, which `lipsim --help` does without

    return load(options.metric, framing=options.framing, grid=options.grid)


def add_output(parser: argparse.ArgumentParser, *, rows: bool = True) -> None:
    """``--json``, and ``--csv`` where there are rows."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object")
    if rows:
        group.add_argument("--csv", action="store_true", help="print a table of comma-separated values")


def add_running(parser: argparse.ArgumentParser, items: str, metrics: str = "the metric runs") -> None:
    """``--batch-size``, of ``items``, and ``--device``."""
    parser.add_argument("--batch-size", type=positive_int, default=32, help=f"{items} at a time (%(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help=f"where {metrics} (%(default)s)")


def add_columns(parser: argparse.ArgumentParser, example: str) -> None:
    """``--columns``, what the columns of a table are called in its file."""
    parser.add_argument(
        "--columns",
        nargs="+",
        type=column,
        default=[],
        metavar="OURS=THEIRS",
        help=f"what columns are called in the file, such as {example}",
    )


# By their names, so that neither torch nor Lightning is loaded to refuse an argument.
_CLEAR = {"LipsimError", "MisconfigurationException", "UsageError"}


def refuse_wide_linf(budgets: Iterable[float]) -> None:
    """Refuse ℓ∞ budgets above 1, where every pixel may be anything: 4 is nearly always 4/255.

    Raises:
        UsageError: one is.
    """
    if wide := [f"{number:g}" for number in budgets if number > 1]:
        raise UsageError(f"expected ℓ∞ budgets of pixels in [0, 1], such as 4/255, got {', '.join(wide)}")


class UsageError(ValueError):
    """The arguments of a command cannot be used."""


# How texts begin whose lines are kept as they are, and not filled to the width of the terminal.
_LINES = ("examples:", "exit status:")


class _Formatter(argparse.HelpFormatter):
    """Help with lists at its end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_LINES):
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class OneLineParser(argparse.ArgumentParser):
    """A parser of the command line that says what is wrong in one line, through :func:`one_line_errors`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise UsageError(f"{message}; --help shows the options")


@contextmanager
def one_line_errors(status: int = 1) -> Iterator[None]:
    """Turn errors that are the user's to mend into one line on stderr and an exit status, and warnings into one each.

    ``LIPSIM_TRACEBACK=1`` shows the whole traceback instead, and where a warning is from. Other classes of exceptions
    pass unchanged. Within, stdout and stderr write whatever they cannot encode in plain signs. Whoever reads stdout may
    stop to, as ``head`` does.

    Args:
        status: of such errors.
    """
    speak_any_encoding()
    shown = warnings.formatwarning
    if not os.environ.get("LIPSIM_TRACEBACK"):
        warnings.formatwarning = _warning_line
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes once more in the end
        raise SystemExit(141) from None  # as a shell has it for SIGPIPE
    except Exception as error:
        if os.environ.get("LIPSIM_TRACEBACK") or not _is_the_users(error):
            raise
        text = one_line(str(error)) or type(error).__name__
        # What another package refuses is nearly always an option handed on to it; where it is a fault of ours instead,
        # the line says how to see it.
        clear = isinstance(error, OSError) or _is_clear(error)
        print(f"error: {text}" + ("" if clear else " (LIPSIM_TRACEBACK=1 shows where)"), file=sys.stderr)
        raise SystemExit(status) from error
    except KeyboardInterrupt:
        _leave_interrupted()
    except SystemExit as leaving:
        # Lightning's trainer takes the interruption, ends what it began, and leaves with 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            _leave_interrupted()
        raise
    finally:
        warnings.formatwarning = shown


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {one_line(str(message))}\n"


def _leave_interrupted() -> NoReturn:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None


def _is_the_users(error: Exception) -> bool:
    """Whether an error says what a user can mend."""
    return isinstance(error, ValueError | OSError) or _is_clear(error)


def _is_clear(error: Exception) -> bool:
    """Whether it is of a class that says what to do."""
    return any(cls.__name__ in _CLEAR for cls in type(error).__mro__)
