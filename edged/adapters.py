"""The LoRA adapters of this node: a folder each, by name.

    adapters/<name>/meta.json       name, base_sha256, base_name, ...
                    adapter.gguf    llama.cpp's LoRA file, which engines read

A job names an adapter; what travels and what a plan is made for is its file's content, by SHA-256.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, EdgedError, EngineError
from .identity import Home
from .models import CHUNK_BYTES, check_model_name, is_sha256
from .partial import digest
from .types import AdapterFile

GGUF, META = "adapter.gguf", "meta.json"
HASHED_MAX = 64  # files whose hashes are remembered: a chunk hash for each 4 MiB of them


@dataclass(frozen=True, slots=True)
class Adapter:
    """One stored adapter. `base_sha256`: the model that it was made for; `bytes`: of its GGUF."""

    name: str
    base_sha256: str
    base_name: str
    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """The content of an adapter's file at `path`, when it had `stamp`."""

    name: str
    base_sha256: str
    path: str
    file: AdapterFile
    chunks: tuple[bytes, ...]
    stamp: tuple[int, int, int]


class AdapterStore:
    """What one node holds. `find` reads a small file; `hashed` may read a large one: call it in a thread."""

    def __init__(self, home: Home) -> None:
        self._folder = home.adapters
        self._hashed: OrderedDict[str, Hashed] = OrderedDict()  # by path
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of the readable ones, in order."""
        found = []
        for name in sorted(os.listdir(self._folder)) if self._folder.is_dir() else ():
            try:
                found.append(self._read(name).name)
            except (EdgedError, OSError):
                continue
        return found

    def find(self, name: str) -> Adapter:
        """The adapter of that name; ConfigError where there is none that an engine can read."""
        try:
            return self._read(check_model_name(name))
        except FileNotFoundError:
            names = ", ".join(self.names()) or "none"
            raise ConfigError(
                f"no adapter {name!r}; stored: {names}", remedy="name one of these, or make one"
            ) from None

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
        """The file of that content, if it was hashed before and has not changed since."""
        found = next((each for each in list(self._hashed.values()) if each.file.sha256 == sha256), None)
        return found if found is not None and _stamp(Path(found.path)) == found.stamp else None

    def _read(self, name: str) -> Adapter:
        """FileNotFoundError where there is no such folder; ConfigError where it is damaged."""
        folder = self._folder / name
        os.stat(folder)
        try:
            meta = json.loads((folder / META).read_text())
            base, base_name, size = meta["base_sha256"], meta["base_name"], os.stat(folder / GGUF).st_size
            if not is_sha256(base) or not isinstance(base_name, str):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"expected adapter {name!r} with a meta.json and an {GGUF}; it cannot be read "
                f"({type(error).__name__})",
                remedy="remove it, and make it again for a GGUF model",
            ) from error
        return Adapter(name, base, base_name, str(folder / GGUF), size)


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
