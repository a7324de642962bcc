"""Processes that work together know at once when one of them is gone, whatever they are doing."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

# Seconds after which a connection to a machine that has vanished counts as closed; of a process that dies, the system
# closes it at once.
_IDLE, _INTERVAL, _PROBES = 15, 5, 4
_LONGEST = 65_536  # bytes of a message
_MOST_TEXT = 4_000  # letters of a reason, each of up to 12 bytes in a message
_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A process that was forked, for loading say, must not keep the connections of its parent open."""
    for connection in list(_open):
        connection.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_close_in_child)


class Peers:
    """A star of connections between processes: each other one has one to the first.

    The system closes the connection of a process that dies, also by ``kill -9``, and the first process tells the
    others. Nothing is sent while all is well.

    Args:
        rank: of this process; 0 is the first.
        size: number of processes.
        report: called once, from a thread, with a sentence about the process that is gone or has failed.
    """

    def __init__(self, rank: int, size: int, report: Callable[[str], None]) -> None:
        self.rank, self.size, self._report = rank, size, report
        self._selector = selectors.DefaultSelector()
        self._connections: dict[socket.socket, dict[str, Any]] = {}
        self._token = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        _open.update((self._wake, self._woken))
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peers")
        self._server: socket.socket | None = None

    def listen(self) -> dict[str, Any]:
        """As the first process: wait for the others, in the background; what they need to know for :meth:`join`."""
        self._token = secrets.token_hex(16)
        self._server = socket.create_server(("", 0), backlog=self.size)
        _open.add(self._server)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread.start()
        return {**_myself(0), "port": self._server.getsockname()[1], "token": self._token}

    def join(self, first: dict[str, Any], address: str) -> None:
        """As another process: connect to the first one.

        Args:
            first: what its :meth:`listen` returned.
            address: of its machine.

        Raises:
            OSError: it cannot be reached.
        """
        connection = socket.create_connection((address, first["port"]), timeout=20)
        self._add(connection, first)
        _send(connection, {**_myself(self.rank), "token": first["token"]})
        self._thread.start()

    def fail(self, message: str) -> None:
        """Tell the others that this process stops, and why."""
        self._end({"failed": message[:_MOST_TEXT]})

    def leave(self) -> None:
        """Tell the others that this process is done."""
        self._end({"done": True})

    def _end(self, message: dict[str, Any]) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            for connection in list(self._connections):
                _send(connection, message)
        if self._thread.is_alive():
            self._wake.send(b".")
            if threading.current_thread() is not self._thread:
                self._thread.join(5)
        for one in (*self._connections, self._server, self._wake, self._woken):
            if one is not None:
                one.close()
        self._selector.close()

    def _add(self, connection: socket.socket, who: dict[str, Any]) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _INTERVAL), ("TCP_KEEPCNT", _PROBES)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[connection] = {**who, "received": b""}
        _open.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _watch(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select():
                source = key.fileobj
                if self._ended.is_set() or source is self._woken:
                    return
                if source is self._server:
                    self._accept()
                elif isinstance(source, socket.socket) and self._hear(source):
                    return

    def _accept(self) -> None:
        assert self._server is not None
        connection, _ = self._server.accept()
        self._add(connection, {"rank": None})

    def _hear(self, connection: socket.socket) -> bool:
        """Read what a process says; whether that was the end."""
        who = self._connections[connection]
        try:
            received = connection.recv(_LONGEST)
        except OSError:
            received = b""
        who["received"] += received
        *lines, who["received"] = who["received"].split(b"\n")
        for line in lines:
            message = _parse(line)
            if who["rank"] is None and message.get("token") != self._token:
                self._drop(connection)  # a stranger
                return False
            if who["rank"] is None:
                who.update({name: message.get(name) for name in ("rank", "host", "pid")})
            elif "gone" in message:
                return self._tell(connection, str(message["gone"]))
            elif "failed" in message:
                return self._tell(connection, f"{self._name(who)} stopped: {message['failed']}")
            elif "done" in message:
                self._drop(connection)
                return False
        if received and len(who["received"]) < _LONGEST:
            return False
        if who["rank"] is None:
            self._drop(connection)
            return False
        return self._tell(connection, f"{self._name(who)} is gone: it was killed, or its machine was lost")

    def _tell(self, source: socket.socket, sentence: str) -> bool:
        with self._lock:
            if self._ended.is_set():
                return True
            for connection in self._connections:
                if connection is not source:
                    _send(connection, {"gone": sentence})
        self._report(sentence)
        return True

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()

    def _name(self, who: dict[str, Any]) -> str:
        return f"process {who['rank']} of {self.size} (pid {who['pid']} on {who['host']})"


def _myself(rank: int) -> dict[str, Any]:
    return {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # it is gone, too: whoever listens to it notices
        return


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):  # a stranger's, nested ever more deeply
        return {}
    return message if isinstance(message, dict) else {}
