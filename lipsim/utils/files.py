"""Files: written as a whole or not at all, removed, and hashed."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lipsim.utils.errors import LipsimError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of errors: a full disk, a quota, a limit of the size of files
_STAT_THREADS = 16  # which wait for a network disk, not for a processor
_STAT_BLOCK = 256  # files that a thread looks at in a row: each task takes memory and time of its own


def parse_json(text: str | bytes) -> Any:
    """What a text in JSON says, of somebody else as well.

    Raises:
        ValueError: it is none, or nested so deep that Python's reader, which calls itself, gives up.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise LipsimError("it is JSON nested deeper than can be read") from None


def read_array(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file in memory; see :func:`map_array`."""
    return np.array(map_array(path))


def map_array(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped, which is not unpickled nor asks for more than the file has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, truncated, of Python objects, or says that it has more than it has.
    """
    with open(path, "rb") as file:
        beginning = file.read(len(np.lib.format.MAGIC_PREFIX))
    if beginning != np.lib.format.MAGIC_PREFIX:  # of which numpy says other things, and takes some for zip files
        raise LipsimError("expected an array in numpy's format" + ("" if beginning else ", got an empty file"))
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # compares the header with the size of the file
    if not isinstance(mapped, np.ndarray):
        raise LipsimError(f"expected one array, got {type(mapped).__name__}")
    return mapped


def write_file(path: Path, write: Callable[[Path], object], size: int | None = None) -> None:
    """Let ``write`` make a file, which gets its name when it is complete and on the disk.

    Whoever reads ``path`` meanwhile, or after this process was killed, finds the file that was there before, or none.
    Several processes may write one file: each writes its own, and the last one stays.

    Args:
        path: the file; its folder is made where it is missing. A file that is there is replaced.
        write: writes to the path that it is given, which is in the same folder, hidden, and has the same suffix.
        size: bytes that it takes, where they are known; for a message about a full disk.

    Raises:
        OSError: it cannot be written. Nothing is left then, as after any other exception of ``write``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        # Made here, so that it has the mode of every new file; safetensors makes its own for the owner alone.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode & 0o777
        write(temporary)
        temporary.chmod(mode)
        put_in_place(temporary, path)
    except (OSError, SafetensorError) as error:  # of the latter, a full or read-only disk is the usual cause
        raise OSError(f"cannot write {path} ({_reason(error, path.parent, size)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: OSError | SafetensorError, folder: Path, size: int | None) -> str:
    """Why a file could not be written; of a full disk, how much was needed and how much there is."""
    reason = getattr(error, "strerror", None) or str(error)
    full = getattr(error, "errno", None) in FULL or any(os.strerror(number) in reason for number in FULL)
    if not full:
        return reason
    needed = "" if size is None else f"it needs {size / 1e6:,.2f} MB, and "
    return f"{reason}: {needed}{shutil.disk_usage(folder).free / 1e6:,.2f} MB are free there"


def remove_leftovers(directory: Path) -> None:
    """Remove what :func:`write_file` had begun in a folder when its process was killed, while nobody writes there."""
    remove_files(directory, [".????????????????.tmp*"])


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a complete file the name ``path`` once it is on the disk."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write bytes, as :func:`write_file` does."""
    write_file(path, lambda temporary: temporary.write_bytes(content), len(content))


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 with lines that end in a line feed everywhere, as :func:`write_file` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, as :func:`write_file` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows under a header, as :func:`write_file` does; floats keep the digits that bring them back.

    Names of files that are not in UTF-8, which Python has as surrogates, are written as the bytes that they are.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    write_file(path, write)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device, also those that share memory, as :func:`write_file` does."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(state, temporary, metadata=metadata))


def remove_files(directory: Path, patterns: Iterable[str], keep: Collection[Path] = ()) -> None:
    """Remove files that match one of some patterns, and folders that this empties.

    Args:
        directory: where they are; it stays.
        patterns: of paths relative to it.
        keep: files, and folders whose files stay.
    """
    for path in [path for pattern in patterns for path in directory.glob(pattern)]:
        if path.is_file() and path not in keep and path.parent not in keep:
            path.unlink()
            if path.parent != directory and not any(path.parent.iterdir()):
                path.parent.rmdir()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(content: bytes | str) -> str:
    """SHA-256 of bytes, or of text in UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


class Digest:
    """A SHA-256 that grows by text and tensors, of which shape, dtype and bytes count."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, text: str) -> None:
        """Add text in UTF-8; of names of files that are not, their bytes."""
        self._sha256.update(text.encode(errors="surrogateescape"))

    def add_tensor(self, tensor: Tensor, name: str = "") -> None:
        """Add a tensor, under a name."""
        self.add(f"{name}{tuple(tensor.shape)}{tensor.dtype}")
        self._sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def hexdigest(self) -> str:
        """Of what was added so far."""
        return self._sha256.hexdigest()


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a state dict: which weights a number belongs to."""
    digest = Digest()
    for name, tensor in sorted(state.items()):
        digest.add_tensor(tensor, name)
    return digest.hexdigest()


def file_states(folder: Path, names: np.ndarray) -> np.ndarray:
    """Size and time of change (ns) of files, ``(N, 2)`` int64; −1 of those that are not there.

    Args:
        folder: that the names are relative to.
        names: ``(N,)`` bytes.
    """
    base = os.fsencode(folder)

    def state(name: bytes) -> tuple[int, int]:
        try:
            found = os.stat(os.path.join(base, name))
        except (FileNotFoundError, NotADirectoryError):
            return -1, -1
        return found.st_size, found.st_mtime_ns

    def states(some: np.ndarray) -> np.ndarray:
        return np.array([state(name) for name in some.tolist()], dtype=np.int64).reshape(-1, 2)

    blocks = [names[start : start + _STAT_BLOCK] for start in range(0, len(names), _STAT_BLOCK)]
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        return np.concatenate([np.empty((0, 2), dtype=np.int64), *threads.map(states, blocks)])
