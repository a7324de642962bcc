"""What breaks off a run from outside, said in one clear line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L

from lipsim.callbacks.run_folder import RunFolder
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import FULL

_WORKER_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)


@contextmanager
def clear_faults(trainer: L.Trainer) -> Iterator[None]:
    """Run a trainer: errors of the machine become clear ones, and the folder of the run is free in the end.

    Raises:
        OSError: of a full disk, with its path.
        ValueError: a loading process was killed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise _clear(error, Path(trainer.default_root_dir)) from error
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                callback.release()


def _clear(error: Exception, root: Path) -> Exception:
    """An error in our words where it is a known fault, else itself."""
    for cause in _chain(error):
        if isinstance(cause, RuntimeError) and (found := _WORKER_GONE.search(str(cause))):
            return LipsimError(
                f"loading process {found[1].strip()} is gone ({_how(found[2])}): most often memory ran out, which "
                "fewer --data.num_workers or a smaller batch_size mends; resume with --ckpt_path last"
            )
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        # Of a log, say, whose writer does not say which file.
        free = shutil.disk_usage(root).free / 1e6
        return OSError(f"cannot write in {root} ({error.strerror}: {free:,.2f} MB are free there)")
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _how(text: str) -> str:
    """How a process ended, from torch's sentence about it."""
    signal = re.search(r"signal: ([^.]*)", text)
    return f"signal: {signal[1].strip()}" if signal else "it exited unexpectedly"
