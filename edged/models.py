"""The models this node holds, by content hash: a folder, read cheaply, damaged parts reported.

    models/<sha256>/manifest.bin      chunk hashes and description (`pack_manifest`)
                    meta.json         the name here, the engine; size and mtime of the whole file
                    model.gguf        the whole file, or
                    model.part, have  a part of it, and which chunks are here (see `partial`)
    models/.ingest-*                  an ingest at work, or what a killed one left

Whoever changes an entry holds a lock on its folder; names are given under the lock of `models`.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import wire
from .errors import ConfigError, EdgedError, EngineError, ProtocolError
from .identity import Home, write_atomically
from .types import Condition, Range

CHUNK_BYTES = 4 << 20
MODEL_BYTES_MAX = 400 * 10**9  # its manifest is the largest that a header holds
MODEL, PART, HAVE, MANIFEST, META = "model.gguf", "model.part", "have", "manifest.bin", "meta.json"
PREFIX_CHARS_MIN = 8
HAVE_MAGIC = b"edgedhv1"
HAVE_HEADER_BYTES = 16  # the magic, then mtime_ns of model.part when both were last flushed, or 0


@dataclass(frozen=True, slots=True)
class Model:
    """One stored model. `complete` is False for a part, and for a file that changed since it was added."""

    name: str
    sha256: str
    architecture: str
    parameters: int
    bytes: int
    layers: int
    weight_type: str
    complete: bool
    engine: str | None
    path: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of the store as last read: its model, and what is wrong with it."""

    stamp: tuple[tuple[int, int, int] | None, ...]
    model: Model | None
    fault: str | None = None


class ModelStore:
    """What one node holds. Reads are a few `stat` calls; a file is parsed again only when it changed."""

    def __init__(self, home: Home, folder: Path | None = None) -> None:
        """`folder`: instead of the home's own."""
        self.folder = folder or home.models
        self._entries: dict[str, Entry] = {}

    def list(self) -> builtins.list[Model]:
        """Every readable model, by name."""
        found = [entry.model for entry in self._read().values() if entry.model]
        return sorted(found, key=lambda model: (model.name, model.sha256))

    def find(self, text: str) -> Model:
        """The model of that name, or whose SHA-256 starts with it (8 characters or more)."""
        found = _matching(text, self.list())
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(
                f"expected one model for {text!r}; {len(found)} are stored: "
                + ", ".join(model.sha256[:12] for model in found),
                remedy="name it by more of its hash",
            )
        names = ", ".join(model.name for model in self.list()) or "none"
        raise ConfigError(f"no model {text!r}; stored: {names}", remedy="edged models add FILE")

    def has(self, sha256: str) -> bool:
        """True when the whole, unchanged file is here."""
        entry = self._read().get(sha256)
        return entry is not None and entry.model is not None and entry.model.complete

    def holds(self, sha256: str, ranges: Sequence[Range], manifest_sha256: str) -> bool:
        """True when these bytes are here, flushed and verified: a shard loads without a transfer.

        The whole file is bound by its own SHA-256; a part by nothing but the manifest that its chunks
        were checked against, so that must be the one with this hash (`manifest_hash`).
        """
        entry = self._read().get(sha256)
        if entry is None or entry.model is None:
            return False
        if entry.model.complete:
            return True
        manifest = self.manifest(sha256)
        if manifest_hash(manifest) != manifest_sha256:
            return False
        bits = settled_bits(self.folder / sha256, len(manifest.chunks))
        return bits is not None and all(has_bit(bits, index) for index in chunks_of(manifest, ranges))

    def manifest(self, sha256: str) -> wire.Manifest:
        """The manifest of a stored model, whole or not."""
        entry = self._read().get(sha256)
        if entry is None or entry.model is None:
            raise EngineError(f"expected model {sha256[:12]} in the store; it is not there")
        return _cached_manifest(self.folder / sha256 / MANIFEST, entry.stamp[0])

    def adopt(self, manifest: wire.Manifest) -> Model:
        """The row of a model that a task has just stored; EngineError when it is not there."""
        entry = self._read().get(manifest.sha256)
        if entry is None or entry.model is None:
            reason = entry.fault if entry else "its folder is missing"
            raise EngineError(f"expected model {manifest.name!r} in the store; {reason}")
        return entry.model

    def remove(self, text: str) -> Model | None:
        """Delete a model, or a damaged entry by its hash (then None). Takes long for a large file: call
        it in a thread."""
        damaged = [sha256 for sha256, entry in self._read().items() if not entry.model]
        prefix = text.lower()
        hits = [sha256 for sha256 in damaged if sha256.startswith(prefix)]
        model = None
        if len(prefix) >= PREFIX_CHARS_MIN and len(hits) == 1:
            folder = self.folder / hits[0]
        else:
            model = self.find(text)
            folder = self.folder / model.sha256
        with held(folder, f"model {text!r}"):
            shutil.rmtree(folder)
        return model

    def conditions(self) -> Sequence[Condition]:
        """What a person should know: damaged entries and files that changed since they were added."""
        return [
            Condition(
                "model-damaged",
                "warning",
                f"model {entry.model.name if entry.model else sha256[:12]}: {entry.fault}",
                f"edged models rm {sha256[:12]}, then add it again",
            )
            for sha256, entry in sorted(self._read().items())
            if entry.fault
        ]

    def _read(self) -> Mapping[str, Entry]:
        self._entries = entries(self.folder, self._entries)
        return self._entries


# --- the folder -----------------------------------------------------------------------------------


def entries(folder: Path, known: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
    """Every entry of a store by SHA-256; those in `known` whose files did not change are kept."""
    try:
        names = [name for name in os.listdir(folder) if is_sha256(name)]
    except OSError:
        return {}
    found = {}
    for name in names:
        stamp = tuple(_stamp(folder / name / file) for file in (MANIFEST, META, MODEL, PART))
        before = (known or {}).get(name)
        found[name] = before if before and before.stamp == stamp else _read_entry(folder / name, stamp)
    return found


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_entry(folder: Path, stamp: tuple[tuple[int, int, int] | None, ...]) -> Entry:
    try:
        manifest = unpack_manifest((folder / MANIFEST).read_bytes())
        meta = json.loads((folder / META).read_text())
        name, engine = check_model_name(meta["name"]), meta.get("engine")
        promised = (meta.get("bytes"), meta.get("mtime_ns"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EdgedError) as error:
        return Entry(stamp, None, f"its manifest or meta.json cannot be read ({type(error).__name__})")
    if manifest.sha256 != folder.name:
        return Entry(stamp, None, f"its manifest is of {manifest.sha256[:12]}")
    whole = stamp[2]
    complete = whole is not None and whole[1] == manifest.size and whole[1:] == promised
    model = Model(
        name=name,
        sha256=manifest.sha256,
        architecture=manifest.model.architecture,
        parameters=manifest.model.parameters,
        bytes=manifest.size,
        layers=manifest.model.layers,
        weight_type=manifest.model.weight_type,
        complete=complete,
        engine=engine if isinstance(engine, str) else None,
        path=str(folder / (MODEL if whole else PART)),
    )
    fault = "its file changed since it was added" if whole and not complete else None
    if whole is None and stamp[3] is None:
        fault = "its file is missing"
    return Entry(stamp, model, fault)


def write_entry(
    folder: Path, name: str, engine: str | None, whole: tuple[int, int] | None, packed: bytes
) -> None:
    """Write manifest and meta; `whole` is (size, mtime_ns) of model.gguf once it is whole."""
    size, mtime_ns = whole or (None, None)
    meta = {"name": name, "engine": engine, "bytes": size, "mtime_ns": mtime_ns}
    write_atomically(folder / MANIFEST, packed)
    write_atomically(folder / META, json.dumps(meta).encode())


def owner_of(folder: Path, name: str) -> Model | None:
    """Who has `name` in the store."""
    rows = (entry.model for entry in entries(folder).values())
    return next((model for model in rows if model and model.name == name), None)


@contextlib.contextmanager
def held(folder: Path, what: str = "", *, wait: bool = False) -> Iterator[int]:
    """Lock a folder for one process; it frees itself when the process dies. ConfigError when taken."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"expected nobody at work on {what}; a transfer of it runs",
            remedy="wait until it ends",
            code="busy-model",
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- names, hashes, manifests ---------------------------------------------------------------------


def _matching(text: str, models: Sequence[Model]) -> list[Model]:
    named = [model for model in models if model.name == text]
    if named or len(text) < PREFIX_CHARS_MIN:
        return named
    return [model for model in models if model.sha256.startswith(text.lower())]


def is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def check_model_name(name: str, what: str = "model") -> str:
    """A name of the store that is a file name, too; `what` is named by it."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+\-]{0,63}", name, re.ASCII):
        raise ConfigError(
            f"expected a {what} name of 1 to 64 letters, digits, dots, dashes; {name!r:.80} came",
            remedy="choose another name",
        )
    return name


def name_of(file: str) -> str:
    """A model's name from its file's: "SmolLM2-135M.Q4_1.gguf" -> "smollm2-135m-q4_1"."""
    stem = re.sub(r"\.gguf$", "", os.path.basename(file).lower())
    stem = re.sub(r"\.(?=(i?q\d|b?f16|f32)[^.]*$)", "-", stem)
    return re.sub(r"[^a-z0-9_.+]+", "-", stem).strip("-.+")[:64] or "model"


def pack_manifest(manifest: wire.Manifest) -> bytes:
    return wire.pack("manifest", manifest)


def unpack_manifest(packed: bytes) -> wire.Manifest:
    """A manifest from disk or from a peer, its numbers checked; ProtocolError when it is not one."""
    manifest = wire.read_body(wire.Manifest, wire.unpack(packed).body)
    try:
        check_model_name(manifest.name)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    if not is_sha256(manifest.sha256):
        raise ProtocolError("expected a manifest with a SHA-256 in lower-case hex")
    if not 0 < manifest.size <= MODEL_BYTES_MAX or not 0 < manifest.chunk_bytes <= CHUNK_BYTES:
        raise ProtocolError(f"expected a manifest of chunks of at most {CHUNK_BYTES} bytes")
    count = -(-manifest.size // manifest.chunk_bytes)
    if len(manifest.chunks) != count or any(len(chunk) != 32 for chunk in manifest.chunks):
        raise ProtocolError(f"expected {count} chunk hashes of 32 bytes; {len(manifest.chunks)} came")
    return manifest


def manifest_hash(manifest: wire.Manifest) -> str:
    """What a plan promises of a model: all of the manifest but its name, which is each node's own."""
    return hashlib.sha256(pack_manifest(replace(manifest, name=""))).hexdigest()


@functools.lru_cache(maxsize=4)  # a plan reads one or two; a large one is megabytes
def _cached_manifest(path: Path, stamp: object) -> wire.Manifest:
    return unpack_manifest(path.read_bytes())


def chunks_of(manifest: wire.Manifest, ranges: Sequence[Range] | None) -> list[int]:
    """The chunks that byte ranges touch, ascending; all of them for None."""
    if ranges is None:
        return list(range(len(manifest.chunks)))
    wanted: set[int] = set()
    for start, stop in ranges:
        if not 0 <= start <= stop <= manifest.size:
            raise ConfigError(
                f"expected byte ranges within 0-{manifest.size} of {manifest.name!r}; {start}-{stop} came"
            )
        if start < stop:
            wanted.update(range(start // manifest.chunk_bytes, -(-stop // manifest.chunk_bytes)))
    return sorted(wanted)


def settled_bits(folder: Path, chunks: int) -> bytes | None:
    """The bitmap of a part that was flushed in order and not touched since; None when it was not."""
    try:
        packed = (folder / HAVE).read_bytes()
        mtime_ns = os.stat(folder / PART).st_mtime_ns
    except OSError:
        return None
    settled = int.from_bytes(packed[8:HAVE_HEADER_BYTES], "little")
    if packed[:8] != HAVE_MAGIC or len(packed) != HAVE_HEADER_BYTES + -(-chunks // 8) or settled != mtime_ns:
        return None
    return packed[HAVE_HEADER_BYTES:]


def has_bit(bits: bytes | bytearray, index: int) -> bool:
    return bool(bits[index >> 3] >> (index & 7) & 1)
