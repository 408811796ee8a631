"""The tunnel of llama.cpp's RPC: bytes arrive as they were said; strangers and silence do not pass."""

from __future__ import annotations

import hashlib
import os
import queue
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from edged_plugins import _llama_tunnel as tunnel

from edged import EngineError, PeerError, ProtocolError

GUARD_S = 30.0


class Pipe:
    """One end of an in-memory channel between two ranks."""

    size, bytes_sent = 2, 0

    def __init__(self, rank: int, boxes: Sequence[queue.Queue[Any]]) -> None:
        self.rank, self._boxes = rank, boxes

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        self._boxes[to].put((dict(header), [memoryview(bytes(frame)) for frame in frames]))

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        return self._boxes[self.rank].get(timeout=timeout_s)

    def poll(self, source: int, timeout_s: float) -> bool:
        return not self._boxes[self.rank].empty()


@pytest.fixture
def boxes() -> list[queue.Queue[Any]]:
    return [queue.Queue(), queue.Queue()]


@pytest.fixture
def server() -> Iterator[int]:
    """A server on loopback that says back what it hears, one connection after the other; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        is_over = threading.Event()
        serving = threading.Thread(target=_say_back, args=(listener, is_over))
        serving.start()
        yield listener.getsockname()[1]
        is_over.set()
        serving.join(GUARD_S)


def _say_back(listener: socket.socket, is_over: threading.Event) -> None:
    listener.settimeout(0.05)
    while not is_over.is_set():
        try:
            end, _ = listener.accept()
        except TimeoutError:
            continue
        with end:
            end.settimeout(GUARD_S)
            while piece := end.recv(1 << 16):
                end.sendall(piece)


@pytest.fixture
def carried(boxes: list[queue.Queue[Any]], server: int) -> Iterator[int]:
    """Both ends of a tunnel, each turned by a thread of its own; the port that stands for the server."""
    near, far = tunnel.listening(1), tunnel.Link(0, port=server)
    ends = [tunnel.Tunnels(Pipe(0, boxes), [near], GUARD_S), tunnel.Tunnels(Pipe(1, boxes), [far], GUARD_S)]
    is_over = threading.Event()

    def turn(end: tunnel.Tunnels) -> None:
        while not is_over.is_set():
            end.turn()
        end.close()

    threads = [threading.Thread(target=turn, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    yield near.port
    is_over.set()
    for thread in threads:
        thread.join(GUARD_S)


def test_bytes_come_back_as_they_were_said_on_one_connection_after_the_other(carried: int) -> None:
    for size in (1, 1000, 3 * tunnel.PIECE_BYTES + 7, 9 << 20):
        said = os.urandom(size)
        with socket.create_connection(("127.0.0.1", carried), GUARD_S) as end:
            sending = threading.Thread(target=end.sendall, args=(said,))
            sending.start()
            heard = b""
            while len(heard) < size:
                heard += end.recv(1 << 20)
            sending.join(GUARD_S)
        assert hashlib.sha256(heard).digest() == hashlib.sha256(said).digest()


def test_another_users_connection_is_not_carried(
    boxes: list[queue.Queue[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = tunnel.listening(1)
    end = tunnel.Tunnels(Pipe(0, boxes), [near], GUARD_S)
    monkeypatch.setattr(tunnel, "_uid_of", lambda local, remote: os.getuid() + 1)
    with socket.create_connection(("127.0.0.1", near.port), GUARD_S) as stranger:
        stranger.settimeout(0.05)
        while near.end is None and not _is_over(stranger):
            end.turn()
    assert near.end is None
    assert {boxes[1].get()[0]["k"] for _ in range(boxes[1].qsize())} <= {"beat"}
    end.close()


def _is_over(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except TimeoutError:
        return False


def test_a_server_of_another_user_is_not_dialled(monkeypatch: pytest.MonkeyPatch, server: int) -> None:
    monkeypatch.setattr(tunnel, "_uid_of", lambda local, remote: os.getuid() + 1)
    with pytest.raises(EngineError, match="another user listens"):
        tunnel._dial(server)


def test_who_a_connection_belongs_to_is_seen(server: int) -> None:
    assert tunnel._uid_of(("127.0.0.1", server), None) == os.getuid()
    assert tunnel._uid_of(("127.0.0.1", tunnel.free_port()), None) is None


@pytest.mark.parametrize(
    ("header", "frames"),
    [
        ({"k": "shell", "n": 1}, []),
        ({"k": "data", "n": "1"}, []),
        ({"k": "open", "n": 1}, []),
        ({"k": "data", "n": 1}, []),
        ({"k": "data", "n": 1}, [b""]),
        ({"k": "data", "n": 1}, [bytes(tunnel.PIECE_BYTES + 1)]),
    ],
)
def test_what_is_no_message_of_the_tunnel_is_refused(
    boxes: list[queue.Queue[Any]], header: dict[str, Any], frames: list[bytes]
) -> None:
    near = tunnel.listening(1)
    end = tunnel.Tunnels(Pipe(0, boxes), [near], GUARD_S)
    with socket.create_connection(("127.0.0.1", near.port), GUARD_S):
        while near.end is None:
            end.turn()
        Pipe(1, boxes).send(0, header, frames)
        with pytest.raises(ProtocolError):
            end.turn()
        end.close()


def test_a_silent_rank_is_an_error_that_names_it(
    boxes: list[queue.Queue[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = tunnel.listening(1)
    end = tunnel.Tunnels(Pipe(0, boxes), [near], 30.0)
    Pipe(1, boxes).send(0, {"k": "beat"})
    end.turn()
    now = tunnel.time.monotonic() + 30 + tunnel.WAITING_PIECES * tunnel.PIECE_BYTES / tunnel.BYTES_PER_SECOND
    monkeypatch.setattr(tunnel.time, "monotonic", lambda: now)
    with pytest.raises(PeerError, match="rank 1 was silent"):
        end.turn()
    end.close()
