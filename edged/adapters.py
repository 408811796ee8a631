"""The LoRA adapters this node holds, by name: a folder each, read cheaply.

    adapters/<name>/adapter_config.json, adapter_model.safetensors   what peft loads
                    adapter.gguf      the same for llama.cpp, where the base model is a GGUF
                    meta.json         base model, rank, where it came from; size and mtime of each file
    adapters/.ingest-*                an adapter on its way in, or what a killed task left

An adapter is told by its name here and belongs to one base model, told by its SHA-256.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from .datasets import remove_entry
from .errors import ConfigError, EngineError
from .identity import Home, write_atomically
from .ingest import STAGING
from .models import Model, check_model_name, held, is_sha256
from .partial import fsync_folder
from .supervisor import Supervisor
from .types import EngineEntry

log = logging.getLogger(__name__)
CONFIG, TENSORS, GGUF, META = "adapter_config.json", "adapter_model.safetensors", "adapter.gguf", "meta.json"
FILES = (CONFIG, TENSORS, GGUF)
CONFIG_BYTES_MAX = 1 << 20
META_BYTES_MAX = 1 << 16  # a provenance is a dozen figures
NAME_CHARS_MAX = 64
SUFFIX_MAX = 1000  # of a taken name
PIECE_BYTES = 1 << 20
Kind = Literal["lora", "parallel", "prompts", "seeds"]
Scope = Literal["global", "personal"]


@dataclass(frozen=True, slots=True)
class AdapterMeta:
    """What is told of an adapter when it is stored.

    `base_sha256`, `base_name`: the model it belongs to. `r`, `alpha`: 0 for what adapter_config.json says.
    `kind`: LoRA, or a parallel adapter (PAC), which no other program knows; or seeds, of which and the base a
    whole model is made. `scope`: of all who trained together, or of one of them. `provenance`: how it came to
    be (job, steps, privacy spent, ...), as JSON.
    """

    base_sha256: str
    base_name: str
    r: int = 0
    alpha: float = 0.0
    kind: Kind = "lora"
    scope: Scope = "global"
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One stored adapter. `bytes` counts all its files; `path`, `sha256` and `gguf_bytes` are of
    adapter.gguf, which engines load: "", "" and 0 where there is none. `created_at`: seconds, UNIX time.
    `stem`, `version`: the name that was asked for, and the how-manieth of that name it is, from 1."""

    name: str
    base_sha256: str
    base_name: str
    r: int
    alpha: float
    kind: Kind
    scope: Scope
    bytes: int
    created_at: float
    provenance: Mapping[str, Any]
    folder: str
    path: str
    sha256: str
    gguf_bytes: int
    stem: str = ""
    version: int = 1


class _File(msgspec.Struct, frozen=True):
    bytes: int
    mtime_ns: int
    sha256: str


class _Config(msgspec.Struct):
    """What is read of PEFT's adapter_config.json."""

    r: int = 0
    lora_alpha: float = 0.0
    method: str = ""  # of seeds


class _Stored(msgspec.Struct, frozen=True):
    base_sha256: str
    base_name: str
    r: int
    alpha: float
    kind: Kind
    scope: Scope
    provenance: Mapping[str, Any]
    created_at: float
    files: dict[str, _File]
    name: str = ""  # for a reader of the file: the folder's name is what counts
    bytes: int = 0
    stem: str = ""
    version: int = 1


class AdapterStore:
    """What one node holds. Reads are a few `stat` calls and a small file for each adapter."""

    def __init__(self, home: Home) -> None:
        self._folder = home.adapters
        self._faults: dict[str, str] = {}  # told to the log, by name

    def list(self) -> builtins.list[Adapter]:
        """Every readable adapter, by name; a damaged one is a line in the log."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if not name.startswith("."))
        except OSError:
            return []
        found = [self._read(name) for name in names]
        self._faults = {name: fault for name, fault in self._faults.items() if name in names}
        return [adapter for adapter in found if adapter]

    def find(self, name: str) -> Adapter:
        """The adapter of that name; ConfigError names those that are here."""
        adapter = self._read(check_adapter_name(name))
        if adapter is None:
            names = ", ".join(adapter.name for adapter in self.list()) or "none"
            raise ConfigError(
                f"no adapter {name!r}; stored: {names}", remedy="see `edged adapters ls`", code="no-adapter"
            )
        return adapter

    def adopt(self, folder: str | Path, name: str, meta: AdapterMeta, *, replaces: bool = False) -> Adapter:
        """Move a finished PEFT folder of the home's own file system into the store, by one rename.

        A taken name gets -2, -3, ... unless it `replaces` that one. EngineError where files are missing or
        the disk fails; then the folder stays where it was. Hashes the files: call it in a thread.
        """
        check_adapter_name(name)
        source = Path(folder)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stored = _describe(source, meta)
            with held(self._folder, wait=True):
                chosen = name if replaces else self._free(name)
                numbered = {"name": chosen, "stem": name, "version": self._next_version(name)}
                write_atomically(source / META, _packed(msgspec.structs.replace(stored, **numbered)))
                _publish(source, self._folder / chosen)
        except OSError as error:
            raise EngineError(
                f"expected to store adapter {name!r}; {error.strerror or error}",
                remedy="check the disk that holds the home",
            ) from error
        return self.find(chosen)

    async def add(
        self,
        name: str,
        files: Sequence[int],
        base: tuple[Model, EngineEntry],
        supervisor: Supervisor,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> Adapter:
        """Check and store a PEFT folder that was made elsewhere, in a process of its own.

        `files`: its adapter_config.json and adapter_model.safetensors, open; `base`: the stored model it is
        for, and the engine whose `adapt` looks at it. ConfigError says what does not fit.
        """
        check_adapter_name(name)
        if len(files) != 2:
            raise ConfigError(f"expected two open files with the request; {len(files)} came")
        if (self._folder / name).exists():
            raise ConfigError(
                f"expected a free name for another adapter; {name!r} is taken",
                remedy=f"choose another name, or first `edged adapters rm {name}`",
                code="name-taken",
            )
        model, entry = base
        params = {
            "files": list(files),
            "name": name,
            "home": str(self._folder.parent),
            "adapt": entry.adapt,
            "base": model.path,
            "base_sha256": model.sha256,
            "base_name": model.name,
        }
        stored = await supervisor.run_task(
            "edged.adapter_files:ingest", params, timeout_s=None, on_progress=on_progress, inherit=files
        )
        return self.find(str(stored["name"]))

    def remove(self, name: str) -> Adapter | None:
        """Delete an adapter, or a damaged one (then None); a worker that has it open reads on."""
        folder = self._folder / check_adapter_name(name)
        adapter = self._read(name)
        if adapter is None and not folder.is_dir():
            self.find(name)  # its error says what there is
        remove_entry(folder)
        self._faults.pop(name, None)
        return adapter

    async def export(
        self, name: str, files: Sequence[int], supervisor: Supervisor
    ) -> tuple[Adapter, builtins.list[dict[str, Any]]]:
        """Write an adapter's files into open descriptors, in the order of FILES, in a process of its own.

        The rows {name, bytes, sha256} of what was written: without adapter.gguf, two. ConfigError for
        descriptors of anything but regular files, EngineError where their disk is full.
        """
        adapter = self.find(name)
        if len(files) != len(FILES):
            raise ConfigError(f"expected {len(FILES)} open files with the request; {len(files)} came")
        params = {"folder": adapter.folder, "files": list(files)}
        written = await supervisor.run_task(
            "edged.adapter_files:copy_out", params, timeout_s=None, inherit=files
        )
        return adapter, written["files"]

    def method_of(self, adapter: Adapter) -> str:
        """What made an adapter of kind "seeds"; ConfigError for one of another."""
        if adapter.kind != "seeds":
            raise ConfigError(
                f'expected an adapter of kind "seeds" to write a model of; {adapter.name!r} is of kind '
                f"{adapter.kind!r}",
                remedy=f"edged adapters export {adapter.name} DIR",
                code="no-seeds",
            )
        return _read_config(Path(adapter.folder) / CONFIG).method

    async def write_model(
        self,
        adapter: Adapter,
        base: Model,
        file: int,
        kind: str,
        makers: tuple[str, str],
        supervisor: Supervisor,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> dict[str, Any]:
        """Write into the open file what `base` and an adapter of kind "seeds" make, in a process of its own:
        {"tensors": int, "bytes": int}. `makers`: an engine's `rewrite` and a method's `whole`."""
        rewrite, whole = makers
        params = {
            "folder": adapter.folder,
            "base": base.path,
            "file": file,
            "kind": kind,
            "rewrite": rewrite,
            "whole": whole,
        }
        return await supervisor.run_task(
            "edged.adapter_files:write_model",
            params,
            timeout_s=None,
            on_progress=on_progress,
            inherit=(file,),
        )

    def _free(self, name: str) -> str:
        for number in range(1, SUFFIX_MAX):
            suffix = "" if number == 1 else f"-{number}"
            chosen = name[: NAME_CHARS_MAX - len(suffix)] + suffix
            if not (self._folder / chosen).exists():
                return chosen
        raise ConfigError(
            f"expected a free name for an adapter; {name!r} to {name}-{SUFFIX_MAX - 1} are taken",
            remedy="remove some with `edged adapters rm`",
        )

    def _next_version(self, stem: str) -> int:
        return 1 + max((each.version for each in self.list() if each.stem == stem), default=0)

    def _read(self, name: str) -> Adapter | None:
        adapter, fault = read_entry(self._folder / name)
        if fault and self._faults.get(name) != fault:
            log.warning("adapter skipped", extra={"adapter": name, "reason": fault})
        if fault:
            self._faults[name] = fault
        else:
            self._faults.pop(name, None)
        return adapter


def check_adapter_name(name: str) -> str:
    return check_model_name(name, "adapter")


def read_entry(folder: Path) -> tuple[Adapter | None, str]:
    """An adapter, or None and what is wrong with it; nothing is where there is no such folder."""
    if not folder.is_dir():
        return None, ""
    try:
        with open(folder / META, "rb") as file:
            meta = msgspec.json.decode(file.read(META_BYTES_MAX), type=_Stored)
        for name, promised in meta.files.items():
            found = os.stat(folder / check_file_name(name))
            if (found.st_size, found.st_mtime_ns) != (promised.bytes, promised.mtime_ns):
                return None, f"its {name} changed since it was stored"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"its files cannot be read ({type(error).__name__})"
    if not is_sha256(meta.base_sha256) or not {CONFIG, TENSORS} <= set(meta.files):
        return None, "its meta.json is none"
    gguf = meta.files.get(GGUF)
    adapter = Adapter(
        name=folder.name,
        base_sha256=meta.base_sha256,
        base_name=meta.base_name,
        r=meta.r,
        alpha=meta.alpha,
        kind=meta.kind,
        scope=meta.scope,
        bytes=sum(file.bytes for file in meta.files.values()),
        created_at=meta.created_at,
        provenance=meta.provenance,
        folder=str(folder),
        path=str(folder / GGUF) if gguf else "",
        sha256=gguf.sha256 if gguf else "",
        gguf_bytes=gguf.bytes if gguf else 0,
        stem=meta.stem or folder.name,
        version=meta.version,
    )
    return adapter, ""


def check_file_name(name: str) -> str:
    """ValueError for a file that an adapter has not."""
    if name not in FILES:
        raise ValueError(f"an adapter has no file {name!r}")
    return name


# --- into the store -------------------------------------------------------------------------------


def _describe(folder: Path, meta: AdapterMeta) -> _Stored:
    """What meta.json will say of the files, all of them flushed and their owner's alone."""
    files = {}
    for name in FILES:
        if (folder / name).is_file() and not (folder / name).is_symlink():
            files[name] = _hashed(folder / name)
        elif name != GGUF:
            raise EngineError(
                f"expected {CONFIG} and {TENSORS} of an adapter; {name} is missing",
                remedy="train it again, or add it from a whole PEFT folder",
            )
    if not is_sha256(meta.base_sha256):
        raise EngineError("expected the SHA-256 of the adapter's base model; there is none")
    if not (meta.r and meta.alpha):
        config = _read_config(folder / CONFIG)
        meta = replace(meta, r=config.r, alpha=config.lora_alpha)
    if meta.kind == "lora" and not (meta.r and meta.alpha):
        raise EngineError(
            f"expected `r` and `lora_alpha` in {CONFIG}; there are none",
            remedy="train it again, or add it from a whole PEFT folder",
        )
    told = {name: getattr(meta, name) for name in AdapterMeta.__slots__}
    count = sum(file.bytes for file in files.values())
    return _Stored(**told, created_at=time.time(), files=files, bytes=count)


def _read_config(path: Path) -> _Config:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(CONFIG_BYTES_MAX), type=_Config)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            f"expected `r` and `lora_alpha` in {CONFIG}; {type(error).__name__}",
            remedy="train it again, or add it from a whole PEFT folder",
        ) from error


def _packed(stored: _Stored) -> bytes:
    packed = msgspec.json.encode(stored)
    if len(packed) > META_BYTES_MAX:
        raise EngineError(f"expected a provenance of at most {META_BYTES_MAX} bytes; {len(packed)} came")
    return packed


def _hashed(path: Path) -> _File:
    """SHA-256 and size of a file that is flushed on the way."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), 0o600)
        while piece := file.read(PIECE_BYTES):
            sha256.update(piece)
        os.fsync(file.fileno())
        found = os.fstat(file.fileno())
    return _File(found.st_size, found.st_mtime_ns, sha256.hexdigest())


def _publish(source: Path, target: Path) -> None:
    """Rename into place; what has the name makes room first."""
    os.chmod(source, 0o700)
    fsync_folder(source)
    aside = None
    with contextlib.ExitStack() as made_room:
        if target.exists():
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=STAGING))
            os.rename(target, aside / "old")
            made_room.callback(os.rename, aside / "old", target)
        os.rename(source, target)
        made_room.pop_all()
    fsync_folder(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)  # the next ingest tries again
