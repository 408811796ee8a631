"""One rank's slice of a LoRA adapter, beside the weights it adapts: W x becomes W x + (alpha / r) B (A x).

Reads llama.cpp's LoRA files: `NAME.lora_a` (row length what the matrix takes, r rows) and `NAME.lora_b`
(row length r, as many rows as the matrix), NAME being the model's tensor. LoRA: Hu et al.,
arXiv:2106.09685. The order of the operations is llama.cpp's, so that a lone rank's logits are bit-equal
to it. A rank that has some rows of a matrix has these rows of B and all of A; one that has some of its
columns has these columns of A and all of B: what it adds then is its part of a sum, as its product is.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edged import EngineError

from .._gguf import Head, Tensor, read_head
from . import _ggml
from ._model import Model
from ._place import Place, Range
from ._weights import Part, parts_of

TYPES = {_ggml.F32: np.float32, _ggml.F16: np.float16}
NODES_PER_MATRIX = 4  # of a graph: two products, a scale, an addition
MATRICES_PER_LAYER = 7
SUFFIXES = (".lora_a", ".lora_b")


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one matrix, and the factor of their product."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows and columns of one tensor of the file."""

    tensor: Tensor
    rows: Range
    columns: Range


def read_pairs(path: str, model: Model) -> dict[str, Pair]:
    """The adapter's pairs by the name of the model's tensor (`blk.0.attn_q.weight`).

    EngineError where it is no LoRA file, is of another architecture, or adapts what this model has not.
    """
    head = read_head(path)
    _check_kind(head, model)
    alpha = head.keys.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise EngineError(f"{path}: adapter.lora.alpha is {alpha!r}; expected a number")
    adapted = {piece.source: model.head.tensors[piece.source] for piece in model.all_pieces()}
    del adapted["token_embd.weight"]
    return {name: _pair(head, name, adapted, float(alpha)) for name in _names(head)}


def _check_kind(head: Head, model: Model) -> None:
    kind = (head.keys.get("general.type"), head.keys.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise EngineError(f"{head.path} is no LoRA adapter: it says general.type, adapter.type {kind!r}")
    if "adapter.alora.invocation_tokens" in head.keys:
        raise EngineError(f"{head.path} is an activated LoRA, which the shard engine does not run")
    mine, its = (each.keys.get("general.architecture") for each in (model.head, head))
    if its != mine:
        raise EngineError(f"{head.path} adapts architecture {its!r}; the model is of {mine!r}")


def _names(head: Head) -> list[str]:
    found = {}
    for name in head.tensors:
        stem, suffix = name[:-7], name[-7:]
        if suffix not in SUFFIXES:
            raise EngineError(f"{head.path}: tensor {name} is neither a lora_a nor a lora_b")
        found[stem] = True
    if not found:
        raise EngineError(f"{head.path} adapts nothing")
    return list(found)


def _pair(head: Head, name: str, adapted: dict[str, Tensor], alpha: float) -> Pair:
    weight = adapted.get(name)
    if weight is None or len(weight.shape) != 2:
        raise EngineError(
            f"{head.path} adapts {name}, which the shard engine cannot",
            remedy="train an adapter of the attention's and feed-forward's matrices",
        )
    a, b = (head.tensors.get(name + suffix) for suffix in SUFFIXES)
    if a is None or b is None:
        raise EngineError(f"{head.path}: {name} has lora_a or lora_b alone; expected both")
    wide, rows = weight.shape
    if len(a.shape) != 2 or a.shape[0] != wide or b.shape != (a.shape[1], rows):
        raise EngineError(
            f"{head.path}: {name} is {wide} by {rows}; lora_a {list(a.shape)} and lora_b {list(b.shape)} "
            "do not fit it"
        )
    for tensor in (a, b):
        if tensor.type not in TYPES:
            raise EngineError(f"{head.path}: {tensor.name} is {tensor.type_name}; F32 and F16 are supported")
    return Pair(a, b, alpha / b.shape[0] if alpha else 1.0)


class Adapter:
    """An adapter's matrices by the key of the weight they belong to (`blk.0.attn_q`), in memory of their
    own: another adapter over the same weights is another of these."""

    def __init__(self, lib: _ggml.Ggml, path: str, model: Model, place: Place, exact: bool) -> None:
        """`exact`: in F32, whatever the file has. EngineError as `read_pairs`."""
        self._lib, self._exact = lib, exact
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._found: dict[str, tuple[int, int, float]] = {}
        self._places: dict[str, list[tuple[_Slice, int]]] = {}  # by the file's tensor
        pairs = read_pairs(path, model)
        parts = [part for part in parts_of(model, place) if part.tensor.name in pairs and not part.is_vector]
        slices = [each for part in parts for each in _slices(part, pairs[part.tensor.name])]
        if not slices:
            return
        try:
            tensors = self._allocate(slices)
            self._fill(path, slices, tensors)
        except BaseException:
            self.close()
            raise
        for part, a, b in zip(parts, tensors[::2], tensors[1::2], strict=True):
            self._found[part.key] = (a, b, pairs[part.tensor.name].scale)
        for each, tensor in zip(slices, tensors, strict=True):
            self._places.setdefault(each.tensor.name, []).append((each, tensor))

    @property
    def bytes(self) -> int:
        return sum(self._lib.backend_buffer_get_size(buffer) for buffer in self._buffers)

    def write(self, weight: str, a: np.ndarray, b: np.ndarray) -> None:
        """Other values of a tensor's pair ("blk.0.attn_q.weight"): A (r, in) and B (out, r) F32, its rows in
        the file's order. They count from the next graph on."""
        for suffix, values in zip(SUFFIXES, (a, b), strict=True):
            for each, tensor in self._places[weight + suffix]:
                part = values[slice(*each.rows), slice(*each.columns)]
                _ggml.array(self._lib, tensor, TYPES[self._type(each.tensor)], part.shape)[...] = part

    @property
    def extra_nodes(self) -> int:
        """Nodes that it adds to a graph for any one layer, or the output head, at most."""
        return NODES_PER_MATRIX * MATRICES_PER_LAYER if self._found else 0

    def added(self, ops: Any, product: int, x: int, key: str) -> int:
        """The product of the weight `key` with x, and what the adapter adds to it."""
        found = self._found.get(key)
        if found is None:
            return product
        a, b, scale = found
        return int(ops.add(product, ops.scale(ops.mul_mat(b, ops.mul_mat(a, x)), scale)))

    def close(self) -> None:
        for buffer in self._buffers:
            self._lib.backend_buffer_free(buffer)
        for context in self._contexts:
            self._lib.free(context)
        self._buffers, self._contexts, self._found, self._places = [], [], {}, {}

    def _type(self, tensor: Tensor) -> int:
        return _ggml.F32 if self._exact else tensor.type

    def _allocate(self, slices: Sequence[_Slice]) -> list[int]:
        context = _ggml.new_context(self._lib, len(slices))
        self._contexts.append(context)
        tensors = [
            self._lib.new_tensor_2d(
                context, self._type(s.tensor), s.columns[1] - s.columns[0], s.rows[1] - s.rows[0]
            )
            for s in slices
        ]
        kind = self._lib.backend_cpu_buffer_type()
        buffer = self._lib.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise EngineError("out of memory for the adapter", remedy="give this node a smaller share")
        self._lib.backend_buffer_set_usage(buffer, _ggml.USAGE_WEIGHTS)
        self._buffers.append(buffer)
        return tensors

    def _fill(self, path: str, slices: Sequence[_Slice], tensors: Sequence[int]) -> None:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for s, tensor in zip(slices, tensors, strict=True):
                kind = TYPES[s.tensor.type]
                wide, high = s.tensor.shape
                whole = np.frombuffer(data, kind, wide * high, s.tensor.offset).reshape(high, wide)
                values = whole[slice(*s.rows), slice(*s.columns)]
                target = _ggml.array(self._lib, tensor, TYPES[self._type(s.tensor)], values.shape)
                target[...] = values
                del whole, values  # the file is unmapped below
                if not np.isfinite(target).all():
                    raise EngineError(f"{path}: {s.tensor.name} holds what is no finite number")


def _slices(part: Part, pair: Pair) -> tuple[_Slice, _Slice]:
    rank = (0, pair.a.shape[1])
    return _Slice(pair.a, rank, part.columns), _Slice(pair.b, part.rows, rank)
