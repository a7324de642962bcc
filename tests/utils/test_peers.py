"""A process that is killed or fails is named to all others at once, from whichever side the connection is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from lipsim.utils.peers import Peers

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
HERE = socket.gethostname()


def _take_part(rank: int, pipe: Connection) -> None:
    """A process that waits, and does what it is told."""
    peers = Peers(rank, 3, pipe.send)
    if rank == 0:
        pipe.send(peers.listen())
    else:
        peers.join(pipe.recv(), "127.0.0.1")
        pipe.send("joined")
    while True:
        order = pipe.recv()
        if order == "fork":  # a loading process, which outlives it
            if not os.fork():
                time.sleep(5)
                os._exit(0)
            pipe.send("forked")
        elif order == "who":  # until the first has read who the others are
            while [who["rank"] for who in list(peers._connections.values())].count(None) or len(peers._connections) < 2:
                time.sleep(0.005)
            pipe.send("known")
        elif order == "leave":
            peers.leave()
            pipe.send("left")
        else:
            peers.fail(order)


class Three:
    """Three processes in a star."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        first: Any = None
        for rank in range(3):
            here, there = fork.Pipe()
            process = fork.Process(target=_take_part, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
            if rank:
                here.send(first)
                assert here.recv() == "joined"
            else:
                first = here.recv()
        self.first = first
        self.pipes[0].send("who")
        assert self.heard(0) == "known"

    def heard(self, rank: int) -> str:
        assert self.pipes[rank].poll(10), f"process {rank} has heard nothing"
        return str(self.pipes[rank].recv())

    def name(self, rank: int) -> str:
        return f"process {rank} of 3 (pid {self.processes[rank].pid} on {HERE})"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def three() -> Any:
    made = Three()
    yield made
    made.end()


@pytest.mark.parametrize("killed", [0, 2])
def test_a_process_that_is_killed_is_named_to_the_others(killed: int, three: Three) -> None:
    three.pipes[killed].send("fork")
    assert three.heard(killed) == "forked"
    start = time.monotonic()
    os.kill(three.processes[killed].pid or 0, signal.SIGKILL)
    for rank in {0, 1, 2} - {killed}:
        assert three.heard(rank) == f"{three.name(killed)} is gone: it was killed, or its machine was lost"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_says_why(failing: int, three: Three) -> None:
    three.pipes[failing].send("no image file x.png")
    for rank in {0, 1, 2} - {failing}:
        assert three.heard(rank) == f"{three.name(failing)} stopped: no image file x.png"


@pytest.mark.parametrize("reason", [70_000 * "x", 12_000 * "\u9519", 12_000 * "\U0001f600"])
def test_a_long_reason_is_cut_and_not_lost(reason: str, three: Three) -> None:
    three.pipes[1].send(reason)
    for rank in (0, 2):
        assert three.heard(rank) == f"{three.name(1)} stopped: {reason[:4000]}"


def test_a_stranger_that_nests_deeply_ends_nothing(three: Three) -> None:
    with socket.create_connection(("127.0.0.1", three.first["port"])) as stranger:
        stranger.sendall(60_000 * b"[" + b"\n")
        assert stranger.recv(10) == b""
    three.pipes[1].send("no image file x.png")
    assert three.heard(0) == f"{three.name(1)} stopped: no image file x.png"


def test_processes_that_are_done_alarm_nobody(three: Three) -> None:
    with socket.create_connection(("127.0.0.1", three.first["port"])) as stranger:
        stranger.sendall(b'{"rank": 1, "token": "guessed"}\n{"failed": "x"}\n')
        assert stranger.recv(10) == b""
    for rank in (1, 0, 2):
        three.pipes[rank].send("leave")
        assert three.heard(rank) == "left"
        three.processes[rank].kill()
    time.sleep(0.3)
    for rank in range(3):
        assert not three.pipes[rank].poll() or _ended(three.pipes[rank].recv)


def _ended(receive: Callable[[], object]) -> bool:
    try:
        receive()
    except EOFError:
        return True
    return False
