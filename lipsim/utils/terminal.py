"""What a command says: in any encoding of the terminal; one clear line for an error."""

from __future__ import annotations

import codecs
import csv
import io
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence

# What jsonargparse wraps around the reason when it has tried every type that an option may have.
_WRAPPING = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Problem with given class"
)

# What a DataLoader makes of an error in one of its processes, and where the message of an error begins in a traceback.
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+")
_RAISED = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): ", re.MULTILINE)


# How signs are written where the terminal has no better: the notation of the papers, and rich's frames.
_PLAIN = {
    "ℓ": "l", "ε": "eps", "δ": "delta", "η": "eta", "σ": "sigma", "∞": "inf", "‖": "||", "∥": "||", "√": "sqrt",
    "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "→": "->", "…": "...",
    "“": '"', "”": '"', "‘": "'", "’": "'", "•": "*", "└": "`", "├": "|", "│": "|", "┃": "|",
    "─": "-", "━": "-", "═": "=", "╸": "-", "╺": "-",
}  # fmt: skip
_ENCODING_ERRORS = "lipsim.plain"


def plain(error: UnicodeError) -> tuple[str, int]:
    """Error handler of :mod:`codecs`: what an encoding cannot write, in signs that every one has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = ""
    for sign in error.object[error.start : error.end]:
        letters = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()  # ü is u, ² is 2
        text += _PLAIN.get(sign) or letters or "?"
    return text, error.end


def speak_any_encoding() -> None:
    """Let no sign that stdout or stderr cannot encode end a command after its work: it is written plainly."""
    codecs.register_error(_ENCODING_ERRORS, plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and tests put other objects there
            stream.reconfigure(errors=_ENCODING_ERRORS)


def one_line(message: str) -> str:
    """A message in one line; of a parser's tree of attempts, the keys that lead to the failure and its reason."""
    if _WORKER.match(message):  # the whole traceback of the process is in the message
        raised = list(_RAISED.finditer(message))
        message = message[raised[-1].end() :] if raised else message
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    keys = [match[1] for line in lines if (match := re.match(r'Parser key "([^"]+)":', line))]
    if not keys and not any(_WRAPPING.match(line) for line in lines):
        return " ".join(lines)
    reasons = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in lines]
    reasons = [reason for reason in reasons if reason and not _WRAPPING.match(reason)]
    return ": ".join([".".join(dict.fromkeys(keys)), "; ".join(dict.fromkeys(reasons))]).removeprefix(": ")


def print_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table of comma-separated values; floats keep the digits that bring them back."""
    csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, two blanks apart and nothing else: the same in a terminal, a pipe and a file."""
    from rich.console import Console  # not needed by what only fails in one line
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for heading in headings:
        table.add_column(Text(heading), no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # Wide enough for anything: a line that a terminal breaks is still one line of a file.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as printed:
        console.print(table)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())
