"""Headers on UNIX streams: a 4-byte big-endian length, then one header of `edged.wire`."""

from __future__ import annotations

import asyncio
import socket
import struct

from . import wire
from .errors import ProtocolError

_LENGTH = struct.Struct(">I")


def frame(packed: bytes) -> bytes:
    return _LENGTH.pack(len(packed)) + packed


def length_of(prefix: bytes) -> int:
    length: int = _LENGTH.unpack(prefix)[0]
    if not 0 < length <= wire.HEADER_BYTES_MAX:
        raise ProtocolError(f"expected a header of 1 to {wire.HEADER_BYTES_MAX} bytes; {length} announced")
    return length


async def read(reader: asyncio.StreamReader) -> wire.Message | None:
    """The next message, or None at the end of the stream."""
    try:
        prefix = await reader.readexactly(_LENGTH.size)
        return wire.unpack(await reader.readexactly(length_of(prefix)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive(sock: socket.socket) -> wire.Message | None:
    """Blocking `read`; socket.timeout passes through."""
    prefix = _exactly(sock, _LENGTH.size)
    packed = _exactly(sock, length_of(prefix)) if prefix else b""
    return wire.unpack(packed) if packed else None


def _exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes, or nothing where the stream ends before them."""
    parts: list[bytes] = []
    while count:
        try:
            part = sock.recv(min(count, 1 << 20))
        except ConnectionError:
            return b""
        if not part:
            return b""
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
