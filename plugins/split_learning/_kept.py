"""States that frozen blocks gave, kept on disk: a file a row, so that later epochs need no block.

A file is a head of 64 bytes (mark, bytes of a value, shape, CRC-32 of what follows, the row's key) and the
values, little-endian, in the order of the shape (L + 1, P, d). One that is damaged, cut short or another
row's is as good as none. The files are made whole or not at all, and not flushed: what a power cut leaves of
one, its checksum tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor

log = logging.getLogger(__name__)
HEAD = struct.Struct("<8sIIIII32s4x")
MARK = b"edgedst1"
SUFFIX, MAKING = ".states", ".making"
HALF_MAX = 65504.0  # the largest finite F16


class Kept:
    """In `folder`, at most `limit` bytes of it; what finds no room is not kept, and nothing makes way.

    `is_half`: values are F16, rounded to nearest, and F32 otherwise, exact. After the first write that the
    disk refused, nothing more is written (`has_failed`).
    """

    def __init__(self, folder: Path, limit: int, *, is_half: bool) -> None:
        self._folder, self._limit = folder, limit
        self._dtype = np.dtype("<f2" if is_half else "<f4")
        self._here: dict[str, int] = {}
        self.has_failed = False
        with contextlib.suppress(OSError):  # no folder yet, or none to be had: writing will tell
            for entry in list(os.scandir(folder)):
                if entry.name.endswith(MAKING):
                    os.unlink(entry.path)
                elif entry.name.endswith(SUFFIX):
                    self._here[entry.name.removesuffix(SUFFIX)] = entry.stat().st_size
        self.bytes = sum(self._here.values())

    def __contains__(self, key: str) -> bool:
        return key in self._here

    def size_of(self, shape: tuple[int, int, int]) -> int:
        """Bytes of one file."""
        return HEAD.size + int(np.prod(shape)) * self._dtype.itemsize

    def has_room(self, size: int) -> bool:
        return self.bytes + size <= self._limit

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Values as they will come back, in the type they are kept in."""
        if self._dtype.itemsize == 2:
            values = np.clip(values, -HALF_MAX, HALF_MAX)
        return np.ascontiguousarray(values, self._dtype)

    def read(self, key: str, out: Tensor) -> bool:
        """Fill `out` (L + 1, P, d), F32, whose planes are each contiguous. False where there is no sound
        file; then what `out` holds means nothing."""
        if key not in self._here:
            return False
        try:
            is_sound = self._fill(key, out.numpy())
        except OSError:
            is_sound = False
        if not is_sound:
            self._forget(key)
        return is_sound

    def write(self, key: str, values: np.ndarray) -> None:
        """Keep what `rounded` gave, if there is room."""
        size = HEAD.size + values.nbytes
        if self.has_failed or key in self._here or not self.has_room(size):
            return
        making = self._folder / (key + MAKING)
        head = HEAD.pack(MARK, values.itemsize, *values.shape, zlib.crc32(values), bytes.fromhex(key))
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(making, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(head)
                file.write(values)
            os.replace(making, self._path(key))
        except OSError as error:
            self.has_failed = True
            log.warning(
                "states are no longer kept, and computed in every epoch", extra={"reason": error.strerror}
            )
            with contextlib.suppress(OSError):
                making.unlink()
            return
        self._here[key] = size
        self.bytes += size

    def remove(self) -> None:
        """All files; the folder too, where it is empty then."""
        for key in list(self._here):
            self._forget(key)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _fill(self, key: str, planes: np.ndarray) -> bool:
        with open(self._path(key), "rb", buffering=0) as file:
            head = file.read(HEAD.size)
            if len(head) < HEAD.size:
                return False
            mark, item, *shape, checksum, name = HEAD.unpack(head)
            expected = (MARK, self._dtype.itemsize, list(planes.shape), bytes.fromhex(key))
            if (mark, item, shape, name) != expected:
                return False
            if self._dtype == planes.dtype:
                return _scatter(file.fileno(), planes) == checksum
            values = np.empty(planes.shape, self._dtype)
            if _scatter(file.fileno(), values) != checksum:
                return False
            planes[...] = values
            return True

    def _forget(self, key: str) -> None:
        self.bytes -= self._here.pop(key)
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._folder / (key + SUFFIX)


def _scatter(descriptor: int, planes: np.ndarray) -> int | None:
    """Read what follows the head straight into each plane; the checksum, None where the file is short."""
    checksum, place = 0, HEAD.size
    for plane in planes:
        view = memoryview(plane).cast("B")
        if os.preadv(descriptor, [view], place) != view.nbytes:
            return None
        checksum, place = zlib.crc32(view, checksum), place + view.nbytes
    return checksum
