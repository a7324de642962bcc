"""Files are written whole or not at all, and hashes are those of the standard library."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torchvision.utils import save_image

from lipsim.results import plots
from lipsim.utils import files

WRITERS: dict[str, Callable[[Path], None]] = {
    "a.txt": lambda path: files.write_text(path, "ℓ2\n"),
    "a.bin": lambda path: files.write_bytes(path, b"\0\1"),
    "a.json": lambda path: files.write_json(path, {"ε": [1, None]}),
    "a.csv": lambda path: files.write_csv(path, ("a", "b"), [(0.1, "x,y"), (1 / 3, "")]),
    "a.safetensors": lambda path: files.write_safetensors(path, {"a": torch.arange(3)}),
    "a.npy": lambda path: files.write_file(path, partial(np.save, arr=np.arange(3))),
    "a.png": lambda path: files.write_file(path, partial(save_image, torch.rand(3, 4, 4))),
    "a.pdf": lambda path: plots.save(Figure(figsize=(1, 1)), path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_mode_of_every_new_file_and_nothing_else_stays(name: str, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / "new" / name)
        WRITERS[name](tmp_path / "new" / name)  # over the first
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == name and file.stat().st_size
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
    assert (tmp_path / "a.txt").read_bytes() == "ℓ2\n".encode()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ε": [1, None]}
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["0.1", "x,y"], [repr(1 / 3), ""]]
    assert np.load(tmp_path / "a.npy").tolist() == load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.rand(4, 4, requires_grad=True)
    files.write_safetensors(tmp_path / "a.safetensors", {"whole": whole, "same": whole, "turned": whole.T})
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["same"], whole) and torch.equal(found["turned"], whole.T)


def _breaks(temporary: Path) -> None:
    temporary.write_bytes(b"half")
    raise RuntimeError("the disk is full")


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    files.write_text(file, "old")
    with pytest.raises(RuntimeError, match="disk is full"):
        files.write_file(file, _breaks)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*folder\.txt \(Is a directory"):
        files.write_text(tmp_path / "folder.txt", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "folder.txt"}


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(("synced", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        order.append(("named", os.stat(source).st_ino))
        assert Path(source).parent == Path(target).parent  # a rename within one file system
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for name, write in WRITERS.items():
        order.clear()
        write(tmp_path / name)
        inode = (tmp_path / name).stat().st_ino
        assert order == [("synced", inode), ("named", inode)], name


def _half_and_a_kill(temporary: Path) -> None:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # since Python 3.12
def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    """And what it leaves beside it is hidden, and in nobody's way."""
    file = tmp_path / "shard-00000.npy"
    files.write_bytes(file, b"old")
    process = multiprocessing.get_context("fork").Process(target=files.write_file, args=(file, _half_and_a_kill))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and file.read_bytes() == b"old"
    assert list(tmp_path.glob("shard-*")) == [file] and all(p.name[0] == "." for p in {*tmp_path.iterdir()} - {file})
    files.write_bytes(file, b"new")
    assert file.read_bytes() == b"new"


def test_names_that_are_not_utf_8_keep_their_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    files.write_csv(tmp_path / "a.csv", ["é"], [[name]])
    assert (tmp_path / "a.csv").read_bytes() == b"\xc3\xa9\r\ncaf\xe9.png\r\n"
    for text, content in ((name, b"caf\xe9.png"), ("café ℓ2", "café ℓ2".encode())):
        digest = files.Digest()
        digest.add(text)
        assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


def test_hashes_are_those_of_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert files.file_sha256(tmp_path / "a") == files.sha256(b"abc") == files.sha256("abc") == expected
    state = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3, dtype=torch.int16)}
    content = b"a()torch.int16\x03\x00b(2,)torch.float32" + np.array([1, 2], dtype="<f4").tobytes()
    assert files.state_fingerprint(state) == hashlib.sha256(content).hexdigest()
    assert files.state_fingerprint({name: state[name] for name in ("a", "b")}) == files.state_fingerprint(state)


def test_states_of_files_are_those_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, the last one shorter; none is there of no file."""
    monkeypatch.setattr(files, "_STAT_BLOCK", 3)
    for i in range(7):
        (tmp_path / f"{i}").write_bytes(i * b"x")
    names = np.array([*(f"{i}".encode() for i in range(7)), b"none", b"0/none"])
    found = files.file_states(tmp_path, names)
    assert found.dtype == np.int64 and found.shape == (9, 2)
    assert found[:7, 0].tolist() == list(range(7)) and (found[7:] == -1).all()
    assert found[3, 1] == (tmp_path / "3").stat().st_mtime_ns
    assert files.file_states(tmp_path, names[:0]).shape == (0, 2)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + 46 * b"\0", b"hello world, no array"])
def test_what_is_no_array_is_said_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        files.map_array(tmp_path / "a.npy")
