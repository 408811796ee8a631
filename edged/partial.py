"""A model file of which some chunks are here: `model.part`, and `have`, a bit for each verified chunk.

A bit is written after the data of its chunk, so a killed process loses nothing it had verified. A
power cut may keep a bit and lose the data; hence `have` also notes the mtime of model.part when both
were last flushed in order, and zero while they are written. A set bit is trusted unread only when
that mtime still holds; otherwise every marked chunk is hashed again before it counts.

A bit says that a chunk is as the manifest beside it has it, and nothing of the model's SHA-256: who made
up the manifest made up the chunk. So a manifest with other chunks takes none of the bits over (`rebind`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import wire
from .errors import EdgedError, EngineError
from .models import (
    HAVE,
    HAVE_HEADER_BYTES,
    HAVE_MAGIC,
    MANIFEST,
    MODEL,
    PART,
    has_bit,
    settled_bits,
    unpack_manifest,
    write_entry,
)

FLUSH_BYTES = 64 << 20  # written between two flushes: bounds what a phone must write out at once
DISK_RESERVE_BYTES = 128 << 20  # left free for the device's own work
Tick = Callable[[int], None]  # told the bytes done so far, after each chunk


class Digest:
    """SHA-256 of a whole file and of each of its chunks."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunks: list[bytes] = []
        self._whole = hashlib.sha256()

    def add(self, chunk: memoryview) -> None:
        self._whole.update(chunk)
        self.chunks.append(hashlib.sha256(chunk).digest())

    @property
    def sha256(self) -> str:
        return self._whole.hexdigest()


def digest(fd: int, size: int, chunk_bytes: int, tick: Tick, copy_to: int | None = None) -> Digest:
    """Read `size` bytes once, hashing and, with `copy_to`, writing them; EngineError when fewer come."""
    found, buffer, done = Digest(chunk_bytes), memoryview(bytearray(min(chunk_bytes, size))), 0
    while done < size:
        chunk = read_exactly(fd, buffer[: min(chunk_bytes, size - done)], done)
        if copy_to is not None:
            write_all(copy_to, [chunk], done)
        found.add(chunk)
        done += len(chunk)
        tick(done)
    return found


def read_exactly(fd: int, buffer: memoryview, offset: int) -> memoryview:
    """Fill `buffer` from `offset`."""
    filled = 0
    while filled < len(buffer):
        got = os.preadv(fd, [buffer[filled:]], offset + filled)
        if not got:
            raise EngineError(
                f"expected the model file to reach byte {offset + len(buffer)}; it ends at {offset + filled}",
                remedy="the file was cut short; add it again from a whole one",
            )
        filled += got
    return buffer


def write_all(fd: int, pieces: Iterable[Any], offset: int) -> None:
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            written = os.pwrite(fd, rest, offset)
            offset, rest = offset + written, rest[written:]


def check_disk(folder: Path, needed: int, what: str, command: str = "models") -> None:
    """EngineError unless `needed` bytes fit beside the reserve, before the first one is written.

    `what` is stored ("model 'm'"); `edged COMMAND rm` frees its like.
    """
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < needed + DISK_RESERVE_BYTES:
        raise EngineError(
            f"expected {needed + DISK_RESERVE_BYTES} bytes free for {what}; {free} are",
            remedy=f"free space at {folder}, or remove something with `edged {command} rm`",
        )


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rebind(folder: Path, manifest: wire.Manifest) -> None:
    """Forget a part whose chunks were checked against others than `manifest` has. Before that is written.

    The file goes too: a worker that reads the old part keeps it by its descriptor, and nobody writes the
    new manifest's chunks under it. Chunks that are the same, under another description, stay.
    """
    try:
        before = unpack_manifest((folder / MANIFEST).read_bytes())
    except (OSError, EdgedError):
        before = None
    if before is not None and _chunks(before) == _chunks(manifest):
        return
    (folder / HAVE).unlink(missing_ok=True)
    fsync_folder(folder)  # the bits are gone before anything else changes
    (folder / PART).unlink(missing_ok=True)
    fsync_folder(folder)


def _chunks(manifest: wire.Manifest) -> tuple[object, ...]:
    return manifest.sha256, manifest.size, manifest.chunk_bytes, manifest.chunks


class Partial:
    """The part of one model in its folder, which the caller holds locked."""

    def __init__(self, folder: Path, manifest: wire.Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        count = len(manifest.chunks)
        settled = settled_bits(folder, count)
        self.is_settled = settled is not None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._part = os.open(folder / PART, flags, 0o600)
        self._have = os.open(folder / HAVE, flags, 0o600)
        self._bits = bytearray(settled if settled is not None else self._unsettled_bits(count))
        self._unflushed = 0

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._part)
        os.close(self._have)

    def missing(self, chunks: Sequence[int]) -> list[int]:
        return [index for index in chunks if not has_bit(self._bits, index)]

    def length(self, index: int) -> int:
        chunk_bytes = self._manifest.chunk_bytes
        return min(chunk_bytes, self._manifest.size - index * chunk_bytes)

    def open_for_writing(self, tick: Tick) -> None:
        """Say on disk that the bits are no longer backed by a flush; hash again what was not flushed."""
        if not self.is_settled:
            self._recheck(tick)
        self.is_settled = False
        os.ftruncate(self._part, self._manifest.size)
        os.ftruncate(self._have, HAVE_HEADER_BYTES + len(self._bits))
        os.pwrite(self._have, HAVE_MAGIC + bytes(8) + self._bits, 0)
        os.fsync(self._have)

    def write(self, index: int, pieces: Sequence[Any]) -> None:
        """Put a verified chunk in its place, then mark it."""
        write_all(self._part, pieces, index * self._manifest.chunk_bytes)
        self._mark(index, True)
        self._unflushed += self.length(index)
        if self._unflushed >= FLUSH_BYTES:
            os.fdatasync(self._part)
            self._unflushed = 0

    def settle(self) -> None:
        """Flush data, then bits, then the note that they agree."""
        os.fsync(self._part)
        os.fsync(self._have)
        mtime_ns = os.fstat(self._part).st_mtime_ns
        os.pwrite(self._have, mtime_ns.to_bytes(8, "little"), len(HAVE_MAGIC))
        os.fsync(self._have)
        self.is_settled = True

    def verify(self, tick: Tick) -> list[int]:
        """Read the whole file back: the chunks that are not as the manifest says, now unmarked.

        EngineError when every chunk is right and the file is not: then the manifest itself is wrong.
        """
        found = digest(self._part, self._manifest.size, self._manifest.chunk_bytes, tick)
        pairs = enumerate(zip(found.chunks, self._manifest.chunks, strict=True))
        wrong = [index for index, (here, expected) in pairs if here != expected]
        for index in wrong:
            self._mark(index, False)
        if not wrong and found.sha256 != self._manifest.sha256:
            raise EngineError(
                f"expected model {self._manifest.name!r} to hash to {self._manifest.sha256[:12]}; "
                f"its chunks agree with the manifest and make {found.sha256[:12]}",
                remedy="add the model again on the node it came from",
            )
        return wrong

    def finish(self, name: str, engine: str | None, packed: bytes) -> Path:
        """Make the verified part the model: meta, rename, flush."""
        os.fsync(self._part)
        found = os.fstat(self._part)
        write_entry(self._folder, name, engine, (found.st_size, found.st_mtime_ns), packed)
        os.rename(self._folder / PART, self._folder / MODEL)
        fsync_folder(self._folder)
        (self._folder / HAVE).unlink(missing_ok=True)
        return self._folder / MODEL

    def _unsettled_bits(self, count: int) -> bytes:
        size = -(-count // 8)
        packed = os.pread(self._have, HAVE_HEADER_BYTES + size + 1, 0)
        if len(packed) != HAVE_HEADER_BYTES + size or packed[: len(HAVE_MAGIC)] != HAVE_MAGIC:
            return bytes(size)
        return packed[HAVE_HEADER_BYTES:]

    def _recheck(self, tick: Tick) -> None:
        buffer = memoryview(bytearray(min(self._manifest.chunk_bytes, self._manifest.size)))
        size, done = os.fstat(self._part).st_size, 0
        for index, expected in enumerate(self._manifest.chunks):
            if not has_bit(self._bits, index):
                continue
            start, length = index * self._manifest.chunk_bytes, self.length(index)
            if start + length > size or _sha256(self._part, buffer[:length], start) != expected:
                self._mark(index, False)
            done += length
            tick(done)

    def _mark(self, index: int, here: bool) -> None:
        byte, bit = index >> 3, 1 << (index & 7)
        self._bits[byte] = self._bits[byte] | bit if here else self._bits[byte] & ~bit
        os.pwrite(self._have, self._bits[byte : byte + 1], HAVE_HEADER_BYTES + byte)


def _sha256(fd: int, buffer: memoryview, offset: int) -> bytes:
    return hashlib.sha256(read_exactly(fd, buffer, offset)).digest()
