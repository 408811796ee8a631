"""The KV cache of one rank: keys and values of its layers and KV heads, for many sequences.

One ggml tensor per layer for keys and one for values, cut into equal slots; a slot holds one
sequence, a row one position. So a batch of many sequences writes its rows with one operation, and
each sequence's attention reads a view. The memory is anonymous and the kernel gives it page by page
as rows are written: a long context or an empty slot costs nothing, and `clear` gives a slot back.
"""

from __future__ import annotations

import mmap

import numpy as np

from edged import EngineError

from . import _ggml

BUCKET = 256  # attention runs over a multiple of this many rows, as in llama.cpp
MAP_NORESERVE = 0x4000 if hasattr(mmap, "MAP_ANONYMOUS") else 0  # Linux's; the mmap module lacks it


def round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


class Cache:
    """`keys[i]`, `values[i]`: ggml tensors (row, slots * capacity) of local layer i."""

    def __init__(
        self, lib: _ggml.Ggml, layers: int, row: int, slots: int, context_tokens: int, kind: int
    ) -> None:
        self._lib = lib
        self.capacity = round_up(context_tokens, BUCKET)
        self.row, self.kind, self.slots = row, kind, slots
        self.row_bytes = _ggml.row_bytes(lib, kind, row)
        self._slot_bytes = self.capacity * self.row_bytes
        each = slots * self._slot_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, max(1, 2 * layers * each), flags=flags)
        except OSError as exc:
            raise EngineError(f"out of memory for a KV cache of {2 * layers * each} bytes") from exc
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would hold rows of many sequences
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory = np.frombuffer(self._map, dtype=np.uint8)
        start = self._memory.ctypes.data
        self._context = _ggml.new_context(lib, 2 * layers)
        self._buffer = lib.backend_cpu_buffer_from_ptr(start, self._memory.nbytes)
        tensors = []
        for i in range(2 * layers):
            tensor = lib.new_tensor_2d(self._context, kind, row, slots * self.capacity)
            lib.backend_tensor_alloc(self._buffer, tensor, start + i * each)
            tensors.append(tensor)
        self.keys, self.values = tensors[:layers], tensors[layers:]
        # (tensor, slot, bytes of the slot)
        self._slots = self._memory[: 2 * layers * each].reshape(2 * layers, slots, self._slot_bytes)

    def offset(self, slot: int) -> int:
        """Bytes before the first row of `slot` in each tensor."""
        return slot * self._slot_bytes

    def copy(self, source: int, target: int, positions: int) -> None:
        """The first `positions` rows of slot `source` into slot `target`, in every layer."""
        size = positions * self.row_bytes
        self._slots[:, target, :size] = self._slots[:, source, :size]

    def clear(self, slot: int) -> None:
        """Give the slot's memory back, but for pages that it shares with its neighbours."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        for tensor in range(len(self._slots)):
            start = (tensor * self.slots + slot) * self._slot_bytes
            first, end = round_up(start, page), (start + self._slot_bytes) // page * page
            if first < end:
                self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        self._lib.backend_buffer_free(self._buffer)
        self._lib.free(self._context)
        self.keys, self.values = [], []
        del self._memory, self._slots
        self._map.close()
