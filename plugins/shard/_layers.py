"""The operations of one Llama layer, over one rank's slice, in llama.cpp's order.

Shapes in ggml's order, row length first: hidden states are (hidden, tokens). What is sliced is the
weights: heads, feed-forward columns and vocabulary rows are this rank's, so the two projections
back to `hidden` are partial sums unless the rank is alone in its stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import _ggml
from ._cache import Cache
from ._model import Model
from ._place import Place
from ._weights import Weights


@dataclass(frozen=True, slots=True)
class Shard:
    """What every graph of an engine shares."""

    lib: _ggml.Ggml
    backend: int
    model: Model
    place: Place
    weights: Weights
    exact: bool

    @property
    def heads(self) -> int:
        return self.place.heads[1] - self.place.heads[0]

    @property
    def kv_heads(self) -> int:
        return self.heads // self.model.group

    @property
    def cache_type(self) -> int:
        return _ggml.F32 if self.exact else _ggml.F16


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input tensors of a graph: int32 positions, int64 cache rows, attention mask (kv, tokens)."""

    positions: int
    rows: int
    mask: int
    tokens: int
    x: int


class Layers:
    """Builds the parts of a layer for `count` tokens that attend to `kv_length` cache rows."""

    def __init__(
        self, shard: Shard, cache: Cache, context: int, inputs: Inputs, count: int, kv_length: int
    ) -> None:
        self._shard, self._cache, self._inputs = shard, cache, inputs
        self._count, self._kv_length = count, kv_length
        self._ops = _ggml.Ops(shard.lib, context)
        self._weights = shard.weights

    def embed(self) -> int:
        return int(self._ops.get_rows(self._weights.embedding, self._inputs.tokens))

    def copy(self, x: int, target: int) -> int:
        return int(self._ops.cpy(x, target))

    def add(self, a: int, b: int) -> int:
        return int(self._ops.add(a, b))

    def last_row(self, x: int) -> int:
        """The last token of (hidden, tokens), uncopied."""
        hidden = self._shard.model.hidden
        return int(self._ops.view_2d(x, hidden, 1, hidden * 4, (self._count - 1) * hidden * 4))

    def normed(self, x: int, name: str) -> int:
        unit = self._ops.rms_norm(x, self._shard.model.norm_epsilon)
        return int(self._ops.mul(unit, self._weights[name]))

    def cache_writes(self, normed: int, layer: int) -> list[int]:
        """Nodes that write the batch's keys and values; they must stand in the graph before
        `attention`, which reads the cache."""
        ops, size, count, row = self._ops, self._shard.model.head_dim, self._count, self._cache.row
        keys, values = self._cached_tensors(layer)
        k = ops.mul_mat(self._weights[f"blk.{layer}.attn_k"], normed)
        k = self._rope(ops.reshape_3d(k, size, self._shard.kv_heads, count))
        v = ops.mul_mat(self._weights[f"blk.{layer}.attn_v"], normed)
        rows = self._inputs.rows
        return [ops.set_rows(keys, ops.reshape_2d(k, row, count), rows), ops.set_rows(values, v, rows)]

    def attention(self, normed: int, layer: int) -> int:
        """(hidden, tokens): attention through the output projection."""
        ops, s = self._ops, self._shard
        q = ops.mul_mat(self._weights[f"blk.{layer}.attn_q"], normed)
        q = self._rope(ops.reshape_3d(q, s.model.head_dim, s.heads, self._count))
        q = ops.permute(q, 0, 2, 1, 3)  # (head_dim, tokens, heads)
        k, v = (self._cached(tensor) for tensor in self._cached_tensors(layer))
        mixed = self._attend_exact(q, k, v) if s.exact else self._attend_flash(q, k, v)
        return int(ops.mul_mat(self._weights[f"blk.{layer}.attn_output"], mixed))

    def feed_forward(self, normed: int, layer: int) -> int:
        """(hidden, tokens): down(silu(gate) * up)."""
        ops, name = self._ops, f"blk.{layer}."
        up = ops.mul_mat(self._weights[name + "ffn_up"], normed)
        gate = ops.mul_mat(self._weights[name + "ffn_gate"], normed)
        return int(ops.mul_mat(self._weights[name + "ffn_down"], ops.swiglu_split(gate, up)))

    def logits(self, x: int) -> int:
        """(vocabulary slice, tokens)."""
        return int(self._ops.mul_mat(self._weights["output"], self.normed(x, "output_norm")))

    # --- attention -------------------------------------------------------------------------------

    def _rope(self, heads: int) -> int:
        r = self._shard.model.rope
        factors = self._weights.tensors.get("rope_freqs")
        frequencies = (r.base, r.scale, r.extrapolation, r.attention, r.beta_fast, r.beta_slow)
        sizes = (r.dimensions, _ggml.ROPE_NORMAL, r.original_context)
        return int(self._ops.rope_ext(heads, self._inputs.positions, factors, *sizes, *frequencies))

    def _cached_tensors(self, layer: int) -> tuple[int, int]:
        local = layer - self._shard.place.layers[0]
        return self._cache.keys[local], self._cache.values[local]

    def _cached(self, tensor: int) -> int:
        """The cache rows that attention sees, as (head_dim, kv_length, kv_heads)."""
        size, item = self._shard.model.head_dim, self._shard.lib.type_size(self._cache.kind)
        shape = (size, self._shard.kv_heads, self._kv_length)
        heads = self._ops.view_3d(tensor, *shape, size * item, self._cache.row * item, 0)
        return int(self._ops.permute(heads, 0, 2, 1, 3))

    def _attend_flash(self, q: int, k: int, v: int) -> int:
        width = self._shard.heads * self._shard.model.head_dim
        mixed = self._ops.flash_attn_ext(q, k, v, self._inputs.mask, self._scale, 0.0, 0.0)
        self._shard.lib.prec_set_acc(mixed, _ggml.PREC_F32)
        return int(self._ops.reshape_2d(mixed, width, self._count))

    def _attend_exact(self, q: int, k: int, v: int) -> int:
        width = self._shard.heads * self._shard.model.head_dim
        scores = self._ops.mul_mat(k, q)  # (kv_length, tokens, heads)
        self._shard.lib.prec_set_acc(scores, _ggml.PREC_F32)
        shares = self._ops.soft_max_ext(scores, self._inputs.mask, self._scale, 0.0)
        columns = self._ops.cont(self._ops.permute(v, 1, 0, 2, 3))  # (kv_length, head_dim, kv_heads)
        mixed = self._ops.mul_mat(columns, shares)  # (head_dim, tokens, heads)
        return int(self._ops.cont_2d(self._ops.permute(mixed, 0, 2, 1, 3), width, self._count))

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self._shard.model.head_dim)
