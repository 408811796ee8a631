"""Adapters on their way out of the store and into it: tasks of a child process.

The daemon may see neither the folder a person names nor write where that person may: files travel as
open descriptors, both ways.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import wire
from .adapters import CONFIG, FILES, GGUF, PIECE_BYTES, TENSORS, AdapterMeta, AdapterStore
from .errors import ConfigError, EdgedError, EngineError
from .identity import Home
from .ingest import Progress, staged_in
from .partial import check_disk, write_all

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _CopyOut:
    folder: str
    files: tuple[int, ...]


def copy_out(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Copy the adapter in `folder` into open files, in the order of FILES: {"files": [{name, bytes,
    sha256}]} of those that there are. ConfigError for anything but empty regular files, EngineError where
    a disk fails: then the files are the caller's to remove."""
    want = wire.read_body(_CopyOut, params)
    for file in want.files:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            raise ConfigError("expected open empty files to write an adapter into; others came")
    rows = []
    for name, file in zip(FILES, want.files, strict=True):
        if name == GGUF and not (Path(want.folder) / name).exists():
            continue
        try:
            rows.append({"name": name, **_copy(Path(want.folder) / name, file)})
        except OSError as error:
            raise EngineError(
                f"expected to write {name}; {error.strerror or error}",
                remedy="choose a folder on a disk with room",
            ) from error
    return {"files": rows}


@dataclass(frozen=True, slots=True)
class _WriteModel:
    folder: str
    base: str
    file: int
    kind: str
    rewrite: str
    whole: str


def write_model(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Write into an open empty file the model that the base and an adapter of kind "seeds" make:
    {"tensors": int, "bytes": int}. `rewrite`, `whole`: dotted names, of an engine and of a method.

    ConfigError for a file that is none or a base that does not fit, EngineError where a disk fails: then the
    file is the caller's to remove.
    """
    want = wire.read_body(_WriteModel, params)
    found = os.fstat(want.file)
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        raise ConfigError("expected an open empty file to write a model into; another came")
    whole, rewrite = (_resolved(dotted) for dotted in (want.whole, want.rewrite))

    progress: dict[int, Progress] = {}  # by total, which is one

    def tick(done: int, total: int) -> None:
        progress.setdefault(total, Progress(report, "writing", total))(done)

    return dict(rewrite(want.folder, want.base, want.file, want.kind, whole, tick))


@dataclass(frozen=True, slots=True)
class _Ingest:
    files: tuple[int, int]  # adapter_config.json, adapter_model.safetensors
    name: str
    home: str
    adapt: str
    base: str
    base_sha256: str
    base_name: str


def ingest(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Store the PEFT folder whose two files are open, for a stored base model: {"name": as stored}.

    The engine's `adapt` checks it and makes adapter.gguf. ConfigError says what is wrong with it, EngineError
    what with the disk; then nothing is left in the store.
    """
    want = wire.read_body(_Ingest, params)
    store, home = AdapterStore(Home(Path(want.home))), Home(Path(want.home))
    sizes = [os.fstat(file).st_size for file in want.files]
    if not all(stat.S_ISREG(os.fstat(file).st_mode) for file in want.files):
        raise ConfigError("expected two regular files of an adapter; others came")
    try:
        home.adapters.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_disk(home.adapters, 3 * sum(sizes), f"adapter {want.name!r}", "adapters")  # F16 grows to F32
        with staged_in(home.adapters) as staged:
            folder = staged / "made"
            folder.mkdir(mode=0o700)
            _copy_in(want.files, folder, Progress(report, "copying", sum(sizes)))
            found = _adapt(want, folder)
            meta = AdapterMeta(want.base_sha256, want.base_name, found["r"], found["alpha"])
            meta = replace(meta, provenance={"added": True, "made_for": found.get("made_for")})
            return {"name": store.adopt(folder, want.name, meta).name}
    except OSError as error:
        raise EngineError(
            f"expected to store adapter {want.name!r}; {error.strerror or error}",
            remedy="check the disk that holds the home",
        ) from error


def _adapt(want: _Ingest, folder: Path) -> dict[str, Any]:
    try:
        return dict(_resolved(want.adapt)(str(folder), want.base, str(folder / GGUF)))
    except EdgedError:
        raise
    except Exception as error:  # a plugin's code on a stranger's file: any failure is its refusal
        raise EngineError(
            f"expected an adapter that an engine takes as {want.name!r}; {type(error).__name__}: {error}"
        ) from error


def _resolved(dotted: str) -> Callable[..., Any]:
    module, _, attribute = dotted.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def _copy_in(files: tuple[int, int], folder: Path, tick: Progress) -> None:
    copied = 0
    for name, source in zip((CONFIG, TENSORS), files, strict=True):
        done = 0
        with open(folder / name, "xb") as file:
            while piece := os.pread(source, PIECE_BYTES, done):
                file.write(piece)
                done += len(piece)
                tick(copied + done)
        copied += done


def _copy(source: Path, target: int) -> dict[str, Any]:
    sha256, done = hashlib.sha256(), 0
    with open(source, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            sha256.update(piece)
            write_all(target, [piece], done)
            done += len(piece)
    os.fsync(target)
    return {"bytes": done, "sha256": sha256.hexdigest()}
