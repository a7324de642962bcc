"""A folder has one job: a second process is refused, and what a killed one left is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lipsim import LipsimError
from lipsim.utils import claim
from lipsim.utils.claim import CLAIM, claim_folder

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


def _run(target: Callable[[Connection, Path], None], folder: Path) -> tuple[multiprocessing.process.BaseProcess, str]:
    """Start a process, and what it says first."""
    here, there = fork.Pipe()
    process = fork.Process(target=target, args=(there, folder), daemon=True)
    process.start()
    there.close()
    return process, here.recv()


def _claims(pipe: Connection, folder: Path) -> None:
    warnings.simplefilter("ignore")  # of a disk without locks
    try:
        kept = claim_folder(folder)
        pipe.send("mine")
    except (LipsimError, OSError) as error:
        pipe.send(str(error))
        return
    time.sleep(60)
    kept.release()


def _claims_and_forks(pipe: Connection, folder: Path) -> None:
    """As training does: a loading process has what it had open."""
    kept = claim_folder(folder)
    child = os.fork()
    if not child:
        os.setsid()
        time.sleep(1.0)  # longer than its parent
        os._exit(0)
    pipe.send("mine")
    time.sleep(60)
    kept.release()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    process, said = _run(_claims, tmp_path / "run")
    assert said == "mine"
    yield process
    process.kill()
    process.join()


def test_a_second_job_is_refused_by_name(tmp_path: Path, holder: multiprocessing.process.BaseProcess) -> None:
    with pytest.raises(LipsimError, match="is in use by process") as error:
        claim_folder(tmp_path / "run")
    expected = f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}, since 20"
    assert str(error.value).startswith(expected) and "choose another folder" in str(error.value)
    claim_folder(tmp_path / "other").release()


def test_what_a_killed_job_left_is_taken_over(tmp_path: Path) -> None:
    for job in (_claims, _claims_and_forks):
        process, said = _run(job, tmp_path / "run")
        assert said == "mine"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert (tmp_path / "run" / CLAIM).is_file()
        with claim_folder(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / CLAIM).read_text())["pid"] == os.getpid()
        assert not (tmp_path / "run").exists() or not (tmp_path / "run" / CLAIM).exists()


def test_an_earlier_start_of_the_same_job_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine may be lost, and the disk may have no locks; another job there counts as running."""

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claim.fcntl, "flock", no_locks)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, taken_over in (("12/0", True), ("12/1", False), ("13/0", False)):
        (tmp_path / CLAIM).write_text(json.dumps({"host": "lost", "pid": 1, "job": job, "since": "2026"}))
        if taken_over:
            with pytest.warns(UserWarning, match="has no locks"):
                claim_folder(tmp_path).release()
        else:
            with pytest.raises(LipsimError, match="process 1 on lost"):
                claim_folder(tmp_path)


def test_one_process_has_one_claim_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    first = claim_folder(folder)
    assert claim_folder(folder) is first and [path.name for path in folder.iterdir()] == [CLAIM]
    first.release()
    assert (folder / CLAIM).exists()  # of an evaluation within a training, say, which goes on
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []
    claim_folder(folder)  # nobody keeps it
    assert list(tmp_path.iterdir()) == []
    with claim_folder(folder):
        (folder / "results.json").touch()
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def _unprivileged(pipe: Connection, folder: Path) -> None:
    if os.getuid() == 0:  # who may write anywhere
        os.setgid(65534)
        os.setuid(65534)
    _claims(pipe, folder)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, *(path for path in tmp_path.parents if path.name.startswith(("pytest-", "popen-")))):
        path.chmod(0o755)
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o555)
    for place in (folder, folder / "new"):
        process, said = _run(_unprivileged, place)
        process.join()
        assert said.startswith(f"cannot write in {place} (Permission denied), so nothing is begun; choose another")
    assert not (folder / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write in .*file/run \(Not a directory\)"):
        claim_folder(tmp_path / "file" / "run")


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the file alone tells: of this machine whether its process is gone, of others nothing."""

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claim.fcntl, "flock", no_locks)
    process, _ = _run(_claims, tmp_path / "run")
    with pytest.raises(LipsimError, match=rf"in use by process {process.pid} .*; if that is not so, remove .*{CLAIM}"):
        claim_folder(tmp_path / "run")
    process.kill()
    process.join()
    with pytest.warns(UserWarning, match="has no locks"):
        claim_folder(tmp_path / "run").release()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / CLAIM).write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "2026"}))
    with pytest.raises(LipsimError, match="process 1 on elsewhere, since 2026"):
        claim_folder(tmp_path / "run")


def test_a_folder_has_one_claim_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is a link, as clusters have it: where a shell is there, and what a variable says."""
    (tmp_path / "data").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "home")
    with claim_folder("runs/x") as first:
        for name in (tmp_path / "home" / "runs" / "x", "runs/../runs/x"):
            with claim_folder(name) as again:
                assert again is first
    assert not any((tmp_path / "data").iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(claim.os, "pwrite", full)
        with pytest.raises(OSError, match=r"cannot write in .*run \(No space left on device\), so nothing is begun"):
            claim_folder(tmp_path / "new" / "run")
    assert not any(tmp_path.iterdir())
    claim_folder(tmp_path / "new" / "run").release()  # nobody has it


def test_a_place_that_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, *(path for path in tmp_path.parents if path.name.startswith(("pytest-", "popen-")))):
        path.chmod(0o755)
    (tmp_path / "private").mkdir(mode=0o700)
    process, said = _run(_unprivileged, tmp_path / "private" / "run")
    process.join()
    assert os.getuid() != 0 or said.startswith(f"cannot write in {tmp_path / 'private' / 'run'} (Permission denied)")


def test_a_file_is_had_by_one_at_a_time(tmp_path: Path) -> None:
    """Also where the one before renames or removes it."""
    inside: list[int] = []
    most = 0

    def work(number: int) -> None:
        nonlocal most
        for _ in range(5):
            with claim.alone(tmp_path / "file"):
                inside.append(number)
                most = max(most, len(inside))
                time.sleep(0.002)
                if number == 1:
                    (tmp_path / "file").unlink()
                if number == 2:
                    (tmp_path / "file").rename(tmp_path / "renamed")
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == 1
