"""Loopback connections carried inside the channel of a plan, for llama.cpp's RPC.

libllama dials a port of its own machine; what it says travels through the encrypted channel to
another rank, which says it to the RPC server of its machine, and back. One connection a link at a
time, as libllama uses them. Messages between two ranks:

    open  libllama dialled             n: the connection's number
    data  a piece of what was said     n;  frame: at most PIECE_BYTES
    shut  that end closed              n
    beat  still here                   each BEAT_S, whatever the engines compute meanwhile

The channel's sockets belong to the thread that calls `turn`, and to it alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edged import Channel, EngineError, PeerError, ProtocolError

PIECE_BYTES = 64 << 10
QUEUED_BYTES_MAX = 4 << 20  # for a local end that reads slowly; beyond, the channel waits
BEAT_S = 5.0
WAITING_PIECES = 64  # that a channel may hold before a beat
BYTES_PER_SECOND = 100_000  # of the slowest link
CONNECT_S = 10.0  # until a server that was just started listens
RECEIVE_S = 1.0  # for a message that was seen to wait
# A busy link is looked at without a pause, an idle one a few times a second: (idle for, then wait).
PAUSES_S = ((0.002, 0.0), (0.1, 0.0005), (2.0, 0.002), (float("inf"), 0.02))
LOOPBACK = "127.0.0.1"
LISTENING, NOBODY = "0A", "00000000:0000"  # in /proc/net/tcp


@dataclass(slots=True)
class Link:
    """One rank: a listening end (libllama's side) or a port to dial (the server's side), and what is open."""

    rank: int
    listener: socket.socket | None = None
    port: int = 0
    end: socket.socket | None = None
    number: int = 0  # of the connection that is or was open
    queued: bytearray = field(default_factory=bytearray)  # for the local end
    heard: float = 0.0  # monotonic


class Tunnels:
    """The links of one rank. `turn` moves what can be moved; `close` shuts every local end."""

    def __init__(self, channel: Channel, links: Sequence[Link], timeout_s: float) -> None:
        self._channel, self._links = channel, {link.rank: link for link in links}
        self._silence_s = timeout_s + WAITING_PIECES * PIECE_BYTES / BYTES_PER_SECOND
        now = time.monotonic()
        for link in links:
            link.heard = now
        self._moved = self._beat = now

    def turn(self) -> None:
        """Move what waits on either side, after a pause that grows while nothing does.

        PeerError when a rank has been silent for too long, ProtocolError on what is no message of ours.
        """
        now = time.monotonic()
        if now >= self._beat:
            self._beat = now + BEAT_S
            for rank in self._links:
                self._channel.send(rank, {"k": "beat"})
        has_moved = [self._take(link, now) for link in self._links.values()]
        idle_s = 0.0 if any(has_moved) else now - self._moved
        pause_s = next(pause for limit, pause in PAUSES_S if idle_s < limit)
        if self._local(pause_s) or any(has_moved):
            self._moved = now

    def close(self) -> None:
        for link in self._links.values():
            self._shut(link)
            if link.listener is not None:
                link.listener.close()

    # --- from the channel ---

    def _take(self, link: Link, now: float) -> bool:
        """Messages of one rank, as far as its local end has room; True when there was one."""
        has_moved = False
        while len(link.queued) < QUEUED_BYTES_MAX and self._channel.poll(link.rank, 0):
            header, frames = self._channel.receive(link.rank, RECEIVE_S)
            link.heard = now
            has_moved |= self._handle(link, header, frames)
        if now - link.heard > self._silence_s and not link.queued:
            raise PeerError(f"rank {link.rank} was silent for {self._silence_s:.0f} s", rank=link.rank)
        return has_moved

    def _handle(self, link: Link, header: Mapping[str, Any], frames: Sequence[memoryview]) -> bool:
        kind, number = header.get("k"), header.get("n")
        if kind == "beat":
            return False
        if kind not in ("open", "data", "shut") or type(number) is not int:
            raise ProtocolError(f"expected a message of the tunnel, got {str(kind)[:32]!r}")
        if kind == "open":
            if link.listener is not None:
                raise ProtocolError("expected rank 0 alone to open connections")
            self._shut(link)
            link.number, link.end = number, _dial(link.port)
        elif number == link.number and link.end is not None:  # else of a connection that is over
            if kind == "shut":
                self._shut(link)
            elif len(frames) != 1 or not 0 < frames[0].nbytes <= PIECE_BYTES:
                raise ProtocolError(f"expected a piece of at most {PIECE_BYTES} bytes")
            else:
                link.queued += frames[0]
        return True

    # --- from this machine ---

    def _local(self, wait_s: float) -> bool:
        """Accept, read and write on loopback; True when something was done."""
        reading: dict[socket.socket, Link] = {}
        writing: dict[socket.socket, Link] = {}
        for link in self._links.values():
            if link.end is not None:
                reading[link.end] = link
                if link.queued:
                    writing[link.end] = link
            elif link.listener is not None:
                reading[link.listener] = link
        readable, writable, _ = select.select(list(reading), list(writing), [], wait_s)
        for sock in writable:
            self._write(writing[sock])
        for sock in readable:
            link = reading[sock]
            if sock is link.listener:
                self._accept(link)
            elif sock is link.end:
                self._read(link, sock)
        return bool(readable or writable)

    def _accept(self, link: Link) -> None:
        assert link.listener is not None
        end, address = link.listener.accept()
        if _uid_of(address, end.getsockname()) != os.getuid():
            end.close()  # another user of this machine, who has no business with that rank
            return
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.end, link.number = end, link.number + 1
        self._channel.send(link.rank, {"k": "open", "n": link.number})

    def _read(self, link: Link, end: socket.socket) -> None:
        try:
            piece = end.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if piece:
            self._channel.send(link.rank, {"k": "data", "n": link.number}, [piece])
        else:
            self._shut(link)
            self._channel.send(link.rank, {"k": "shut", "n": link.number})

    def _write(self, link: Link) -> None:
        assert link.end is not None
        with contextlib.suppress(OSError):  # the end is gone; reading it says so
            del link.queued[: link.end.send(link.queued)]

    def _shut(self, link: Link) -> None:
        if link.end is not None:
            link.end.close()
        link.end = None
        link.queued.clear()


def listening(rank: int) -> Link:
    """A link whose port on loopback stands for `rank`; the kernel chooses the port."""
    listener = socket.create_server((LOOPBACK, 0), backlog=1)
    return Link(rank, listener, listener.getsockname()[1])


def free_port() -> int:
    """A port of loopback that was free a moment ago; who listens there is looked at before it is used."""
    with socket.create_server((LOOPBACK, 0)) as found:
        return int(found.getsockname()[1])


def _dial(port: int) -> socket.socket:
    """A connection to this user's own server; EngineError where it is somebody else's, or nobody's."""
    until = time.monotonic() + CONNECT_S
    while (owner := _uid_of((LOOPBACK, port), None)) is None:
        if time.monotonic() > until:
            raise EngineError(f"expected llama.cpp's RPC server on {LOOPBACK}:{port}; nobody listens")
        time.sleep(0.01)  # until its thread listens; ggml tells nobody
    if owner != os.getuid():
        raise EngineError(f"expected llama.cpp's RPC server on {LOOPBACK}:{port}; another user listens there")
    end = socket.create_connection((LOOPBACK, port), CONNECT_S)
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def _uid_of(local: tuple[str, int], remote: tuple[str, int] | None) -> int | None:
    """The user whose socket has this local and remote address (None: it listens); None where none is seen."""
    wanted = (_hex(local), _hex(remote) if remote else NOBODY)
    try:
        with open("/proc/self/net/tcp", encoding="ascii") as table:
            rows = [line.split() for line in table][1:]
    except OSError as error:
        raise EngineError(
            f"expected to see in /proc/net/tcp whose a connection is; {error.strerror}",
            remedy="do not use llama_rpc on this device",
        ) from error
    for row in rows:
        if (row[1], row[2]) == wanted and (remote or row[3] == LISTENING):
            return int(row[7])
    return None


def _hex(address: tuple[str, int]) -> str:
    """An IPv4 address as /proc/net/tcp writes it: the address in the host's byte order."""
    number = int.from_bytes(socket.inet_aton(address[0]), "little" if _IS_LITTLE else "big")
    return f"{number:08X}:{address[1]:04X}"


_IS_LITTLE = sys.byteorder == "little"
