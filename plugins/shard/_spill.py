"""Weights in their computing layout on disk, mapped over the memory of the tensors they belong to.

The file has no name from the start: no other process can change or cut it, it needs no key or version,
and it is gone with the worker however that ends. The price is that every load writes it anew. It is
flushed before it is used, so that a disk that does not take it says so then; a page that was read once
is the kernel's to keep or drop, and is not counted as this process's unless it is mapped and touched.

Reading goes through `madvise(MADV_POPULATE_READ)` (Linux 5.14), which answers with an error where a touch
of the page would end the process; older kernels read through a buffer first.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from ctypes import c_int, c_int64, c_size_t, c_void_p

from edged import EngineError

PAGE = mmap.PAGESIZE
RESERVE_BYTES = 128 << 20  # left free for the device's own work, as model transfers do
SCRATCH_BYTES = 1 << 20
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MADV_RANDOM, MADV_DONTNEED, MADV_POPULATE_READ = 1, 4, 22
MAP_FAILED = c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, c_int64)
_libc.madvise.argtypes = (c_void_p, c_size_t, c_int)


def whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Spill:
    """An open file without a name in `folder`, of at most `size` bytes. EngineError names the folder."""

    def __init__(self, folder: str, size: int) -> None:
        self._folder, self._end = folder, 0
        try:
            found = os.statvfs(folder)
            free = found.f_bavail * found.f_frsize
            if free < size + RESERVE_BYTES:
                raise EngineError(
                    f"expected {size + RESERVE_BYTES} bytes free in {folder} for weights that do not fit "
                    f"into memory; {free} are",
                    remedy="free space there, or give this node a smaller share",
                )
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close
        except OSError as error:
            raise self._failed("written", error) from error

    def close(self) -> None:
        self._file.close()

    def append(self, address: int, size: int) -> int:
        """Write `size` bytes of this process's memory; the page-aligned offset they begin at."""
        start, rest = self._end, memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        offset = start
        try:
            while rest:
                written = os.pwrite(self._file.fileno(), rest, offset)
                offset, rest = offset + written, rest[written:]
        except OSError as error:
            raise self._failed("written", error) from error
        self._end = start + whole_pages(size)
        return start

    def seal(self) -> None:
        """Everything is on the disk, or EngineError: what a disk loses later would be wrong weights."""
        try:
            os.ftruncate(self._file.fileno(), self._end)
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise self._failed("written", error) from error

    def map(self, address: int, size: int, offset: int) -> None:
        """Put the file's pages in the place of this memory, none of them read yet."""
        _map(address, size, PROT_READ, MAP_SHARED | MAP_FIXED, self._file.fileno(), offset)

    def load(self, address: int, size: int, offset: int) -> None:
        """Read mapped pages, so that touching them costs nothing. EngineError when the disk fails."""
        try:
            os.posix_fadvise(self._file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
            if _libc.madvise(address, whole_pages(size), MADV_POPULATE_READ) == 0:
                return
            if ctypes.get_errno() == errno.EINVAL:
                self._read_through(offset, size)
                return
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            raise self._failed("read", error) from error

    def _read_through(self, offset: int, size: int) -> None:
        scratch = bytearray(SCRATCH_BYTES)
        for at in range(offset, offset + size, SCRATCH_BYTES):
            if not os.preadv(self._file.fileno(), [scratch], at):
                raise OSError(errno.EIO, "it ends early")

    def _failed(self, what: str, error: OSError) -> EngineError:
        return EngineError(
            f"expected weights to be {what} in {self._folder}; {error.strerror or error}",
            remedy="check the disk that holds the home",
        )


def drop(address: int, size: int) -> None:
    """These mapped pages are not this process's any more; a touch would read them again."""
    _libc.madvise(address, whole_pages(size), MADV_DONTNEED)


def blank(address: int, size: int) -> None:
    """Plain memory, all zero, in the place of mapped pages."""
    _map(address, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0)


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> None:
    assert address % PAGE == offset % PAGE == 0
    if _libc.mmap(address, whole_pages(size), protection, flags, fd, offset) == MAP_FAILED:
        number = ctypes.get_errno()
        raise EngineError(f"expected to map {size} bytes of weights; {os.strerror(number)}")
