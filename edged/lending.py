"""What of this node's adapters other nodes may be given: a file by its content, hashed once.

A plan names an adapter's file by SHA-256; nodes that lack it fetch it in chunks, each checked.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from .adapters import Adapter
from .errors import EngineError
from .models import CHUNK_BYTES
from .partial import digest
from .types import AdapterFile

HASHED_MAX = 64  # files whose hashes are remembered: a chunk hash for each 4 MiB of them


@dataclass(frozen=True, slots=True)
class Hashed:
    """The content of an adapter's file at `path`, when it had `stamp`."""

    name: str
    base_sha256: str
    path: str
    file: AdapterFile
    chunks: tuple[bytes, ...]
    stamp: tuple[int, int, int]


class Lending:
    """Hashes of files. `hashed` may read a large one: call it in a thread."""

    def __init__(self) -> None:
        self._hashed: OrderedDict[str, Hashed] = OrderedDict()  # by path
        self._lock = threading.Lock()

    def hashed(self, adapter: Adapter) -> Hashed:
        """Its file's hashes, computed once for each content. EngineError where it cannot be read."""
        with self._lock:
            known = self._hashed.get(adapter.path)
            if known is not None and _stamp(Path(adapter.path)) == known.stamp:
                return known
            found = _hash(adapter)
            self._hashed[adapter.path] = found
            self._hashed.move_to_end(adapter.path)
            while len(self._hashed) > HASHED_MAX:
                self._hashed.popitem(last=False)
            return found

    def lendable(self, sha256: str) -> Hashed | None:
        """A file of that content that was hashed before and has not changed since; another may be gone."""
        found = [each for each in list(self._hashed.values()) if each.file.sha256 == sha256]
        return next((each for each in found if _stamp(Path(each.path)) == each.stamp), None)


def _hash(adapter: Adapter) -> Hashed:
    try:
        file = os.open(adapter.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            before = os.fstat(file)
            found = digest(file, before.st_size, CHUNK_BYTES, lambda done: None)
        finally:
            os.close(file)
    except OSError as error:
        raise EngineError(f"expected to read adapter {adapter.name!r}; {error.strerror}") from error
    content = AdapterFile(found.sha256, before.st_size)
    stamp = (before.st_ino, before.st_size, before.st_mtime_ns)
    return Hashed(adapter.name, adapter.base_sha256, adapter.path, content, tuple(found.chunks), stamp)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
