"""One job in a folder: the first one has it, a second one is refused, and what a killed one left is taken over."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

try:
    import fcntl
except ImportError:  # Windows: nothing is claimed there
    fcntl = None  # type: ignore[assignment]

from lipsim.utils.errors import LipsimError
from lipsim.utils.slurm import slurm_job

CLAIM = ".lipsim-claim.json"
# Seconds that a lock may outlive its process: those that it forked have it too, and notice that they are alone after 5.
_ORPHANS = 12.0
# Seconds after which a server of NFS gives back the locks of a machine that is lost (its lease is 90).
_LEASE = 150.0
_held: weakref.WeakValueDictionary[Path, FolderClaim] = weakref.WeakValueDictionary()


class FolderClaim:
    """A folder that this process has for itself, until :meth:`release` or its end, however it ends.

    A lock of the operating system (``flock``) on a file in the folder, which says who has it. The system releases it
    when the process is gone, also after ``kill -9``. On a network disk it holds between machines where the disk has
    locks (NFS with its lock service, Lustre mounted with ``flock``, GPFS, BeeGFS with it switched on). Where it has
    none, the file alone tells: a process of this machine that is gone is recognised, one of another machine counts as
    running.

    Use :func:`claim_folder`, which gives one process the same claim again.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self.folder, self._holders = folder, 0
        if fcntl is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._end: Callable[[], object] = lambda: None
            return
        made: list[Path] = []
        file = None
        try:
            made = _missing_folders(folder)
            folder.mkdir(parents=True, exist_ok=True)
            file = _locked(folder / CLAIM, option)
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_myself()).encode(), 0)
        except OSError as error:
            if file is None:
                _remove_empty(made)
            else:
                _release(file, folder / CLAIM, made, os.getpid())
            raise OSError(
                f"cannot write in {folder} ({error.strerror or error}), so nothing is begun; choose another folder "
                f"({option})"
            ) from error
        self._end = weakref.finalize(self, _release, file, folder / CLAIM, made, os.getpid())

    def release(self) -> None:
        """Let others have the folder, when all who claimed it in this process have released it."""
        self._holders -= 1
        if self._holders <= 0:
            _held.pop(self.folder, None)
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def claim_folder(folder: str | Path, option: str = "--trainer.default_root_dir") -> FolderClaim:
    """Claim a folder for this process, which is made where it is missing.

    What has it already may claim it again, as an evaluation within a training does; each releases it once.

    Args:
        folder: the folder.
        option: of the command line that names another one, for messages.

    Raises:
        OSError: nothing can be written there.
        ValueError: another process has it; the message says which.
    """
    folder = Path(folder).resolve()  # a home that is a link is one folder by both names
    claim = _held.get(folder)
    if claim is None:
        _held[folder] = claim = FolderClaim(folder, option)
    claim._holders += 1
    return claim


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Have a file for this process, made where it is missing: waits until others, which take it in this way, are done.

    The file may be renamed or removed meanwhile. On a disk without locks nothing is waited for; on Windows nothing is
    done.
    """
    if fcntl is None:  # an open file could not be renamed there
        yield
        return
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_same(file, path):
                yield
                return
        finally:
            os.close(file)


def _locked(path: Path, option: str) -> int:
    """The open file of a claim, locked.

    Raises:
        ValueError: somebody else has it.
    """
    deadline = None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            os.close(file)
            # Its process is gone: the lock is that of processes which it has left, and which end soon.
            if _is_gone(holder) and (deadline is None or time.monotonic() < deadline):
                here = holder.get("host") == socket.gethostname()
                deadline = deadline or time.monotonic() + (_ORPHANS if here else _LEASE)
                time.sleep(0.1)
                continue
            raise LipsimError(_taken(path.parent, holder, option)) from None
        except OSError as error:  # a disk without locks
            holder = _read(file)
            if holder and not _is_gone(holder) and not _is_me(holder):
                os.close(file)
                remedy = f"; if that is not so, remove {path}"
                raise LipsimError(_taken(path.parent, holder, option) + remedy) from None
            warnings.warn(
                f"the disk of {path.parent} has no locks ({error.strerror}): two jobs that start there at the same "
                "moment do not see each other",
                stacklevel=2,
            )
            return file
        if _is_same(file, path):
            return file
        os.close(file)  # it was released, and removed, between the two calls


def _release(file: int, path: Path, made: list[Path], process: int) -> None:
    if os.getpid() == process:  # and not a copy of it that a fork made
        if _is_same(file, path):
            path.unlink()
        _remove_empty(made)
        os.close(file)


def _is_same(file: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _missing_folders(folder: Path) -> list[Path]:
    """A folder and those above it that are not there, from within."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": _start_of_job(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _read(file: int) -> dict[str, Any]:
    """Who has claimed a folder; nothing where it cannot be read, as in the moment before it is written."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _start_of_job() -> str | None:
    """Which start of which job of SLURM this process is of; None outside one."""
    job = slurm_job()
    return None if job is None else f"{job}/{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine, or of an earlier start of this job, is no more; of others nobody knows."""
    mine, theirs = _start_of_job(), holder.get("job")
    if mine is not None and isinstance(theirs, str) and theirs.partition("/")[0] == mine.partition("/")[0]:
        if theirs != mine:  # it has been put back into the queue: its machine may be lost
            return True
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    started = _start_of(holder["pid"])
    return started is None or started != holder.get("started")


def _is_me(holder: dict[str, Any]) -> bool:
    return (holder.get("host"), holder.get("pid")) == (socket.gethostname(), os.getpid())


def _start_of(pid: int) -> str | None:
    """When a process was started, which tells it from another one of its number; None: it is gone."""
    try:
        # Linux: in ticks since the machine started, the 22nd field; the second is a name in parentheses.
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if os.path.isdir("/proc/self"):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _taken(folder: Path, holder: dict[str, Any], option: str) -> str:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    return f"{folder} is in use by {who}; wait for it or end it, or choose another folder ({option})"
