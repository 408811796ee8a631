"""One rank's weights in ggml buffers.

Slices are copied, never used as strided views of the mapped file (4 times slower). Where the CPU
has faster kernels for a rearranged layout, matrices go into that buffer type, by the question
llama.cpp asks: does the device support a mul_mat with a weight of this shape in that buffer? The
embedding is read by single rows and stays mapped. Pages of the file are dropped once copied.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from edged import EngineError

from .._gguf import Tensor
from . import _ggml
from ._model import REPACK_ROWS, Model
from ._place import Place, Range
from ._tensors import Piece
from ._window import NODES_PER_BAND, UNIT_BYTES, Window

SLAB_ROWS = 256  # rows converted to F32 at a time
PROBE_COLUMNS = 512  # batch of the mul_mat asked about, as in llama.cpp


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of one tensor: a range of rows and one of columns, in elements."""

    key: str
    tensor: Tensor
    rows: Range
    columns: Range

    @property
    def shape(self) -> tuple[int, int]:
        """Row length, row count."""
        return self.columns[1] - self.columns[0], self.rows[1] - self.rows[0]

    @property
    def is_vector(self) -> bool:
        return len(self.tensor.shape) == 1


def parts_of(model: Model, place: Place) -> list[Part]:
    """Everything `place` computes with, but for what `mapped_of` names."""
    pieces = model.pieces
    found = [piece for layer in range(*place.layers) for piece in pieces.layer(layer)]
    found += pieces.rope()
    if place.is_first:
        found += [piece for piece in pieces.embedding() if not _is_table(piece)]
    if place.is_last:
        found += pieces.head()
    cuts = _cuts(model, place)
    return [_part(model, piece, cuts) for piece in found if not cuts.get(piece.once, (0, 0))[0]]


def mapped_of(model: Model, place: Place) -> dict[str, Tensor]:
    """Tables that `place` reads by single rows, from the mapped file."""
    if not place.is_first:
        return {}
    tables = {p.key: model.head.tensors[p.source] for p in model.pieces.embedding() if _is_table(p)}
    return {"token_embd": model.tensor("token_embd")} | tables


def _is_table(piece: Piece) -> bool:
    return len(piece.axes) == 2


def _cuts(model: Model, place: Place) -> dict[str, Range]:
    """The place's range of each axis that a group shares out; every slice holds whole KV groups."""
    size, heads = model.head_dim, place.heads
    return {
        "heads": (heads[0] * size, heads[1] * size),
        "kv": (heads[0] // model.group * size, -(-heads[1] // model.group) * size),
        "ffn": place.ffn,
        "vocab": place.vocab,
    }


def _part(model: Model, piece: Piece, cuts: dict[str, Range]) -> Part:
    tensor = model.head.tensors[piece.source]
    *row, last = (cuts.get(axis, (0, model.sizes[axis])) for axis in piece.axes)
    moved = (piece.first + last[0], piece.first + last[1])
    part = Part(piece.key, tensor, moved if row else (0, 1), row[0] if row else moved)
    if part.columns[0] % tensor.block or part.columns[1] % tensor.block:
        raise EngineError(
            f"columns {part.columns[0]} to {part.columns[1]} of {tensor.name} cut through its "
            f"{tensor.type_name} blocks of {tensor.block}"
        )
    return part


@dataclass(frozen=True, slots=True)
class Limit:
    """Bytes of memory for a rank's weights, and the folder where those that do not fit are kept."""

    bytes: int
    folder: str


class Weights:
    """Tensors by name: `blk.0.attn_q`, `blk.0.attn_q.bias`, `output`, ...; `token_embd` where this
    rank embeds."""

    def __init__(
        self, lib: _ggml.Ggml, model: Model, place: Place, exact: bool, limit: Limit | None = None
    ) -> None:
        """`limit`: what they may take of the memory; the rest passes through a window over them."""
        self._lib, self._exact = lib, exact
        self._window: Window | None = None
        self._band_counts: Counter[str] = Counter()  # by layer, or by what is outside of layers
        self._buffers: list[int] = []
        self._mapped: list[int] = []
        self._contexts: list[int] = []
        self.tensors: dict[str, int] = {}
        self.repacked_bytes = 0
        with open(model.head.path, "rb") as file:
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file = np.frombuffer(self._map, dtype=np.uint8)
        try:
            self._load_within(parts_of(model, place), limit)
            self._tables = mapped_of(model, place)
            for key, tensor in self._tables.items():
                self.tensors[key] = self._map_tensor(tensor)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> int:
        return self.tensors[name]

    def get(self, name: str) -> int | None:
        """The tensor, or None where the model has none of that name."""
        return self.tensors.get(name)

    @property
    def bytes(self) -> int:
        """Memory of the copied weights; the mapped embedding is the page cache's."""
        windowed = self._window.bytes if self._window else 0
        return windowed + sum(self._lib.backend_buffer_get_size(b) for b in self._buffers)

    def ops(self, context: int) -> _ggml.Ops:
        """Operations of a graph that uses these weights."""
        return self._window.ops(context) if self._window else _ggml.Ops(self._lib, context)

    @property
    def extra_nodes(self) -> int:
        """Nodes that a window adds to a graph for any one layer, or the output head, at most."""
        return NODES_PER_BAND * max(self._band_counts.values(), default=0)

    def settle(self) -> None:
        """After a graph ran: EngineError where weights that it used could not be loaded."""
        if self._window is not None:
            self._window.check()
            for tensor in self._tables.values():
                self._drop_pages(tensor)

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
            self._window = None
        for buffer in self._buffers + self._mapped:
            self._lib.backend_buffer_free(buffer)
        for context in self._contexts:
            self._lib.free(context)
        self._buffers, self._mapped, self._contexts = [], [], []
        self.tensors = {}
        if self._map is not None:
            del self._file
            self._map.close()
            self._map = None

    # --- placing ---------------------------------------------------------------------------------

    def _load_within(self, parts: list[Part], limit: Limit | None) -> None:
        """All in memory; or, above the limit, vectors in memory and matrices through a window."""
        if limit is None or sum(map(self._bytes_of, parts)) <= limit.bytes:
            self._load(parts)
            return
        vectors = [part for part in parts if part.is_vector]
        bands = [_bands(part, self._row_bytes(part)) for part in parts if not part.is_vector]
        self._load(vectors)
        room = limit.bytes - sum(map(self._bytes_of, vectors))
        spilled = sum(self._bytes_of(band) + mmap.PAGESIZE for matrix in bands for band in matrix)
        self._window = Window(self._lib, limit.folder, room, spilled)
        for matrix in bands:
            self._add_to(self._window, matrix)
        self._window.start()

    def _add_to(self, window: Window, bands: list[Part]) -> None:
        plain = self._lib.backend_cpu_buffer_type()
        kind = self._buffer_type(_joined(bands)) or plain
        context = _ggml.new_context(self._lib, len(bands))
        self._contexts.append(context)
        tensors = [self._lib.new_tensor_2d(context, self._type(band), *band.shape) for band in bands]

        def fill(band: int, tensor: int) -> None:
            self._fill(bands[band], tensor, is_plain=kind == plain)
            self._drop_pages(bands[band].tensor)

        layer = ".".join(bands[0].key.split(".")[:2])
        self._band_counts[layer] += len(bands)
        self.tensors[bands[0].key] = window.add([(tensor, kind) for tensor in tensors], fill)

    def _row_bytes(self, part: Part) -> int:
        kind = self._type(part)
        return int(self._lib.type_size(kind) * part.shape[0] // self._lib.blck_size(kind))

    def _bytes_of(self, part: Part) -> int:
        return self._row_bytes(part) * part.shape[1]

    def _load(self, parts: list[Part]) -> None:
        plain = self._lib.backend_cpu_buffer_type()
        by_type: dict[int, list[Part]] = {}
        for part in parts:
            by_type.setdefault(self._buffer_type(part) or plain, []).append(part)
        for kind, members in by_type.items():
            self._allocate(kind, members)
        # The largest first: while a tensor is copied its source is in memory too, beside what came before.
        kinds = [(part, kind) for kind, members in by_type.items() for part in members]
        for part, kind in sorted(kinds, key=lambda pair: -self._bytes_of(pair[0])):
            self._fill(part, self.tensors[part.key], is_plain=kind == plain)
            self._drop_pages(part.tensor)

    def _buffer_type(self, part: Part) -> int | None:
        """The first rearranging buffer type that takes this matrix; None: a plain one."""
        if self._exact or part.is_vector:
            return None
        for kind in _ggml.extra_buffer_types(self._lib):
            if takes_weight(self._lib, kind, part.tensor.type, part.shape):
                return kind
        return None

    def _type(self, part: Part) -> int:
        return _ggml.F32 if self._exact else part.tensor.type

    def _allocate(self, kind: int, parts: list[Part]) -> None:
        context = _ggml.new_context(self._lib, len(parts))
        self._contexts.append(context)
        for part in parts:
            width, height = part.shape
            if part.is_vector:
                tensor = self._lib.new_tensor_1d(context, self._type(part), width)
            else:
                tensor = self._lib.new_tensor_2d(context, self._type(part), width, height)
            self.tensors[part.key] = tensor
        buffer = self._lib.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise EngineError(
                "out of memory for the model's weights", remedy="give this node a smaller share"
            )
        self._lib.backend_buffer_set_usage(buffer, _ggml.USAGE_WEIGHTS)
        self._buffers.append(buffer)
        if kind != self._lib.backend_cpu_buffer_type():
            self.repacked_bytes += self._lib.backend_buffer_get_size(buffer)

    # --- filling ---------------------------------------------------------------------------------

    def _fill(self, part: Part, tensor: int, is_plain: bool) -> None:
        source = self._slice(part)
        if self._exact and part.tensor.type != _ggml.F32:
            self._fill_converted(part, source, tensor)
        elif is_plain:
            _ggml.array(self._lib, tensor, np.uint8, source.shape)[...] = source
        else:
            whole = np.ascontiguousarray(source)
            self._lib.backend_tensor_set(tensor, whole.ctypes.data, 0, whole.nbytes)

    def _slice(self, part: Part) -> np.ndarray:
        """The part's bytes, (rows, bytes of a row), uncopied."""
        tensor = part.tensor
        block_bytes = tensor.row_bytes * tensor.block // tensor.shape[0]
        first, last = (c // tensor.block * block_bytes for c in part.columns)
        whole = self._file[tensor.offset : tensor.offset + tensor.bytes].reshape(-1, tensor.row_bytes)
        return whole[part.rows[0] : part.rows[1], first:last]

    def _fill_converted(self, part: Part, source: np.ndarray, tensor: int) -> None:
        convert = self._lib.get_type_traits(part.tensor.type).contents.to_float
        if not convert:
            raise EngineError(f"{part.tensor.name}: {part.tensor.type_name} cannot be converted to F32")
        width, height = part.shape
        target = _ggml.array(self._lib, tensor, np.float32, (height, width))
        for at in range(0, height, SLAB_ROWS):
            slab, out = np.ascontiguousarray(source[at : at + SLAB_ROWS]), target[at : at + SLAB_ROWS]
            convert(slab.ctypes.data, out.ctypes.data, out.size)

    def _map_tensor(self, tensor: Tensor) -> int:
        """A tensor whose data is the mapped file itself."""
        context = _ggml.new_context(self._lib, 1)
        self._contexts.append(context)
        mapped: int = self._lib.new_tensor_2d(context, tensor.type, *tensor.shape)
        buffer = self._lib.backend_cpu_buffer_from_ptr(self._file.ctypes.data, self._file.nbytes)
        self._mapped.append(buffer)
        self._lib.backend_tensor_alloc(buffer, mapped, self._file.ctypes.data + tensor.offset)
        return mapped

    def _drop_pages(self, tensor: Tensor) -> None:
        page = mmap.PAGESIZE
        start = -(-tensor.offset // page) * page
        length = (tensor.offset + tensor.bytes) // page * page - start
        if length > 0 and self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


def _bands(part: Part, row_bytes: int) -> list[Part]:
    """The part in bands of rows of at most `UNIT_BYTES`, where rows are not too long for that."""
    rows = max(REPACK_ROWS, UNIT_BYTES // row_bytes // REPACK_ROWS * REPACK_ROWS)
    first, last = part.rows
    edges = [*range(first, last, rows), last]
    return [replace(part, rows=edge) for edge in pairwise(edges)]


def _joined(bands: list[Part]) -> Part:
    return replace(bands[0], rows=(bands[0].rows[0], bands[-1].rows[1]))


def takes_weight(lib: _ggml.Ggml, buffer_type: int, weight_type: int, shape: tuple[int, int]) -> bool:
    """Whether the CPU multiplies by a weight of `shape` (row length, rows) held in `buffer_type`."""
    held, asked = _ggml.new_context(lib, 1), _ggml.new_context(lib, 2)
    buffer = None
    try:
        weight = lib.new_tensor_2d(held, weight_type, *shape)
        buffer = lib.backend_alloc_ctx_tensors_from_buft(held, buffer_type)  # untouched pages: costs nothing
        if not buffer:
            return False
        batch = lib.new_tensor_2d(asked, _ggml.F32, shape[0], PROBE_COLUMNS)
        product = lib.mul_mat(asked, weight, batch)
        return bool(lib.backend_dev_supports_op(_ggml.cpu_device(lib), ctypes.c_void_p(product)))
    finally:
        if buffer:
            lib.backend_buffer_free(buffer)
        lib.free(held)
        lib.free(asked)
