"""How a command fails: one clear line and a non-zero exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that are the user's to mend into one line on stderr and exit status 1.

    ``LIPSIM_TRACEBACK=1`` shows the whole traceback instead. Other exceptions, which are ours to mend, pass unchanged.
    """
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("LIPSIM_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
