"""The client's end of the control socket: blocking, for the command line and for scripts.

    with connect(None) as client:
        print(client.call("status"))

One request at a time. Frames are those of `edged.framing`, kinds and bodies those of `edged.control`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import socket
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from . import framing, wire
from .errors import ConfigError, NoDaemonError, ProtocolError, TrustError
from .identity import SYSTEM_SOCKET, Home, default_home

CONNECT_S = 5.0
ANSWER_S = 120.0  # longest silence of a call that does not stream; `join` waits for two daemons
ADDRESS_FILE = "control.addr"  # where a daemon that listens outside its home says so
Events = Generator[dict[str, Any], None, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A control socket, and the command that starts a daemon there."""

    path: Path
    start: str


def endpoint_of(home: Home) -> Endpoint:
    """Where the daemon of `home` listens, running or not."""
    path, where = home.control_socket, f"--home {shlex.quote(str(home.path))}"
    with contextlib.suppress(OSError, ValueError):
        path = Path((home.path / ADDRESS_FILE).read_text().strip() or path)
    start = f"edged run {where}"
    is_initialised = os.access(home.key_file, os.F_OK)  # False, too, where this user may not look
    return Endpoint(path, start if is_initialised else f"edged init {where} && {start}")


def find(chosen: Path | None) -> Endpoint:
    """`chosen` (--home), else EDGED_HOME, else the user's own node if it runs, else the system
    service, else the user's own."""
    home = Home(chosen) if chosen is not None else default_home()
    own = endpoint_of(home)
    if chosen is not None or os.environ.get("EDGED_HOME"):
        return own
    if _refusal(own.path) is None:
        return own
    refusal = _refusal(SYSTEM_SOCKET)
    is_closed_to_us = isinstance(refusal, PermissionError) and not os.access(home.key_file, os.F_OK)
    if refusal is None or is_closed_to_us:
        return Endpoint(SYSTEM_SOCKET, "systemctl start edged")
    return own


def connect(chosen: Path | None = None) -> Client:
    """A client of the daemon that `find` finds; NoDaemonError when none answers there."""
    return Client(find(chosen))


class Client:
    """One connection. After an error of the connection it is closed; make another."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._numbers = itertools.count(1)
        try:
            _check_owner(endpoint.path)
            self._sock = _open(endpoint.path)
        except PermissionError as error:
            raise TrustError(
                f"expected access to the daemon at {endpoint.path}; permission denied",
                remedy="ask its owner to add you to the group edged, or choose another --home",
            ) from error
        except OSError as error:
            raise NoDaemonError(
                f"expected a daemon at {endpoint.path}; {error.strerror or error}",
                remedy=f"start one: {endpoint.start}",
            ) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def call(
        self, kind: str, body: Mapping[str, Any] | None = None, *, silence_s: float | None = ANSWER_S
    ) -> dict[str, Any]:
        """The document that answers one request; its events are not looked at."""
        events = self.stream(kind, body, silence_s=silence_s)
        while True:
            try:
                next(events)
            except StopIteration as end:
                document: dict[str, Any] = end.value
                return document

    def stream(
        self,
        kind: str,
        body: Mapping[str, Any] | None = None,
        fds: Sequence[int] = (),
        *,
        silence_s: float | None = None,
    ) -> Events:
        """Yield the events of one request, return its document, raise the error the daemon answers.

        `fds`: open files that travel with the request. NoDaemonError when the daemon ends before its
        answer, or says nothing for `silence_s`.
        """
        number = next(self._numbers)
        self._sock.settimeout(silence_s)
        self._send(kind, body or {}, number, fds)
        while True:
            message = self._receive()
            if message.answers not in (number, 0):  # what is left of a request that was given up
                continue  # 0: the connection itself is refused
            if message.kind == "event":
                yield message.body
            elif message.kind == "ok":
                return message.body
            elif message.kind == "error":
                wire.raise_error(message.body)
            else:
                raise ProtocolError(f"expected an event, ok or error; {message.kind!r} came")

    def _send(self, kind: str, body: Mapping[str, Any], number: int, fds: Sequence[int]) -> None:
        try:
            framed = framing.frame(wire.pack(kind, body, request=number))
        except UnicodeEncodeError as error:
            raise ConfigError("expected UTF-8 text in the arguments", remedy="check the terminal") from error
        try:
            sent = socket.send_fds(self._sock, [framed], fds) if fds else 0
            self._sock.sendall(framed[sent:])
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> wire.Message:
        try:
            message = framing.receive(self._sock)
        except TimeoutError as error:
            self.close()
            raise NoDaemonError(
                f"expected the daemon at {self.endpoint.path} to answer; nothing came",
                remedy="see its log; if it hangs, stop it and start it again",
                code="no-answer",
            ) from error
        except OSError as error:
            raise self._gone() from error
        if message is None:
            raise self._gone()
        return message

    def _gone(self) -> NoDaemonError:
        self.close()
        return NoDaemonError(
            f"expected an answer of the daemon at {self.endpoint.path}; it ended before one came",
            remedy=f"see its log, then start it again: {self.endpoint.start}",
            code="daemon-gone",
        )


def _open(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_S)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def _refusal(path: Path) -> OSError | None:
    """Why nothing answers at `path`; None when something does."""
    try:
        _open(path).close()
    except OSError as error:
        return error
    return None


def _check_owner(path: Path) -> None:
    """Prompts are told to a daemon of this user or of the system, not to whoever was first in /tmp."""
    owner = path.stat().st_uid
    if owner not in (0, os.geteuid()) and os.geteuid() != 0 and path != SYSTEM_SOCKET:
        raise TrustError(f"expected a daemon of this user at {path}; it is of user {owner}")
