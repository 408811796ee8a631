"""The operations of one layer, over one rank's slice, in llama.cpp's order.

Which they are says the model's `Architecture`; a bias is added where this rank has one.

Shapes in ggml's order, row length first: hidden states are (hidden, tokens). What is sliced is the
weights: heads, feed-forward columns and vocabulary rows are this rank's, so the two projections
back to `hidden` are partial sums unless the rank is alone in its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import _ggml
from ._adapter import Adapter
from ._cache import Cache
from ._masks import Mask, masks_of
from ._model import Model
from ._place import Place
from ._rope import Rope
from ._weights import Weights

F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """What every graph of an engine shares."""

    lib: _ggml.Ggml
    backend: int
    model: Model
    place: Place
    weights: Weights
    exact: bool
    cache_type: int
    rope_factors: str | None  # the tensor of this engine's context
    adapter: Adapter | None = None

    @property
    def heads(self) -> int:
        return self.place.heads[1] - self.place.heads[0]

    @property
    def kv_heads(self) -> int:
        return self.heads // self.model.group

    @property
    def masks(self) -> tuple[Mask, ...]:
        return masks_of(self.model, self.place)

    @property
    def extra_nodes(self) -> int:
        """Nodes that a window and an adapter add to a graph for any one layer, or the head, at most."""
        return self.weights.extra_nodes + (self.adapter.extra_nodes if self.adapter else 0)


@dataclass(frozen=True, slots=True)
class Span:
    """`count` rows of a batch that belong to the sequence in cache slot `slot`; they attend to its
    first `kv_length` rows. `keeps`: the logits of the last of them are wanted."""

    slot: int
    count: int
    kv_length: int
    keeps: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input tensors of a graph: int32 positions, int64 cache rows, for each span its attention masks
    (kv, tokens, planes) as `Shard.masks` has them, token ids, hidden states `x`; `added` takes a sum
    that is not simply added to them. `mixed` joins the spans' attention. `kept` are the rows that go on
    to the output head, `y` and `added_kept` what `x` and `added` are for these alone."""

    positions: int
    rows: int
    masks: tuple[tuple[int, ...], ...]
    tokens: int
    x: int
    added: int
    mixed: int
    kept: int
    y: int
    added_kept: int


class Layers:
    """Builds the parts of a layer for a batch of `spans`: the matrices see all rows at once, attention
    sees each span with its own part of the cache."""

    def __init__(
        self,
        shard: Shard,
        cache: Cache,
        context: int,
        inputs: Inputs,
        spans: Sequence[Span],
        put_first: Callable[[int], object],
    ) -> None:
        """`put_first`: puts a node into the graph before whatever is built later."""
        self._shard, self._cache, self._inputs, self._spans = shard, cache, inputs, spans
        self._put_first = put_first
        self._count = sum(span.count for span in spans)
        self._ops = shard.weights.ops(context)
        self._weights, self._masks = shard.weights, shard.masks

    def embed(self) -> int:
        """The first hidden states."""
        ops, weights = self._ops, self._weights
        x = ops.get_rows(weights["token_embd"], self._inputs.tokens)
        x = self._scaled(x, self._shard.model.scales.embedding)
        if positions := weights.get("position_embd"):
            x = ops.add(x, ops.get_rows(positions, self._inputs.positions))
        return self.normed(x, "token_embd_norm") if weights.get("token_embd_norm") else int(x)

    def copy(self, x: int, target: int) -> int:
        return int(self._ops.cpy(x, target))

    def add(self, a: int, b: int) -> int:
        return int(self._ops.add(a, b))

    def kept_rows(self, x: int) -> int:
        """The rows of (hidden, tokens) whose logits are wanted."""
        return int(self._ops.get_rows(x, self._inputs.kept))

    def normed(self, x: int, name: str) -> int:
        model = self._shard.model
        unit = getattr(self._ops, model.architecture.norm)(x, model.norm_epsilon)
        return self._biased(self._ops.mul(unit, self._weights[name]), name)

    def residual(self, half: int, norm: str) -> int:
        """What is added to the hidden states of a half's output, which must be whole."""
        return self.normed(half, norm) if self._weights.get(norm) else half

    def write_cache(self, normed: int, layer: int) -> int:
        """Put the nodes that write the batch's keys and values, which `attention` reads; the last."""
        ops, size, count, row = self._ops, self._shard.model.head_dim, self._count, self._cache.row
        keys, values = self._cached_tensors(layer)
        k = self._linear(normed, f"blk.{layer}.attn_k")
        k = self._placed(ops.reshape_3d(k, size, self._shard.kv_heads, count), f"blk.{layer}.attn_k_norm")
        v = self._linear(normed, f"blk.{layer}.attn_v")
        rows = self._inputs.rows
        self._put_first(ops.set_rows(keys, ops.reshape_2d(k, row, count), rows))
        written = int(ops.set_rows(values, v, rows))
        self._put_first(written)
        return written

    def attention(self, normed: int, layer: int) -> int:
        """(hidden, tokens): attention through the output projection."""
        ops, s = self._ops, self._shard
        q = self._linear(normed, f"blk.{layer}.attn_q")
        q = self._placed(
            ops.reshape_3d(q, s.model.head_dim, s.heads, self._count), f"blk.{layer}.attn_q_norm"
        )
        if s.model.architecture.has_scaled_queries:
            q = ops.scale(q, s.model.attention.scale)
        mixed = self._attend_all(q, layer)
        return self._scaled(self._linear(mixed, f"blk.{layer}.attn_output"), s.model.scales.residual)

    def feed_forward(self, normed: int, layer: int) -> int:
        """(hidden, tokens): down(activation(gate, up)), or down(activation(up))."""
        model, name = self._shard.model, f"blk.{layer}."
        inner = [self._linear(normed, name + "ffn_up")]
        if model.architecture.is_gated:
            inner.insert(0, self._linear(normed, name + "ffn_gate"))
        active = getattr(self._ops, model.architecture.activation)(*inner)
        return self._scaled(self._linear(active, name + "ffn_down"), model.scales.residual)

    def logits(self, x: int) -> int:
        """(vocabulary slice, tokens)."""
        model = self._shard.model
        found = self._linear(self.normed(x, "output_norm"), "output")
        found = self._scaled(found, _inverse(model.scales.logits))
        return self._capped(found, model.final_softcap) if model.final_softcap else found

    # --- building blocks -------------------------------------------------------------------------

    def _linear(self, x: int, name: str) -> int:
        product = self._ops.mul_mat(self._weights[name], x)
        if self._shard.adapter is not None:
            product = self._shard.adapter.added(self._ops, product, x, name)
        return self._biased(product, name)

    def _biased(self, x: int, name: str) -> int:
        bias = self._weights.get(name + ".bias")
        return int(self._ops.add(x, bias) if bias else x)

    def _scaled(self, x: int, factor: float) -> int:
        return int(x if factor == 1.0 else self._ops.scale(x, factor))

    def _capped(self, x: int, most: float) -> int:
        """most * tanh(x / most)"""
        return int(self._ops.scale(self._ops.tanh(self._ops.scale(x, _inverse(most))), most))

    def _placed(self, heads: int, norm: str) -> int:
        """Heads (head_dim, heads, tokens) at their positions, normed where the model norms them."""
        heads = self.normed(heads, norm) if self._weights.get(norm) else heads
        return heads if self._shard.model.rope is None else self._rope(heads, self._shard.model.rope)

    # --- attention -------------------------------------------------------------------------------

    def _rope(self, heads: int, r: Rope) -> int:
        factors = self._weights[self._shard.rope_factors] if self._shard.rope_factors else None
        frequencies = (r.base, r.scale, r.extrapolation, r.attention, r.beta_fast, r.beta_slow)
        sizes = (r.dimensions, r.kind, r.original_context)
        return int(self._ops.rope_ext(heads, self._inputs.positions, factors, *sizes, *frequencies))

    def _cached_tensors(self, layer: int) -> tuple[int, int]:
        local = layer - self._shard.place.layers[0]
        return self._cache.keys[local], self._cache.values[local]

    def _attend_all(self, q: int, layer: int) -> int:
        """Attention of every span, (width, tokens); that of several is copied into one tensor."""
        ops, width = self._ops, self._shard.heads * self._shard.model.head_dim
        row, at = width * F32_BYTES, 0
        window = self._shard.model.window_of(layer)
        kind = next(i for i, mask in enumerate(self._masks) if mask.window == window)
        for span, masks in zip(self._spans, self._inputs.masks, strict=True):
            mixed = self._attend(self._rows_of(q, at, span.count), span, masks[kind], layer)
            if len(self._spans) == 1:
                return mixed
            target = ops.view_2d(self._inputs.mixed, width, span.count, row, at * row)
            self._put_first(ops.cpy(mixed, target))
            at += span.count
        return self._inputs.mixed

    def _rows_of(self, q: int, start: int, count: int) -> int:
        """Rows `start` to `start + count` of (head_dim, heads, tokens), as (head_dim, count, heads)."""
        ops, size, heads = self._ops, self._shard.model.head_dim, self._shard.heads
        if count != self._count:
            item, row = size * F32_BYTES, size * heads * F32_BYTES
            q = ops.view_3d(q, size, heads, count, item, row, start * row)
        return int(ops.permute(q, 0, 2, 1, 3))

    def _attend(self, q: int, span: Span, mask: int, layer: int) -> int:
        k, v = (self._cached(tensor, span) for tensor in self._cached_tensors(layer))
        if self._shard.exact:
            return self._attend_exact(q, k, v, mask, span.count)
        return self._attend_flash(q, k, v, mask, span.count)

    def _cached(self, tensor: int, span: Span) -> int:
        """The cache rows that a span sees, as (head_dim, kv_length, kv_heads)."""
        size, cache = self._shard.model.head_dim, self._cache
        item = _ggml.row_bytes(self._shard.lib, cache.kind, size)
        shape = (size, self._shard.kv_heads, span.kv_length)
        heads = self._ops.view_3d(tensor, *shape, item, cache.row_bytes, cache.offset(span.slot))
        return int(self._ops.permute(heads, 0, 2, 1, 3))

    def _attend_flash(self, q: int, k: int, v: int, mask: int, count: int) -> int:
        width = self._shard.heads * self._shard.model.head_dim
        softcap = self._shard.model.attention.softcap
        mixed = self._ops.flash_attn_ext(q, k, v, mask, self._scale, self._max_bias, softcap)
        self._shard.lib.prec_set_acc(mixed, _ggml.PREC_F32)
        return int(self._ops.reshape_2d(mixed, width, count))

    def _attend_exact(self, q: int, k: int, v: int, mask: int, count: int) -> int:
        width, softcap = self._shard.heads * self._shard.model.head_dim, self._shard.model.attention.softcap
        scores = self._ops.mul_mat(k, q)  # (kv_length, tokens, heads)
        self._shard.lib.prec_set_acc(scores, _ggml.PREC_F32)
        scores = self._capped(scores, softcap) if softcap else scores
        shares = self._ops.soft_max_ext(scores, mask, self._scale, self._max_bias)
        columns = self._ops.cont(self._ops.permute(v, 1, 0, 2, 3))  # (kv_length, head_dim, kv_heads)
        mixed = self._ops.mul_mat(columns, shares)  # (head_dim, tokens, heads)
        return int(self._ops.cont_2d(self._ops.permute(mixed, 0, 2, 1, 3), width, count))

    @property
    def _scale(self) -> float:
        model = self._shard.model
        return 1.0 if model.architecture.has_scaled_queries else model.attention.scale

    @property
    def _max_bias(self) -> float:
        """ALiBi's, for ggml to make the slopes of; 0 where the mask has them."""
        has_slopes = self._masks[0].slopes is not None
        return 0.0 if has_slopes else self._shard.model.architecture.alibi


def _inverse(x: float) -> float:
    """In float32, as llama.cpp computes it."""
    return float(np.float32(1) / np.float32(x))
