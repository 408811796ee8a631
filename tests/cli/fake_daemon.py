"""A daemon that is only a control socket: real framing, answers from a table, requests remembered."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edged import framing, wire
from edged.errors import EdgedError

Emit = Callable[[dict[str, Any]], None]
Answer = Callable[[dict[str, Any], Emit], dict[str, Any]]


class HangUp(Exception):
    """An answer that is none: the connection ends, as when the daemon is killed."""


class FakeDaemon:
    """`answers`: a document by kind, or a function of (body, emit) that makes one or raises."""

    def __init__(self, path: Path, answers: Mapping[str, dict[str, Any] | Answer]) -> None:
        self.answers = dict(answers)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.files: list[bytes] = []  # contents of the files that came along
        self.seen = threading.Condition()
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._spawn(self._accept)

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for sock in (self._listener, *self._connections):
            sock.close()

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The body of the first request of that kind."""
        with self.seen:
            assert self.seen.wait_for(lambda: kind in dict(self.requests), 60), f"no {kind} came"
            return dict(self.requests)[kind]

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, HangUp):
            while (message := self._receive(connection)) is not None:
                self._answer(connection, message)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _receive(self, connection: socket.socket) -> wire.Message | None:
        prefix, fds, _, _ = socket.recv_fds(connection, 4, 4)
        for fd in fds:
            is_readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            with os.fdopen(fd, "rb" if is_readable else "wb") as file:
                self.files.append(file.read() if is_readable else b"")
        if not prefix:
            return None
        assert len(prefix) == 4
        rest = b""
        while len(rest) < framing.length_of(prefix):
            rest += connection.recv(framing.length_of(prefix) - len(rest))
        return wire.unpack(rest)

    def _answer(self, connection: socket.socket, message: wire.Message) -> None:
        with self.seen:
            self.requests.append((message.kind, message.body))
            self.seen.notify_all()

        def emit(event: dict[str, Any]) -> None:
            connection.sendall(framing.frame(wire.pack("event", event, answers=message.request)))

        answer = self.answers[message.kind]
        try:
            document = answer(message.body, emit) if callable(answer) else answer
            packed = wire.pack("ok", document, answers=message.request)
        except EdgedError as error:
            packed = wire.pack_error(error, answers=message.request)
        connection.sendall(framing.frame(packed))
