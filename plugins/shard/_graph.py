"""Runs one rank's slice as ggml graphs that are built once and reused from token to token.

A graph belongs to one KV cache, batch size and KV length; positions, mask and cache rows are its
inputs. A rank that is alone in its stage gets one graph. A rank of a tensor group gets segments,

    [attn norm, qkv, rope, attention, output projection] sum [ffn norm, gate, up, down] sum ...

each ending in a partial that `run` hands to `reduce`, which adds the group's sum to the hidden
states. Batch sizes and KV lengths are llama.cpp's, so that a lone rank's logits are bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edged import EngineError

from . import _ggml
from ._cache import Cache
from ._layers import Inputs, Layers, Shard

NODES_PER_LAYER = 64
Reduce = Callable[[np.ndarray, np.ndarray], None]  # (partial, hidden states to add the sum to)


@dataclass(frozen=True, slots=True)
class Segment:
    """One ggml graph and its last tensor. `rows`: how many, the last ones of the batch, it covers."""

    graph: int
    result: int
    rows: int
    is_partial: bool


class Graph:
    """`count` tokens against `cache`, of which attention sees `kv_length` rows.

    `keep`: compute the last token's logits (last stage only); without it the last layer stops at
    its cache rows, since nothing else of it is wanted. After `run`, until the next: `hidden`
    (rows, hidden) on a stage that is not the last, or in a tensor group; `logits` (vocabulary slice).
    """

    def __init__(self, shard: Shard, cache: Cache, count: int, kv_length: int, keep: bool) -> None:
        self._shard, self._lib, self._place = shard, shard.lib, shard.place
        self.count, self.kv_length, self.keep = count, kv_length, keep
        self._is_split = len(shard.place.group) > 1
        layers = shard.place.layers[1] - shard.place.layers[0]
        nodes = layers * NODES_PER_LAYER + 64
        graphs, self._graph_nodes = (2 * layers + 2, NODES_PER_LAYER) if self._is_split else (1, nodes)
        self._inputs_context = _ggml.new_context(self._lib, 8)
        self._context = _ggml.new_context(self._lib, nodes, graphs, self._graph_nodes)
        self._buffer, self._allocator = None, None
        self._segments: list[Segment] = []
        self._open: int | None = None  # the graph being built
        try:
            self._inputs = self._make_inputs()
            self._layers = Layers(shard, cache, self._context, self._inputs, count, kv_length)
            self._build()
            self._allocate()
            self._view_memory()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._allocator:
            self._lib.gallocr_free(self._allocator)
        if self._buffer:
            self._lib.backend_buffer_free(self._buffer)
        for context in (self._context, self._inputs_context):
            self._lib.free(context)
        self._segments = []

    def run(self, position: int, given: np.ndarray, reduce: Reduce | None = None) -> None:
        """Compute from `position` on. `given`: token ids (count) on the first stage, else hidden
        states (count, hidden)."""
        assert given.shape[0] == self.count
        assert position + self.count <= self.kv_length
        positions = np.arange(position, position + self.count)
        self._positions[:] = positions
        self._rows[:] = positions
        self._mask[:] = np.where(np.arange(self.kv_length) <= positions[:, None], 0.0, -np.inf)
        (self._tokens if self._place.is_first else self._x)[...] = given
        for graph, partial, target in self._steps:
            if self._lib.backend_graph_compute(self._shard.backend, graph) != _ggml.STATUS_SUCCESS:
                raise EngineError("ggml could not compute a graph; memory may be short")
            if partial is not None:
                assert reduce is not None
                reduce(partial, target)

    # --- building --------------------------------------------------------------------------------

    def _make_inputs(self) -> Inputs:
        lib, context = self._lib, self._inputs_context
        mask = _ggml.F32 if self._shard.exact else _ggml.F16
        inputs = Inputs(
            positions=lib.new_tensor_1d(context, _ggml.I32, self.count),
            rows=lib.new_tensor_1d(context, _ggml.I64, self.count),
            mask=lib.new_tensor_2d(context, mask, self.kv_length, self.count),
            tokens=lib.new_tensor_1d(context, _ggml.I32, self.count),
            x=lib.new_tensor_2d(context, _ggml.F32, self._shard.model.hidden, self.count),
        )
        self._buffer = lib.backend_alloc_ctx_tensors_from_buft(context, lib.backend_cpu_buffer_type())
        if not self._buffer:
            raise EngineError("out of memory for a graph's inputs")
        return inputs

    def _build(self) -> None:
        layers, place, rows = self._layers, self._place, self.count
        x = layers.embed() if place.is_first else self._inputs.x
        if self._is_split and place.is_first:
            x = layers.copy(x, self._inputs.x)  # sums are added to the input tensor itself
        for layer in range(*place.layers):
            is_final = place.is_last and layer == place.layers[1] - 1
            normed = layers.normed(x, f"blk.{layer}.attn_norm")
            for write in layers.cache_writes(normed, layer):
                self._expand(write)
            if is_final and not self.keep:
                self._end_segment(write, rows)
                return
            attention = layers.attention(normed, layer)
            if is_final and rows > 1:
                rows, attention, x = 1, layers.last_row(attention), layers.last_row(x)
            x = self._join(attention, x, rows)
            x = self._join(layers.feed_forward(layers.normed(x, f"blk.{layer}.ffn_norm"), layer), x, rows)
        if place.is_last:
            self._end_segment(layers.logits(x), rows)
        elif not self._is_split:
            self._end_segment(x, rows)

    def _join(self, partial: int, x: int, rows: int) -> int:
        """x + partial: here for a lone rank; for a group, by `reduce` when the segment has run."""
        if not self._is_split:
            return self._layers.add(partial, x)
        self._end_segment(partial, rows, is_partial=True)
        whole = self._inputs.x
        return self._layers.last_row(whole) if rows < self.count else whole

    def _expand(self, tensor: int) -> int:
        if self._open is None:
            self._open = self._lib.new_graph_custom(self._context, self._graph_nodes, False)
        self._lib.build_forward_expand(self._open, tensor)
        return self._open

    def _end_segment(self, result: int, rows: int, is_partial: bool = False) -> None:
        self._segments.append(Segment(self._expand(result), result, rows, is_partial))
        self._open = None

    def _allocate(self) -> None:
        """Working memory, shared by all segments: reserved for the largest before any is placed,
        because growing would free what earlier segments point at."""
        lib = self._lib
        self._allocator = lib.gallocr_new(lib.backend_cpu_buffer_type())
        for segment in self._segments:
            if not lib.gallocr_reserve(self._allocator, segment.graph):
                raise EngineError("out of memory for a graph")
        size = lib.gallocr_get_buffer_size(self._allocator, 0)
        for segment in self._segments:
            if not lib.gallocr_alloc_graph(self._allocator, segment.graph):
                raise EngineError("out of memory for a graph")
        assert lib.gallocr_get_buffer_size(self._allocator, 0) == size

    def _view_memory(self) -> None:
        """Arrays over the tensors that are read or written between graphs."""
        lib, inputs, hidden, count = self._lib, self._inputs, self._shard.model.hidden, self.count
        mask_type = np.float32 if self._shard.exact else np.float16
        self._positions = _ggml.array(lib, inputs.positions, np.int32, (count,))
        self._rows = _ggml.array(lib, inputs.rows, np.int64, (count,))
        self._mask = _ggml.array(lib, inputs.mask, mask_type, (count, self.kv_length))
        self._tokens = _ggml.array(lib, inputs.tokens, np.int32, (count,))
        self._x = _ggml.array(lib, inputs.x, np.float32, (count, hidden))
        self._steps = [
            (
                s.graph,
                _ggml.array(lib, s.result, np.float32, (s.rows, hidden)) if s.is_partial else None,
                self._x[count - s.rows :],
            )
            for s in self._segments
        ]
        last = self._segments[-1]
        self.hidden, self.logits = self._x[count - last.rows :], None
        if self._place.is_last and self.keep:
            vocab = self._place.vocab
            self.logits = _ggml.array(lib, last.result, np.float32, (vocab[1] - vocab[0],))
        elif not self._place.is_last and not self._is_split:
            self.hidden = _ggml.array(lib, last.result, np.float32, (count, hidden))
