"""The KV cache of one sequence: keys and values of this rank's layers and KV heads.

Anonymous memory that the kernel gives page by page as rows are written, so a long context costs
nothing until it is used, and `close` gives it all back at once.
"""

from __future__ import annotations

import mmap

import numpy as np

from edged import EngineError

from . import _ggml

BUCKET = 256  # attention runs over a multiple of this many rows, as in llama.cpp


def round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


class Cache:
    """`keys[i]`, `values[i]`: ggml tensors (row, capacity) of local layer i; a row is one position."""

    def __init__(self, lib: _ggml.Ggml, layers: int, row: int, context_tokens: int, kind: int) -> None:
        self._lib = lib
        self.capacity = round_up(context_tokens, BUCKET)
        self.row, self.kind = row, kind
        each = self.capacity * row * lib.type_size(kind)
        try:
            self._map = mmap.mmap(-1, 2 * layers * each, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as exc:
            raise EngineError(f"out of memory for a KV cache of {2 * layers * each} bytes") from exc
        self._memory = np.frombuffer(self._map, dtype=np.uint8)
        start = self._memory.ctypes.data
        self._context = _ggml.new_context(lib, 2 * layers)
        self._buffer = lib.backend_cpu_buffer_from_ptr(start, self._memory.nbytes)
        tensors = []
        for i in range(2 * layers):
            tensor = lib.new_tensor_2d(self._context, kind, row, self.capacity)
            lib.backend_tensor_alloc(self._buffer, tensor, start + i * each)
            tensors.append(tensor)
        self.keys, self.values = tensors[:layers], tensors[layers:]

    def close(self) -> None:
        self._lib.backend_buffer_free(self._buffer)
        self._lib.free(self._context)
        self.keys, self.values = [], []
        del self._memory
        self._map.close()
