"""Runs one rank's slice as ggml graphs that are built once and reused from token to token.

A graph belongs to one KV cache, batch size and KV length; positions, mask and cache rows are its
inputs. A rank that is alone in its stage gets one graph. A rank of a tensor group gets segments,

    [attn norm, qkv, rope, attention, output projection] sum [ffn norm, gate, up, down] sum ...

each ending in a partial that `run` hands to `reduce`, which adds the group's sum to the hidden
states. Where a norm follows the sum, it is added to zeros, and the next segment goes on from there;
where attention and feed-forward are parallel, their partials are added and summed once a layer.
Batch sizes and KV lengths are llama.cpp's, so that a lone rank's logits are bit-equal.
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
    """One ggml graph and its last tensor. `rows`: how many, the last ones of the batch, it covers.
    `target`: the input that takes the group's sum of the result, where that is a partial."""

    graph: int
    result: int
    rows: int
    target: int | None


class Graph:
    """`count` tokens against `cache`, of which attention sees `kv_length` rows.

    `keep`: compute the last token's logits (last stage only); without it the last layer stops at
    its cache rows, since nothing else of it is wanted. After `run`, until the next: `hidden`
    (rows, hidden) on a stage that is not the last, or in a tensor group; `logits` (vocabulary slice).
    """

    def __init__(self, shard: Shard, cache: Cache, count: int, kv_length: int, keep: bool) -> None:
        self._shard, self._lib, self._place = shard, shard.lib, shard.place
        self.count, self.kv_length, self.keep = count, kv_length, keep
        self._is_split, self._masks = len(shard.place.group) > 1, shard.masks
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
        for mask, target in zip(self._masks, self._mask_arrays, strict=True):
            target[...] = mask.values(positions, self.kv_length)
        (self._tokens if self._place.is_first else self._x)[...] = given
        for graph, partial, target in self._steps:
            if self._lib.backend_graph_compute(self._shard.backend, graph) != _ggml.STATUS_SUCCESS:
                raise EngineError("ggml could not compute a graph; memory may be short")
            self._shard.weights.settle()
            if partial is not None:
                assert reduce is not None
                if self._has_post_norms:
                    target[...] = 0
                reduce(partial, target)

    # --- building --------------------------------------------------------------------------------

    def _make_inputs(self) -> Inputs:
        lib, context, hidden = self._lib, self._inputs_context, self._shard.model.hidden
        mask = _ggml.F32 if self._shard.exact else _ggml.F16
        inputs = Inputs(
            positions=lib.new_tensor_1d(context, _ggml.I32, self.count),
            rows=lib.new_tensor_1d(context, _ggml.I64, self.count),
            masks=tuple(
                lib.new_tensor_3d(context, mask, self.kv_length, self.count, m.planes) for m in self._masks
            ),
            tokens=lib.new_tensor_1d(context, _ggml.I32, self.count),
            x=lib.new_tensor_2d(context, _ggml.F32, hidden, self.count),
            added=lib.new_tensor_2d(context, _ggml.F32, hidden, self.count),
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
            beside = attention if self._shard.model.is_parallel else None
            if beside is None:
                x = self._join(attention, x, rows, layer, "post_attention_norm")
            half = layers.feed_forward(layers.normed(x, f"blk.{layer}.ffn_norm"), layer)
            x = self._join(half, x, rows, layer, "post_ffw_norm", beside)
        if place.is_last:
            self._end_segment(layers.logits(x), rows)
        elif not self._is_split or self._has_post_norms:
            self._end_segment(x, rows)

    def _join(self, half: int, x: int, rows: int, layer: int, norm: str, beside: int | None = None) -> int:
        """x + half + beside: here for a lone rank; for a group, by `reduce` when the segment has run,
        which adds to `x` itself, or makes a whole of the half for a norm to follow."""
        layers, inputs = self._layers, self._inputs
        if not self._is_split:
            x = layers.add(layers.residual(half, layer, norm), x)
            return x if beside is None else layers.add(x, beside)
        partial = half if beside is None else layers.add(half, beside)
        target = inputs.added if self._has_post_norms else inputs.x
        self._end_segment(partial, rows, target)
        whole, made = (layers.last_row(t) if rows < self.count else t for t in (inputs.x, target))
        if target == inputs.x:
            return whole
        return layers.copy(layers.add(layers.residual(made, layer, norm), whole), whole)

    @property
    def _has_post_norms(self) -> bool:
        return "post_ffw_norm" in self._shard.model.architecture.layer_norms

    def _expand(self, tensor: int) -> int:
        if self._open is None:
            self._open = self._lib.new_graph_custom(self._context, self._graph_nodes, False)
        self._lib.build_forward_expand(self._open, tensor)
        return self._open

    def _end_segment(self, result: int, rows: int, target: int | None = None) -> None:
        self._segments.append(Segment(self._expand(result), result, rows, target))
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
        self._mask_arrays = [
            _ggml.array(lib, tensor, mask_type, (mask.planes, count, self.kv_length))
            for mask, tensor in zip(self._masks, inputs.masks, strict=True)
        ]
        self._tokens = _ggml.array(lib, inputs.tokens, np.int32, (count,))
        self._x, self._added = (
            _ggml.array(lib, tensor, np.float32, (count, hidden)) for tensor in (inputs.x, inputs.added)
        )
        self._steps = [
            (
                s.graph,
                None if s.target is None else _ggml.array(lib, s.result, np.float32, (s.rows, hidden)),
                (self._x if s.target == inputs.x else self._added)[count - s.rows :],
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
