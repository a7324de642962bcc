"""What breaks off a run from outside, said in one clear line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L

from lipsim.callbacks.process_watch import TIMEOUT, ProcessWatch, is_of_a_connection, limit_waiting
from lipsim.callbacks.run_folder import RunFolder
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import FULL
from lipsim.utils.terminal import one_line

_WORKER_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)


@contextmanager
def clear_faults(trainer: L.Trainer, *, evaluation: bool = False) -> Iterator[None]:
    """Run a trainer: errors of the machine become clear ones, and the folder of the run is free in the end.

    Args:
        trainer: what is run.
        evaluation: whether it evaluates, where processes wait longer for each other.

    Raises:
        OSError: of a full disk, with its path.
        ValueError: a loading process was killed, or another process does not answer.
        SystemExit: another process is gone, which has been said.
    """
    limit_waiting(trainer, evaluation)
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        watches = [c for c in trainer.callbacks if isinstance(c, ProcessWatch)]  # type: ignore[attr-defined]
        if any(watch.gone for watch in watches):
            raise SystemExit(1) from error
        clear = _clear(error, Path(trainer.default_root_dir), evaluation)
        if clear is error:
            raise
        raise clear from error
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                callback.release()


def _clear(error: Exception, root: Path, evaluation: bool) -> Exception:
    """An error in our words where it is a known fault, else itself."""
    causes = [str(cause) for cause in _chain(error) if isinstance(cause, RuntimeError)]
    if lost := [found for cause in causes if (found := _WORKER_GONE.search(cause))]:
        worker = next((found for found in lost if "signal: " in found[2]), lost[0])  # torch says it twice, or once
        return LipsimError(
            f"loading process {worker[1].strip()} is gone ({_how(worker[2])}): most often memory ran out, which fewer "
            "--data.num_workers or a smaller batch_size mends"
            + ("" if evaluation else "; resume with --ckpt_path last")
        )
    if is_of_a_connection(error):
        return LipsimError(
            f"another process does not answer ({one_line(str(error))[:300]}); its own messages say why; a slow one "
            f"gets longer by the environment variable {TIMEOUT}, in seconds"
        )
    if str(error).startswith("Caught ") and " in DataLoader worker process" in str(error):
        return type(error)(one_line(str(error)))  # without the traceback of the other process
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
