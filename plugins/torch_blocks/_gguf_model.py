"""A GGUF as a model of transformers: its configuration, and its tensors one by one as transformers has them.

Tensors are dequantised by the `gguf` package, a few rows at a time, into their place. What llama.cpp's
converter changes of a family's tensors is undone here: rows of queries and keys permuted for its rope
(Llama), matrices transposed (GPT-2), queries, keys and values of all heads put one after the other
(GPT-NeoX, BLOOM), and one added to norms (Gemma).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from edged import EngineError

from .._gguf import Tensor, read_head
from .._tensors.families import ROPE_FREQS
from .._tensors.vocabulary import LlamaTokenizer
from ._gguf_config import config_of, family_of, names_of, refuse_unknown_tensors
from ._tokens import Tokenizer

PIECE_BYTES = 1 << 20  # of a tensor's file bytes that are dequantised at a time
_NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}


class GgufModel:
    """The model of the GGUF at `path`; EngineError where this engine does not know all of it.

    `config`: fields of transformers' configuration. `reads`: names of tensors read so far, llama.cpp's.
    """

    def __init__(self, path: str) -> None:
        self.path, self.head = path, read_head(path)
        self.reads: list[str] = []
        self.family = family_of(self.head)
        self.config = config_of(self.head, self.family)
        self._names = names_of(self.family, self.config["num_hidden_layers"])
        refuse_unknown_tensors(self.head, self.family, self.config)

    def tokenizer(self) -> Tokenizer:
        return LlamaTokenizer(self.head)

    def has(self, name: str) -> bool:
        """Does the file hold transformers' tensor `name`?"""
        source = self._source(name)
        return source in self.head.tensors or (name.endswith("_proj.weight") and self._parts(source) != [])

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Transformers' tensor `name` in transformers' layout; a matrix of `dtype`, a vector F32."""
        source = self._source(name)
        if source in self.head.tensors:
            found = self._read(source, dtype)
        elif parts := self._parts(source):
            found = torch.cat([self._read(part, dtype) for part in parts])
        else:
            raise EngineError(f"{self.path} lacks tensor {source!r} ({name} of a {self.family.name} model)")
        return self._undo(name, found)

    def stored(self, name: str) -> list[Tensor]:
        """What the file has for transformers' tensor `name`: one entry, or the three of a fused one."""
        source = self._source(name)
        names = [source] if source in self.head.tensors else self._parts(source)
        return [self.head.tensors[each] for each in names]

    def as_stored(self, name: str, value: torch.Tensor) -> list[torch.Tensor]:
        """Transformers' tensor `name` as a file has it, in `stored`'s order: the converse of `tensor`."""
        kind, heads = self._change(name)
        if kind == "permuted":
            half = value.shape[0] // heads // 2
            value = value.reshape(heads, 2, half, -1).transpose(1, 2).reshape(value.shape)
        elif kind == "interleaved":
            width = value.shape[0] // heads // 3
            value = value.reshape(heads, 3, width, -1).transpose(0, 1).reshape(value.shape)
        elif kind == "transposed" and value.ndim == 2:
            value = value.T
        elif kind == "plus one":
            value = value + 1
        entries = self.stored(name)
        return list(value.split([entry.shape[-1] for entry in entries])) if len(entries) > 1 else [value]

    def rope_factors(self) -> torch.Tensor | None:
        """What the file divides rope's frequencies by, where it says so in a tensor (Llama 3)."""
        return self._read(ROPE_FREQS) if ROPE_FREQS in self.head.tensors else None

    def _source(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        return f"{self._names.get(stem, stem)}.{kind}"

    def _parts(self, source: str) -> list[str]:
        """The three tensors that stand in the file for a fused one."""
        if "attn_qkv" not in source:
            return []
        parts = [source.replace("attn_qkv", f"attn_{letter}") for letter in "qkv"]
        return parts if all(part in self.head.tensors for part in parts) else []

    def _change(self, name: str) -> tuple[str | None, int]:
        """What the converter did to a tensor, and the heads that its rows are of."""
        stem = name.rpartition(".")[0]
        block = f"{self.family.base}.{self.family.layers}."
        if stem.startswith(block):
            stem = stem.removeprefix(block).partition(".")[2]
        of = "num_key_value_heads" if stem.endswith("k_proj") else "num_attention_heads"
        return (self.family.undo or {}).get(stem), self.config[of]

    def _undo(self, name: str, found: torch.Tensor) -> torch.Tensor:
        undo, heads = self._change(name)
        if undo == "permuted":
            half = found.shape[0] // heads // 2
            return found.reshape(heads, half, 2, -1).transpose(1, 2).reshape(found.shape)
        if undo == "interleaved":
            width = found.shape[0] // heads // 3
            return found.reshape(3, heads, width, -1).transpose(0, 1).reshape(found.shape)
        if undo == "transposed" and found.ndim == 2:
            return found.T.contiguous()
        if undo == "plus one":
            return found - 1
        return found

    def _read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of the file, rows before columns, rounded to `dtype` where it is a matrix."""
        entry = self.head.tensors[name]
        self.reads.append(name)
        shape = entry.shape[::-1]
        rows, width = math.prod(shape[:-1]), shape[-1]
        found = torch.empty((rows, width), dtype=dtype if len(shape) > 1 else torch.float32)
        at_once = max(1, PIECE_BYTES // max(1, entry.bytes // rows))
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.offset)
                for row in range(0, rows, at_once):
                    count = min(at_once, rows - row)
                    numbers = _numbers(entry, file.read(entry.bytes // rows * count), count)
                    found[row : row + count] = torch.from_numpy(numbers)
        except OSError as error:
            raise EngineError(f"cannot read {self.path}: {error.strerror or error}") from error
        return found.reshape(shape)


def _numbers(entry: Tensor, data: bytes, rows: int) -> np.ndarray:
    if entry.type_name in _NUMPY:
        return np.frombuffer(bytearray(data), _NUMPY[entry.type_name]).reshape(
            rows, -1
        )  # torch wants it writable
    raw = np.frombuffer(data, np.uint8).reshape(rows, -1)
    try:
        return dequantize(raw, GGMLQuantizationType(entry.type))
    except NotImplementedError as error:
        raise EngineError(
            f"tensor {entry.name!r} has type {entry.type_name}, which cannot be dequantised",
            remedy="convert the model to another type, such as Q8_0",
        ) from error
