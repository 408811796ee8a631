"""Writes the model that a base and the seeds of a training make, in the base's own format: `rewrite`.

A GGUF keeps all its keys, byte for byte but for `general.file_type`, and the names and order that llama.cpp
knows its tensors by; what its converter changes of values is done again. A packed safetensors file keeps its
texts. Matrices are F32 or F16, vectors F32. One tensor is in memory at a time.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy
import torch

from edged import ConfigError, EngineError

from .._gguf import Tensor, ggml_type, raw_keys
from ._engine import Blocks, open_blocks
from ._gguf_model import GgufModel
from ._packing import packed_head
from ._safetensors_head import Entry
from ._safetensors_model import SafetensorsModel

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BYTES = {"f32": 4, "f16": 2}
NUMPY = {"f32": "<f4", "f16": "<f2"}
FILE_TYPES = {"f32": 0, "f16": 1}  # llama.cpp's ALL_F32 and MOSTLY_F16
FILE_TYPE, ALIGNMENT = "general.file_type", "general.alignment"
WIDE = ("position_embd.",)  # that llama.cpp keeps in F32
PIECE_BYTES = 1 << 20

Made = Callable[[str], torch.Tensor]  # transformers' tensor of that name, F32, tuned
Tick = Callable[[int, int], None]


def rewrite(
    folder: str, base: str, out: int, kind: str, whole: Callable[..., Any], tick: Tick
) -> dict[str, int]:
    """As `EngineEntry.rewrite` says: the file that `out` is open on gets the model of `base` and `folder`."""
    if kind not in BYTES:
        raise ConfigError(f"expected weights of f32 or f16; {kind!r} came")
    config, extras = _read(Path(folder))
    blocks = open_blocks(base)
    if config["layout"] != blocks.layout:
        raise ConfigError(
            "expected seeds of this model's tensors; these go by other names or shapes",
            remedy="write it with the version of edged that trained it",
        )
    shapes = blocks.weights()
    part = whole(config["settings"], {name: math.prod(shape) for name, shape in shapes.items()}, 0)

    def made(name: str) -> torch.Tensor:
        value = blocks.source.tensor(name).contiguous()
        part.rebuild(name, value.view(-1).numpy(), extras)
        return value

    try:
        with os.fdopen(os.dup(out), "wb") as file:
            written = _write(blocks, made, file, kind, tick)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EngineError(
            f"expected to write the model; {error.strerror or error}", remedy="choose a disk with room"
        ) from error
    return written


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config["settings"], dict) or config["edged_kind"] != "seeds":
            raise ValueError("it is of another kind")
        return {"layout": "", **config}, safetensors.numpy.load_file(folder / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"expected an adapter of seeds; {type(error).__name__}: {error}") from error


def _write(blocks: Blocks, made: Made, file: BinaryIO, kind: str, tick: Tick) -> dict[str, int]:
    source = blocks.source
    if isinstance(source, GgufModel):
        return _write_gguf(source, list(blocks.weights()), made, file, kind, tick)
    assert isinstance(source, SafetensorsModel)
    return _write_packed(source, blocks.weights(), made, file, kind, tick)


def _numbers(name: str, value: torch.Tensor, kind: str) -> bytes:
    """EngineError where a value is none of that type."""
    found = value.contiguous().numpy().astype(NUMPY[kind])
    if not np.isfinite(found).all():
        raise EngineError(
            f"expected values of {name!r} that {kind.upper()} has; some are too large",
            remedy="write it with --type f32" if kind == "f16" else "train with a smaller learning_rate",
        )
    return found.tobytes()


# --- GGUF -----------------------------------------------------------------------------------------


def _write_gguf(
    source: GgufModel, names: list[str], made: Made, file: BinaryIO, kind: str, tick: Tick
) -> dict[str, int]:
    head = source.head
    tuned = [entry for name in names for entry in source.stored(name)]
    there = {entry.name for entry in tuned}
    rest = [entry for entry in head.tensors.values() if entry.name not in there]
    kinds = {
        entry.name: "f32" if len(entry.shape) == 1 or entry.name.startswith(WIDE) else kind for entry in tuned
    }
    step = int(head.keys.get(ALIGNMENT, 32))
    sizes = {entry.name: math.prod(entry.shape) * BYTES[kinds[entry.name]] for entry in tuned}
    sizes |= {entry.name: entry.bytes for entry in rest}
    types = {name: ggml_type(each) for name, each in kinds.items()} | {each.name: each.type for each in rest}
    start = _gguf_head(source.path, [*tuned, *rest], types, sizes, kind, step)
    file.write(start + bytes(-len(start) % step))
    done, total = 0, sum(sizes.values())

    def put(name: str, data: bytes) -> None:
        nonlocal done
        file.write(data)
        file.write(bytes(-len(data) % step))
        done += len(data)
        tick(done, total)

    for name in names:
        for entry, value in zip(source.stored(name), source.as_stored(name, made(name)), strict=True):
            put(entry.name, _numbers(entry.name, value, kinds[entry.name]))
    for entry in rest:
        with open(source.path, "rb") as base:
            base.seek(entry.offset)
            put(entry.name, base.read(entry.bytes))
    return {"tensors": len(sizes), "bytes": total}


def _gguf_head(
    path: str,
    entries: list[Tensor],
    types: Mapping[str, int],
    sizes: Mapping[str, int],
    kind: str,
    step: int,
) -> bytes:
    """All before the data, not yet aligned. Layout: the GGUF specification, version 3."""
    keys, out = raw_keys(path), io.BytesIO()
    if FILE_TYPE in keys:
        name = FILE_TYPE.encode()
        keys[FILE_TYPE] = struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, FILE_TYPES[kind])
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys)))
    for raw in keys.values():
        out.write(raw)
    at = 0
    for entry in entries:
        name = entry.name.encode()
        out.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(entry.shape)))
        out.write(struct.pack(f"<{len(entry.shape)}Q", *entry.shape))
        out.write(struct.pack("<IQ", types[entry.name], at))
        at += -(-sizes[entry.name] // step) * step
    return out.getvalue()


# --- packed safetensors -----------------------------------------------------------------------------


def _write_packed(
    source: SafetensorsModel,
    shapes: Mapping[str, tuple[int, ...]],
    made: Made,
    file: BinaryIO,
    kind: str,
    tick: Tick,
) -> dict[str, int]:
    tuned = {source.stored(name): name for name in shapes}
    entries = {}
    for name, entry in sorted(source.head.tensors.items()):
        if name in tuned:
            of = kind if len(entry.shape) > 1 else "f32"
            entry = Entry(name, of.upper(), entry.shape, 0, math.prod(entry.shape) * BYTES[of])
        entries[name] = entry
    file.write(packed_head(source.head.texts, entries))
    done, total = 0, sum(entry.bytes for entry in entries.values())
    for name, entry in entries.items():
        pieces = (
            iter([_numbers(name, made(tuned[name]), entry.type.lower())])
            if name in tuned
            else _copied(source.path, entry)
        )
        for piece in pieces:
            file.write(piece)
        done += entry.bytes
        tick(done, total)
    return {"tensors": len(entries), "bytes": total}


def _copied(path: str, entry: Entry) -> Iterator[bytes]:
    with open(path, "rb") as base:
        base.seek(entry.offset)
        for first in range(0, entry.bytes, PIECE_BYTES):
            yield base.read(min(PIECE_BYTES, entry.bytes - first))
