"""Puts a model file into the store: described, hashed, linked where the disk can, copied where not.

A task of a child process: `ingest(params, report)`. The source arrives as an open descriptor, since
the daemon may not see its path.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import wire
from .errors import ConfigError, EdgedError, EngineError
from .models import (
    CHUNK_BYTES,
    MANIFEST,
    MODEL,
    MODEL_BYTES_MAX,
    Model,
    check_model_name,
    entries,
    held,
    manifest_hash,
    owner_of,
    pack_manifest,
    unpack_manifest,
    write_entry,
)
from .partial import Digest, check_disk, digest, fsync_folder
from .types import ModelDescription

FICLONE = 0x40049409  # ioctl_ficlone(2): share the source's blocks, copy on write
STAGING = ".ingest-"
REASON_CHARS = 2000  # of an engine's refusal: a list of a hundred architectures and more fits
REPORT_S = 0.25  # a progress map at most this often

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Ingest:
    source_fd: int
    name: str
    models: str
    describe: tuple[tuple[str, str], ...]  # (engine, dotted name of its describe function)


class Progress:
    """Reports bytes done of one phase, a few times a second at most."""

    def __init__(self, report: Report, phase: str, total: int) -> None:
        self._report, self._phase, self._total = report, phase, total
        self._next = 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == self._total:
            self._next = now + REPORT_S
            self._report({"phase": self._phase, "bytes": done, "total": self._total})


def ingest(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Store the file open at `source_fd` under `name`.

    Result: sha256, name, bytes, engine, path, manifest_sha256, and `stored`: "reflinked", "linked",
    "copied", or "already" where this content is in the store (then `name` is the one it has there).
    Raises EngineError (no engine takes it, disk, file cut or changed) or ConfigError (name, not a file).
    """
    want = wire.read_body(_Ingest, params)
    name, folder = check_model_name(want.name), Path(want.models)
    source = os.fstat(want.source_fd)
    if not stat.S_ISREG(source.st_mode) or not 0 < source.st_size <= MODEL_BYTES_MAX:
        raise ConfigError(
            f"expected a regular file of 1 to {MODEL_BYTES_MAX} bytes as model {name!r}; "
            f"mode {stat.filemode(source.st_mode)}, {source.st_size} bytes came",
            remedy="edged models add FILE, with a GGUF file",
        )
    try:
        with staged_in(folder) as staged:
            return _store(want, source, folder, staged, report)
    except OSError as error:
        raise EngineError(
            f"expected to store model {name!r}; {error.strerror or error}",
            remedy="check the disk that holds the home",
        ) from error


def _store(
    want: _Ingest, source: os.stat_result, folder: Path, staged: Path, report: Report
) -> dict[str, Any]:
    fd, size, target = want.source_fd, source.st_size, staged / MODEL
    owner, described = owner_of(folder, want.name), None
    if owner and owner.bytes != size:
        raise _name_taken(owner)
    if _reopens(fd):
        report({"phase": "describing", "bytes": 0, "total": size})
        described = _describe(f"/proc/self/fd/{fd}", want)
    stored = _place(fd, source, target)
    if stored is None and _may_be_known(folder, want.name, size):
        # hash before a copy that may be for nothing
        known = digest(fd, size, CHUNK_BYTES, Progress(report, "hashing", size)).sha256
        if present := _present(folder, known, want.name):
            return _result(present, folder, "already")
    if stored is None:
        check_disk(folder, size, f"model {want.name!r}")
        hashes = _copy(fd, target, size, Progress(report, "copying", size))
        stored = "copied"
    else:
        hashes = _digest_path(target, size, Progress(report, "hashing", size))
    after = os.fstat(fd)
    if stored != "reflinked" and (after.st_size, after.st_mtime_ns) != (size, source.st_mtime_ns):
        raise EngineError(
            f"expected model {want.name!r} to stay as it is; it changed while it was read",
            remedy="add it again when nothing writes to it",
        )
    model, engine = described or _describe(str(target), want)
    manifest = wire.Manifest(hashes.sha256, size, CHUNK_BYTES, tuple(hashes.chunks), model, want.name)
    found = target.stat()
    write_entry(staged, want.name, engine, (found.st_size, found.st_mtime_ns), pack_manifest(manifest))
    with held(folder, wait=True):
        if present := _present(folder, manifest.sha256, want.name):
            return _result(present, folder, "already")
        _publish(staged, folder / manifest.sha256)
    row = entries(folder)[manifest.sha256].model
    if row is None:
        raise EngineError(f"expected model {want.name!r} to read back from the store; it does not")
    return _result(row, folder, stored)


def _result(model: Model, folder: Path, stored: str) -> dict[str, Any]:
    return {
        "sha256": model.sha256,
        "name": model.name,
        "bytes": model.bytes,
        "engine": model.engine,
        "path": str(folder / model.sha256 / MODEL),
        "manifest_sha256": manifest_hash(unpack_manifest((folder / model.sha256 / MANIFEST).read_bytes())),
        "stored": stored,
    }


# --- describing -----------------------------------------------------------------------------------


def _reopens(fd: int) -> bool:
    """False for a file that was opened for us and that this user may not open itself."""
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _describe(path: str, want: _Ingest) -> tuple[ModelDescription, str]:
    """The first engine that accepts the file, and what it says of it."""
    reasons = []
    for engine, dotted in want.describe:
        try:
            module, _, attribute = dotted.partition(":")
            found = getattr(importlib.import_module(module), attribute)(path)
            return wire.read_body(ModelDescription, dict(found)), engine
        except Exception as error:  # a plugin's code on a stranger's file: any failure is its refusal
            text = str(error) if isinstance(error, EdgedError) else f"{type(error).__name__}: {error}"
            reasons.append(f"{engine}: {' '.join(text.split())[:REASON_CHARS]}")
    raise EngineError(
        f"expected a model that an engine can run as {want.name!r}; "
        + ("; ".join(reasons) or "no loaded plugin brings an engine"),
        remedy="convert the file, or load a plugin with an engine for it",
    )


# --- placing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_in(folder: Path) -> Iterator[Path]:
    """A locked temporary folder in the store, gone afterwards unless it was published."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with held(folder, wait=True):
            _clean(folder)
            staged = Path(tempfile.mkdtemp(dir=folder, prefix=STAGING))
            stack.enter_context(held(staged))
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what killed ingests left: their locks went with them."""
    for name in os.listdir(folder):
        if name.startswith(STAGING):
            with contextlib.suppress(ConfigError, OSError), held(folder / name):
                shutil.rmtree(folder / name)


def _place(fd: int, source: os.stat_result, target: Path) -> str | None:
    """Share the source's blocks, else its inode; None where only a copy will do."""
    clone = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.ioctl(clone, FICLONE, fd)
        if os.fstat(clone).st_size == source.st_size:
            return "reflinked"
    except OSError:
        pass  # another file system, or one that cannot
    finally:
        os.close(clone)
    target.unlink()
    if source.st_uid != os.geteuid():
        return None  # somebody else's file could change under us at any time
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # a folder descriptor makes Python use linkat, the call that follows /proc/self/fd
        os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=folder, follow_symlinks=True)
        os.close(os.open(target, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        target.unlink(missing_ok=True)
        return None
    finally:
        os.close(folder)
    return "linked"


def _copy(fd: int, target: Path, size: int, tick: Progress) -> Digest:
    copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        hashes = digest(fd, size, CHUNK_BYTES, tick, copy)
        os.fsync(copy)
        return hashes
    finally:
        os.close(copy)


def _digest_path(path: Path, size: int, tick: Progress) -> Digest:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return digest(descriptor, size, CHUNK_BYTES, tick)
    finally:
        os.close(descriptor)


def _may_be_known(folder: Path, name: str, size: int) -> bool:
    rows = [entry.model for entry in entries(folder).values() if entry.model]
    return any(model.name == name or model.bytes == size for model in rows)


def _present(folder: Path, sha256: str, name: str) -> Model | None:
    """The model of this content if it is whole; ConfigError when another content has the name."""
    entry = entries(folder).get(sha256)
    if entry and entry.model and entry.model.complete:
        return entry.model
    owner = owner_of(folder, name)
    if owner and owner.sha256 != sha256:
        raise _name_taken(owner)
    return None


def _name_taken(owner: Model) -> ConfigError:
    return ConfigError(
        f"expected a free name for another model; {owner.name!r} is {owner.sha256[:12]}",
        remedy=f"choose another name, or first `edged models rm {owner.name}`",
        code="name-taken",
    )


def _publish(staged: Path, target: Path) -> None:
    """Rename into place. A part or a damaged entry of the same content makes room."""
    if target.exists():
        with held(target, f"model {target.name[:12]}"):
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=STAGING))
            os.rename(target, aside / "old")
            os.rename(staged, target)
        shutil.rmtree(aside, ignore_errors=True)  # the next ingest tries again
    else:
        os.rename(staged, target)
    fsync_folder(target.parent)
