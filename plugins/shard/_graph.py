"""Runs one rank's slice as ggml graphs that are built once and reused from token to token.

A graph belongs to the spans of one batch: which cache slots, how many rows of each, how much of the
cache they see. Positions, masks and cache rows are its inputs. A rank that is alone in its stage
gets one graph. A rank of a tensor group gets segments,

    [attn norm, qkv, rope, attention, output projection] sum [ffn norm, gate, up, down] sum ...

each ending in a partial that `run` hands to `reduce`, which adds the group's sum to the hidden
states. Batch sizes and KV lengths are llama.cpp's, so that a lone rank's logits are bit-equal.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edged import EngineError

from . import _ggml
from ._adapters import FIRST, Adapters
from ._cache import Cache
from ._layers import Inputs, Layers, Shard, Span

NODES_PER_LAYER = 64
NODES_PER_SPAN = 24  # of each layer; attention with soft-caps in exact numerics makes 20
SPARE_GRAPHS = 2  # of single tokens, beyond one for each stage's batch: for those that come back
Key = tuple[int, tuple[Span, ...]]  # an adapter's number, and a batch
Reduce = Callable[[np.ndarray, np.ndarray], None]  # (partial, hidden states to add the sum to)


@dataclass(frozen=True, slots=True)
class Segment:
    """One ggml graph and its last tensor. `target`: the tensor that takes the group's sum of it."""

    graph: int
    result: int
    target: int | None


class Times:
    """Seconds of computing, by the clock, and where `is_timed` in the computing thread's own time, which
    costs a system call."""

    def __init__(self, is_timed: bool = False) -> None:
        self.is_timed, self.clock_s, self.cpu_s = is_timed, 0.0, 0.0

    def begin(self) -> None:
        if self.is_timed:
            self.cpu_s -= time.thread_time()
        self.clock_s -= time.perf_counter()

    def end(self) -> None:
        self.clock_s += time.perf_counter()
        if self.is_timed:
            self.cpu_s += time.thread_time()


class Graph:
    """A batch of `spans` against `cache`.

    On the last stage the last layer goes on with the rows that are kept alone; where none is, it
    stops at its cache rows. After `run`, until the next: `hidden` (rows, hidden) on a stage that is
    not the last, or in a tensor group; `logits` (kept rows, vocabulary slice). `is_probe`: run the
    first layer only, for its time. `kept`: rows of the batch that the last stage keeps, in place of those of
    spans that keep one.
    """

    def __init__(
        self,
        shard: Shard,
        cache: Cache,
        spans: Sequence[Span],
        is_probe: bool = False,
        kept: Sequence[int] | None = None,
    ) -> None:
        self._shard, self._lib, self._place = shard, shard.lib, shard.place
        self._cache, self.spans = cache, tuple(spans)
        self.count = sum(span.count for span in spans)
        first, end = shard.place.layers
        self._range = range(first, first + 1 if is_probe else end)
        self._is_last = shard.place.is_last and not is_probe
        self._kept = list(_kept_rows(spans) if kept is None else kept) if self._is_last else []
        self._is_split, self._masks = len(shard.place.group) > 1, shard.masks
        self._has_post_norms = "post_ffw_norm" in shard.model.architecture.layer_norms
        layers = len(self._range)
        per_layer = NODES_PER_LAYER + NODES_PER_SPAN * len(self.spans) + shard.extra_nodes
        nodes = (layers + 1) * per_layer  # the output head counts as a layer
        graphs, self._graph_nodes = (2 * layers + 2, per_layer) if self._is_split else (1, nodes)
        self._inputs_context = _ggml.new_context(self._lib, 16 + len(self.spans) * len(self._masks))
        self._context = _ggml.new_context(self._lib, nodes, graphs, self._graph_nodes)
        self._buffer, self._allocator = None, None
        self._segments: list[Segment] = []
        self._open: int | None = None  # the graph being built
        try:
            self._inputs = self._make_inputs()
            self._layers = Layers(shard, cache, self._context, self._inputs, spans, self._expand)
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

    def run(
        self,
        starts: Sequence[int],
        given: np.ndarray,
        reduce: Reduce | None = None,
        times: Times | None = None,
    ) -> None:
        """Compute each span from its start on. `given`: token ids (count) on the first stage, else
        hidden states (count, hidden). What it takes, `reduce` left out, comes on top of `times`."""
        times = times or Times()
        assert given.shape[0] == self.count
        at = 0
        for start, span, masks in zip(starts, self.spans, self._mask_arrays, strict=True):
            assert start + span.count <= span.kv_length
            positions = np.arange(start, start + span.count)
            self._positions[at : at + span.count] = positions
            self._rows[at : at + span.count] = span.slot * self._cache.capacity + positions
            for mask, target in zip(self._masks, masks, strict=True):
                target[...] = mask.values(positions, span.kv_length)
            at += span.count
        (self._tokens if self._place.is_first else self._x)[...] = given
        for graph, partial, target in self._steps:
            times.begin()
            if self._lib.backend_graph_compute(self._shard.backend, graph) != _ggml.STATUS_SUCCESS:
                raise EngineError("ggml could not compute a graph; memory may be short")
            self._shard.weights.settle()
            times.end()
            if partial is not None:
                assert reduce is not None
                if self._has_post_norms:
                    target[...] = 0
                reduce(partial, target)

    # --- building --------------------------------------------------------------------------------

    def _make_inputs(self) -> Inputs:
        lib, context, model = self._lib, self._inputs_context, self._shard.model
        mask = _ggml.F32 if self._shard.exact else _ggml.F16
        # the last three are not always needed; then they are of one element
        width = self._shard.heads * model.head_dim if len(self.spans) > 1 else 1
        kept = len(self._kept) if self._is_gathered else 1
        inputs = Inputs(
            positions=lib.new_tensor_1d(context, _ggml.I32, self.count),
            rows=lib.new_tensor_1d(context, _ggml.I64, self.count),
            masks=tuple(
                tuple(lib.new_tensor_3d(context, mask, s.kv_length, s.count, m.planes) for m in self._masks)
                for s in self.spans
            ),
            tokens=lib.new_tensor_1d(context, _ggml.I32, self.count),
            x=lib.new_tensor_2d(context, _ggml.F32, model.hidden, self.count),
            added=lib.new_tensor_2d(context, _ggml.F32, model.hidden, self.count),
            mixed=lib.new_tensor_2d(context, _ggml.F32, width, self.count),
            kept=lib.new_tensor_1d(context, _ggml.I32, kept),
            y=lib.new_tensor_2d(context, _ggml.F32, model.hidden, kept),
            added_kept=lib.new_tensor_2d(context, _ggml.F32, model.hidden, kept),
        )
        self._buffer = lib.backend_alloc_ctx_tensors_from_buft(context, lib.backend_cpu_buffer_type())
        if not self._buffer:
            raise EngineError("out of memory for a graph's inputs")
        return inputs

    @property
    def _is_gathered(self) -> bool:
        """Whether some rows end before the output head."""
        return 0 < len(self._kept) < self.count

    def _build(self) -> None:
        layers, place = self._layers, self._place
        x = layers.embed() if place.is_first else self._inputs.x
        if self._is_split and place.is_first:
            x = layers.copy(x, self._inputs.x)  # sums are added to the input tensor itself
        is_kept = False
        for layer in self._range:
            is_final = self._is_last and layer == self._range[-1]
            normed = layers.normed(x, f"blk.{layer}.attn_norm")
            written = layers.write_cache(normed, layer)
            if is_final and not self._kept:
                self._end_segment(written)
                return
            attention = layers.attention(normed, layer)
            if is_final and self._is_gathered:
                attention, x, is_kept = layers.kept_rows(attention), self._keep_rows(x), True
            beside = attention if self._shard.model.is_parallel else None
            if beside is None:
                x = self._join(attention, x, is_kept, f"blk.{layer}.post_attention_norm")
            half = layers.feed_forward(layers.normed(x, f"blk.{layer}.ffn_norm"), layer)
            x = self._join(half, x, is_kept, f"blk.{layer}.post_ffw_norm", beside)
        if self._is_last:
            self._end_segment(layers.logits(x))
        elif not self._is_split or self._has_post_norms:
            self._end_segment(x)

    def _keep_rows(self, x: int) -> int:
        """The kept rows of `x`; for a group in the input tensor that sums are added to."""
        kept = self._layers.kept_rows(x)
        if not self._is_split:
            return kept
        self._expand(self._layers.copy(kept, self._inputs.y))
        return self._inputs.y

    def _join(self, half: int, x: int, is_kept: bool, norm: str, beside: int | None = None) -> int:
        """x + half + beside: here for a lone rank; for a group, by `reduce` when the segment has run,
        which adds to `x` itself, or makes a whole of the half for a norm to follow."""
        layers, inputs = self._layers, self._inputs
        if not self._is_split:
            x = layers.add(layers.residual(half, norm), x)
            return x if beside is None else layers.add(x, beside)
        partial = half if beside is None else layers.add(half, beside)
        whole, made = (inputs.y, inputs.added_kept) if is_kept else (inputs.x, inputs.added)
        if not self._has_post_norms:
            self._end_segment(partial, whole)
            return whole
        self._end_segment(partial, made)
        return layers.copy(layers.add(layers.residual(made, norm), whole), whole)

    def _expand(self, tensor: int) -> int:
        if self._open is None:
            self._open = self._lib.new_graph_custom(self._context, self._graph_nodes, False)
        self._lib.build_forward_expand(self._open, tensor)
        return self._open

    def _end_segment(self, result: int, target: int | None = None) -> None:
        self._segments.append(Segment(self._expand(result), result, target))
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
            [
                _ggml.array(lib, tensor, mask_type, (mask.planes, span.count, span.kv_length))
                for mask, tensor in zip(self._masks, tensors, strict=True)
            ]
            for tensors, span in zip(inputs.masks, self.spans, strict=True)
        ]
        self._tokens = _ggml.array(lib, inputs.tokens, np.int32, (count,))
        self._x = _ggml.array(lib, inputs.x, np.float32, (count, hidden))
        if self._is_gathered:
            _ggml.array(lib, inputs.kept, np.int32, (len(self._kept),))[:] = self._kept
        kept = (len(self._kept) if self._is_gathered else 1, hidden)
        targets = {
            inputs.x: self._x,
            inputs.added: _ggml.array(lib, inputs.added, np.float32, (count, hidden)),
            inputs.y: _ggml.array(lib, inputs.y, np.float32, kept),
            inputs.added_kept: _ggml.array(lib, inputs.added_kept, np.float32, kept),
        }
        self._steps = []
        for s in self._segments:
            target = None if s.target is None else targets[s.target]
            partial = None if target is None else _ggml.array(lib, s.result, np.float32, target.shape)
            self._steps.append((s.graph, partial, target))
        last = self._segments[-1]
        self.hidden, self.logits = targets[inputs.y] if self._is_gathered else self._x, None
        if self._kept:
            vocab = self._place.vocab
            self.logits = _ggml.array(lib, last.result, np.float32, (len(self._kept), vocab[1] - vocab[0]))
        elif not self._is_last and not self._is_split:
            self.hidden = _ggml.array(lib, last.result, np.float32, (count, hidden))


class Graphs:
    """The graphs of an engine, built when first needed: a few for batches of single tokens, which come
    again, and the latest of a prompt's batches, whose working memory is large. A graph has one adapter."""

    def __init__(self, shard: Shard, cache: Cache, adapters: Adapters) -> None:
        self._shard, self._cache, self._adapters = shard, cache, adapters
        self._of_tokens: OrderedDict[Key, Graph] = OrderedDict()
        self._of_prompt: tuple[Key, Graph] | None = None

    def get(self, spans: tuple[Span, ...], adapter: int = FIRST) -> Graph:
        key = (adapter, spans)
        if any(span.count > 1 for span in spans):
            if self._of_prompt is None or self._of_prompt[0] != key:
                self.drop_prompt()
                self._of_prompt = key, self._made(key)
            return self._of_prompt[1]
        found = self._of_tokens.get(key)
        if found is None:
            same = [known for known in self._of_tokens if known[0] == adapter]
            if len(same) >= self._shard.place.stages + SPARE_GRAPHS:
                self._of_tokens.pop(same[0]).close()
            found = self._of_tokens[key] = self._made(key)
        self._of_tokens.move_to_end(key)
        return found

    def _made(self, key: Key) -> Graph:
        adapter, spans = key
        return Graph(dataclasses.replace(self._shard, adapter=self._adapters[adapter]), self._cache, spans)

    def forget(self, slot: int) -> None:
        """No batch with what is in `slot` comes again."""
        for key in [key for key in self._of_tokens if any(span.slot == slot for span in key[1])]:
            self._of_tokens.pop(key).close()

    def forget_adapter(self, adapter: int) -> None:
        """No batch with it comes again."""
        for key in [key for key in self._of_tokens if key[0] == adapter]:
            self._of_tokens.pop(key).close()

    def close(self) -> None:
        self.drop_prompt()
        for graph in self._of_tokens.values():
            graph.close()
        self._of_tokens.clear()

    def drop_prompt(self) -> None:
        """Give the working memory of a prompt's batches back."""
        if self._of_prompt is not None:
            self._of_prompt[1].close()
            self._of_prompt = None


def _kept_rows(spans: Sequence[Span]) -> list[int]:
    """The last row of each span that keeps it."""
    ends = np.cumsum([span.count for span in spans])
    return [int(end) - 1 for end, span in zip(ends, spans, strict=True) if span.keeps]
