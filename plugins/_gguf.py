"""Reads the head of a GGUF file: its keys and its tensor table, never the tensor data.

`gguf.GGUFReader` makes an object per vocabulary entry (seconds for a large vocabulary); this walks
the file once and skips arrays. Every length is checked against the file before it is used, so a
damaged or hostile file costs an EngineError. Layout: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edged import EngineError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAME_BYTES_MAX = 65535
_DIMENSIONS_MAX = 4
_ELEMENTS_MAX = 2**48


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table. `shape` in ggml's order: the row length first."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int  # from the file's start
    bytes: int

    @property
    def type_name(self) -> str:
        return GGMLQuantizationType(self.type).name

    @property
    def block(self) -> int:
        return GGML_QUANT_SIZES[GGMLQuantizationType(self.type)][0]

    @property
    def row_bytes(self) -> int:
        """Of one row; a vector is one."""
        return self.bytes // (self.shape[1] if len(self.shape) > 1 else 1)


@dataclass(frozen=True, slots=True)
class ArrayKey:
    """An array in the keys: how long it is, not what it holds."""

    length: int


@dataclass(frozen=True, slots=True)
class Head:
    path: str
    keys: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def weight_type(self) -> str:
        """The type that holds most of the layers' bytes."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.name.startswith("blk."):
                count[tensor.type_name] += tensor.bytes
        return count.most_common(1)[0][0] if count else "F32"


def ggml_type(name: str) -> int:
    """ggml's number of an element type: "f16" is 1."""
    return int(GGMLQuantizationType[name.upper()])


class _Cursor:
    """A position in the mapped file that never reads past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def text(self, limit: int | None = None) -> str:
        size = self.scalar("Q")
        if limit is not None and size > limit:
            raise ValueError(f"a name of {size} bytes")
        self.need(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        data, at, end, unpack = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise ValueError("the keys run past the end of the file")
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.need(0)

    def need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise ValueError("its head runs past the end of the file")


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise ValueError(f"a key of unknown type {kind}")
    element, length = cursor.scalar("I"), cursor.scalar("Q")
    if element == _STRING:
        cursor.skip_texts(length)
    elif element in _SCALARS:
        size = struct.calcsize("<" + _SCALARS[element]) * length
        cursor.need(size)
        cursor.at += size
    else:
        raise ValueError(f"an array of unknown type {element}")
    return ArrayKey(length)


def _tensor(cursor: _Cursor) -> Tensor:
    """One table entry; its offset still counts from the data section."""
    name = cursor.text(_NAME_BYTES_MAX)
    count = cursor.scalar("I")
    if not 1 <= count <= _DIMENSIONS_MAX:
        raise ValueError(f"tensor {name!r} has {count} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(count))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name!r} has unknown type {kind}") from None
    elements = 1
    for n in shape:
        elements *= n
    if not 0 < elements <= _ELEMENTS_MAX or shape[0] % block:
        raise ValueError(f"tensor {name!r} has an impossible shape {list(shape)}")
    return Tensor(name, kind, shape, offset, elements // block * size)


def _parse(path: str, data: mmap.mmap) -> Head:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; 2 and 3 are read")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.text(_NAME_BYTES_MAX)
        keys[name] = _value(cursor, cursor.scalar("I"))
    table = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {t.name: Tensor(t.name, t.type, t.shape, t.offset + start, t.bytes) for t in table}
    if len(tensors) != len(table):
        raise ValueError("two tensors have the same name")
    return Head(path, keys, tensors)


def read_head(path: str) -> Head:
    """Keys and tensor table of the file, every tensor known to lie inside it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ValueError(f"it has {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                head = _parse(path, data)
    except OSError as exc:
        raise EngineError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise EngineError(f"{path} is not a GGUF model this engine reads: {exc}") from exc
    for tensor in head.tensors.values():
        if tensor.offset + tensor.bytes > size:
            raise EngineError(
                f"{path} is truncated: tensor {tensor.name!r} ends at byte "
                f"{tensor.offset + tensor.bytes}, the file at {size}",
                remedy="fetch the file again",
            )
    return head


def section_sha256(path: str, prefix: str) -> str:
    """SHA-256 of every key whose name begins with `prefix`, arrays included, whatever their order is."""
    spans = [(name, raw) for name, raw in raw_keys(path).items() if name.startswith(prefix)]
    return hashlib.sha256(b"".join(raw for _, raw in sorted(spans))).hexdigest()


def raw_keys(path: str) -> dict[str, bytes]:
    """Every key in the file's order: its bytes there, from its name's length to its value's end."""
    found = {}
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.at = 16
            for _ in range(cursor.scalar("Q")):
                start = cursor.at
                name = cursor.text(_NAME_BYTES_MAX)
                _value(cursor, cursor.scalar("I"))
                found[name] = bytes(data[start : cursor.at])
    except (OSError, ValueError) as exc:
        raise EngineError(f"{path} is not a GGUF model this engine reads: {exc}") from exc
    return found
