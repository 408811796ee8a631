"""Headers on a stream: whole, in order, bounded, however the bytes arrive."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from edged import framing, wire
from edged.errors import ProtocolError

MESSAGES = [wire.pack("a"), wire.pack("b", {"x": b"\0" * 70_000}, request=1), wire.pack("c", answers=2)]
STREAM = b"".join(map(framing.frame, MESSAGES))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def read_all(parts: list[bytes]) -> list[wire.Message]:
    reader = asyncio.StreamReader()
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    found = []
    while (message := await framing.read(reader)) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize("size", [1, 3, 4, 5, 4096, len(STREAM)])
def test_messages_come_whole_and_in_order_however_they_are_cut(size: int) -> None:
    parts = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert asyncio.run(read_all(parts)) == [wire.unpack(packed) for packed in MESSAGES]


@pytest.mark.parametrize("kept", [0, 3, 4, 10])
def test_a_stream_that_ends_early_ends(pair: tuple[socket.socket, socket.socket], kept: int) -> None:
    ours, theirs = pair
    whole = framing.frame(wire.pack("b", {"x": b"\0" * 100}))
    theirs.sendall(framing.frame(wire.pack("a")) + whole[:kept])
    theirs.shutdown(socket.SHUT_WR)
    assert framing.receive(ours) == wire.Message("a", {})
    assert framing.receive(ours) is None
    assert asyncio.run(read_all([whole[:kept]])) == []


def test_blocking_and_async_read_the_same(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sending = threading.Thread(target=lambda: (theirs.sendall(STREAM), theirs.shutdown(socket.SHUT_WR)))
    sending.start()
    found = []
    while (message := framing.receive(ours)) is not None:
        found.append(message)
    sending.join()
    assert found == asyncio.run(read_all([STREAM]))


@pytest.mark.parametrize("length", [0, wire.HEADER_BYTES_MAX + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_anything_is_kept(
    pair: tuple[socket.socket, socket.socket], length: int
) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack(">I", length))
    with pytest.raises(ProtocolError, match="1 to 4194304 bytes"):
        framing.receive(ours)
    with pytest.raises(ProtocolError):
        asyncio.run(read_all([struct.pack(">I", length)]))


def test_the_longest_header_passes(pair: tuple[socket.socket, socket.socket]) -> None:
    assert framing.length_of(struct.pack(">I", wire.HEADER_BYTES_MAX)) == wire.HEADER_BYTES_MAX


def test_silence_is_the_caller_s_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].settimeout(0.01)
    with pytest.raises(TimeoutError):
        framing.receive(pair[0])


def test_a_reset_connection_is_an_end(pair: tuple[socket.socket, socket.socket]) -> None:
    """Closing with bytes unread resets a UNIX stream's other end."""
    ours, theirs = pair
    ours.sendall(b"unread")
    theirs.close()
    assert framing.receive(ours) is None
