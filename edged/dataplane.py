"""One encrypted connection for one transfer, and how fast it may go.

ZeroMQ with CURVE and a fresh key pair on each side; ZAP admits exactly the other side's key. Either
side may be the one that dials. The connection ends with the transfer: whoever comes back starts anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from . import wire
from .errors import ConfigError, EdgedError, PeerError, ProtocolError, TrustError
from .transport import ZAP_ENDPOINT, answer_zap, bind, endpoint, secure_client, secure_server

PIECE_BYTES = 256 << 10  # the unit of progress, and of what a socket queues
FRAME_BYTES_MAX = PIECE_BYTES + (16 << 10)
QUEUE_MESSAGES = 64  # 16 MiB of pieces
ALIVE_S = 2.0
LINGER_MS = 1000  # for the last word
KEY_BYTES = 32


class GoneError(PeerError):
    """The connection to the peer ended."""


@dataclass(frozen=True, slots=True)
class Dial:
    address: str
    port: int
    public_key: bytes  # the listener's


@dataclass(frozen=True, slots=True)
class Listen:
    interfaces: tuple[str, ...] = ()
    ports: tuple[int, int] = (0, 1)  # half-open; (0, 1) leaves the choice to the kernel


@dataclass(frozen=True, slots=True)
class Ends:
    """Who talks to whom: our keys (public, secret), and either `dial` or `listen` for `peer_key`."""

    keys: tuple[bytes, bytes] = field(repr=False)
    dial: Dial | None
    listen: Listen | None
    peer_key: bytes | None
    node: str  # the other side's name, for messages


class Meter:
    """Counts bytes and says when the next may go, at `bytes_s` or as fast as the link."""

    def __init__(self, bytes_s: int | None) -> None:
        self.bytes = 0
        self._bytes_s = bytes_s
        self._begun: float | None = None
        self._last = self._due = 0.0

    def pause_s(self) -> float:
        return max(0.0, self._due - time.monotonic())

    def owe(self, count: int) -> None:
        """Plan `count` bytes; the next may go when these have had their time."""
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if self._bytes_s:
            self._due = max(self._due, now) + count / self._bytes_s

    def count(self, count: int) -> None:
        self.bytes += count
        self._last = time.monotonic()

    def result(self) -> dict[str, Any]:
        seconds = max(0.0, self._last - self._begun) if self._begun is not None else 0.0
        return {
            "bytes": self.bytes,
            "seconds": seconds,
            "bytes_s": self.bytes / seconds if seconds else None,
        }


class Link:
    """The connection. A context manager; every call comes from one thread."""

    def __init__(self, ends: Ends) -> None:
        if (ends.dial is None) == (ends.listen is None) or (ends.listen and not ends.peer_key):
            raise ConfigError("expected one end that dials and one that listens for a key")
        given = [*ends.keys, ends.dial.public_key if ends.dial else ends.peer_key]
        if any(not key or len(key) != KEY_BYTES for key in given):
            raise TrustError(f"expected keys of {KEY_BYTES} bytes for a transfer")
        self.port = 0
        self.node = ends.node
        self._ends = ends
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.DEALER if ends.dial else zmq.ROUTER)
        self._peer: list[bytes] | None = [] if ends.dial else None  # what a message to it starts with
        self._monitor: zmq.Socket[bytes] | None = None
        self._zap: threading.Thread | None = None
        self._sent_at = time.monotonic()

    def __enter__(self) -> Link:
        try:
            self._sock.maxmsgsize = FRAME_BYTES_MAX
            self._sock.sndhwm = self._sock.rcvhwm = QUEUE_MESSAGES
            if self._ends.dial:
                self._connect(self._ends.dial)
            elif self._ends.listen and self._ends.peer_key:
                self._bind(self._ends.listen, self._ends.peer_key)
        except BaseException:
            self._close(0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(0 if isinstance(error, GoneError) else LINGER_MS)

    def wait(self, timeout_s: float) -> None:
        """Until the other side is there to be sent to."""
        if self._peer is not None:
            return
        message, _ = self.receive(timeout_s)
        if message is None:
            raise PeerError(f"expected {self.node} to connect within {timeout_s:.0f} s; it did not")
        if message.kind != "open":
            raise ProtocolError(f"expected {self.node} to greet first")

    def send(self, kind: str, body: dict[str, Any], frame: bytes | None, timeout_s: float) -> None:
        """One message; PeerError when the other side takes none for `timeout_s`."""
        if self._peer is None:
            raise PeerError(f"expected {self.node} to connect; it did not")
        frames = [*self._peer, wire.pack(kind, body)] + ([] if frame is None else [frame])
        self._await_room(timeout_s)
        try:
            self._sock.send_multipart(frames, copy=frame is None)
        except zmq.Again as error:
            raise PeerError(f"expected {self.node} to read within {timeout_s:.0f} s; it did not") from error
        except zmq.ZMQError as error:
            raise GoneError(f"the connection to {self.node} ended") from error
        self._sent_at = time.monotonic()

    def _await_room(self, timeout_s: float) -> None:
        """Let the next send wait that long. A dialler also watches for the end of its connection, after
        which libzmq would let it wait for nothing."""
        self._sock.sndtimeo = max(1, int(timeout_s * 1000))
        if self._monitor is None:
            return
        until = time.monotonic() + timeout_s
        while not self._sock.poll(0, zmq.POLLOUT) and time.monotonic() < until:
            poller = zmq.Poller()
            poller.register(self._sock, zmq.POLLOUT)
            poller.register(self._monitor, zmq.POLLIN)
            if self._monitor in dict(poller.poll(int(timeout_s * 1000) + 1)):
                self._read_event()
        self._sock.sndtimeo = 1

    def fail(self, error: EdgedError) -> None:
        """Tell the other side why this one gives up, if it can be told."""
        with contextlib.suppress(PeerError):
            self.send("error", {"code": error.code, "message": str(error)[:500]}, None, 0.001)

    def keep_alive(self) -> None:
        """Say that this side works on, where it has not said anything for a while."""
        if self._peer is None or time.monotonic() - self._sent_at < ALIVE_S:
            return
        try:
            self.send("alive", {}, None, 0.001)
        except GoneError:
            raise
        except PeerError:
            self._sent_at = time.monotonic()  # its queue is full: it has enough to read

    def receive(self, timeout_s: float) -> tuple[wire.Message | None, Any]:
        """The next message and its raw frame (or None); (None, None) when none came in time.

        GoneError when the connection ended, TrustError when the other side refuses our key.
        """
        until = time.monotonic() + timeout_s
        while True:
            self.keep_alive()
            left = min(max(0.0, until - time.monotonic()), ALIVE_S)
            ready = self._poll(left)
            if self._sock in ready:
                return self._read()
            if self._monitor in ready:
                self._read_event()
            if time.monotonic() >= until:
                return None, None

    def _poll(self, timeout_s: float) -> set[Any]:
        poller = zmq.Poller()
        poller.register(self._sock, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        return {sock for sock, _ in poller.poll(int(timeout_s * 1000) + 1)}

    def _read(self) -> tuple[wire.Message, Any]:
        frames = self._sock.recv_multipart(copy=False)
        if self._ends.listen:
            self._peer = [frames.pop(0).bytes]
        if not 1 <= len(frames) <= 2:
            raise ProtocolError(f"expected a header and at most one frame from {self.node}")
        message = wire.unpack(frames[0].buffer)
        return message, frames[1].buffer if len(frames) == 2 else None

    def _read_event(self) -> None:
        assert self._monitor is not None
        event = parse_monitor_message(self._monitor.recv_multipart())["event"]
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise TrustError(
                f"expected {self.node} to admit this transfer's key; it refuses it",
                remedy="pair with `edged invite` and `edged join`",
            )
        reason = self._last_words()
        raise GoneError(f"the connection to {self.node} ended{f': {reason}' if reason else ''}")

    def _last_words(self) -> str:
        """Why the other side gave up, where it said so and the end of the connection was seen first."""
        while self._sock.poll(0, zmq.POLLIN):
            message, _ = self._read()
            if message.kind == "error":
                return str(message.body.get("message", ""))[:500]
        return ""

    # --- opening and closing ---

    def _connect(self, dial: Dial) -> None:
        secure_client(self._sock, self._ends.keys, dial.public_key)
        self._monitor = self._sock.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._sock.connect(endpoint(dial.address, dial.port))
        self.send("open", {}, None, ALIVE_S)

    def _bind(self, listen: Listen, peer_key: bytes) -> None:
        zap = self._context.socket(zmq.REP)
        zap.linger = 0
        zap.bind(ZAP_ENDPOINT)
        self._zap = threading.Thread(target=_answer, args=(zap, peer_key), name="zap", daemon=True)
        self._zap.start()
        secure_server(self._sock, self._ends.keys[1])
        self._sock.router_mandatory = True  # a peer that left is an error, not silence
        self.port = bind(self._sock, listen.interfaces, range(*listen.ports))

    def _close(self, linger_ms: int) -> None:
        if self._monitor is not None:
            self._sock.disable_monitor()
            self._monitor.close(0)
        self._sock.close(linger_ms)
        self._context.term()
        if self._zap is not None:
            self._zap.join()


def _answer(zap: zmq.Socket[bytes], peer_key: bytes) -> None:
    """Answer libzmq's question for each handshake until the context ends."""
    try:
        while True:
            frames = zap.recv_multipart()
            zap.send_multipart(answer_zap(frames, lambda key: "peer" if key == peer_key else None))
    except zmq.ContextTerminated:
        pass
    finally:
        zap.close(0)
