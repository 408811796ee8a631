"""Reads the head of a safetensors file: its tensor table and its texts, never the tensor data.

Layout: safetensors' specification: 8 bytes of length, that much JSON, the data. Every length and offset is
checked against the file before it is used. No torch: `models add` and packing need none.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edged import EngineError

HEAD_BYTES_MAX = 100_000_000  # safetensors' own bound
DIMENSIONS_MAX = 8
BYTES_OF = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor. `shape`: rows before columns; `offset`: from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHead:
    path: str
    texts: Mapping[str, str]  # `__metadata__`
    tensors: Mapping[str, Entry]


def is_safetensors(path: str) -> bool:
    """Does the file begin as one does: a length, then a JSON object?"""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror or error}") from error
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= HEAD_BYTES_MAX


def read_safetensors_head(path: str) -> SafetensorsHead:
    """Texts and tensor table of the file, every tensor known to lie inside it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEAD_BYTES_MAX, size - 8):
                raise ValueError(f"its head would have {length} bytes, the file has {size}")
            head = json.loads(file.read(length))
        return _parse(path, head, 8 + length, size)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not a safetensors file this engine reads: {error}") from error


def _parse(path: str, head: Any, start: int, size: int) -> SafetensorsHead:
    if not isinstance(head, dict):
        raise ValueError("its head is no JSON object")
    texts = head.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its __metadata__ is not a map of texts")
    tensors = {name: _entry(name, value, start) for name, value in head.items()}
    for entry in tensors.values():
        if entry.offset + entry.bytes > size:
            raise EngineError(
                f"{path} is truncated: tensor {entry.name!r} ends at byte {entry.offset + entry.bytes}, "
                f"the file at {size}",
                remedy="fetch the file again",
            )
    return SafetensorsHead(path, texts, tensors)


def _entry(name: str, value: Any, start: int) -> Entry:
    try:
        kind, shape, (first, last) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
    if kind not in BYTES_OF:
        raise ValueError(f"tensor {name!r} has type {kind!r}; {', '.join(BYTES_OF)} are read")
    numbers = (*shape, first, last)
    if len(shape) > DIMENSIONS_MAX or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
        raise ValueError(f"tensor {name!r} has an impossible shape or place")
    if last - first != math.prod(shape) * BYTES_OF[kind]:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} would have {last - first} bytes")
    return Entry(name, kind, shape, start + first, last - first)


def main_type(tensors: Mapping[str, Entry]) -> str:
    """The type that holds most of the bytes."""
    count: Counter[str] = Counter()
    for entry in tensors.values():
        count[entry.type] += entry.bytes
    return count.most_common(1)[0][0] if count else "F32"
