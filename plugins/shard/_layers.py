"""The operations of one layer, over one rank's slice, in llama.cpp's order.

Which they are says the model's `Architecture`; a bias is added where this rank has one.

Shapes in ggml's order, row length first: hidden states are (hidden, tokens). What is sliced is the
weights: heads, feed-forward columns and vocabulary rows are this rank's, so the two projections
back to `hidden` are partial sums unless the rank is alone in its stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import _ggml
from ._cache import Cache
from ._masks import Mask, masks_of
from ._model import Model
from ._place import Place
from ._rope import Rope
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
    rope_factors: str | None  # the tensor of this engine's context

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
    def cache_type(self) -> int:
        return _ggml.F32 if self.exact else _ggml.F16


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input tensors of a graph: int32 positions, int64 cache rows, attention masks (kv, tokens,
    planes) as `Shard.masks` has them; `added` takes a sum that is not simply added to `x`."""

    positions: int
    rows: int
    masks: tuple[int, ...]
    tokens: int
    x: int
    added: int


class Layers:
    """Builds the parts of a layer for `count` tokens that attend to `kv_length` cache rows."""

    def __init__(
        self, shard: Shard, cache: Cache, context: int, inputs: Inputs, count: int, kv_length: int
    ) -> None:
        self._shard, self._cache, self._inputs = shard, cache, inputs
        self._count, self._kv_length = count, kv_length
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

    def last_row(self, x: int) -> int:
        """The last token of (hidden, tokens), uncopied."""
        hidden = self._shard.model.hidden
        return int(self._ops.view_2d(x, hidden, 1, hidden * 4, (self._count - 1) * hidden * 4))

    def normed(self, x: int, name: str) -> int:
        model = self._shard.model
        unit = getattr(self._ops, model.architecture.norm)(x, model.norm_epsilon)
        return self._biased(self._ops.mul(unit, self._weights[name]), name)

    def residual(self, half: int, layer: int, norm: str) -> int:
        """What is added to the hidden states of a half's output, which must be whole."""
        name = f"blk.{layer}.{norm}"
        return self.normed(half, name) if self._weights.get(name) else half

    def cache_writes(self, normed: int, layer: int) -> list[int]:
        """Nodes that write the batch's keys and values; they must stand in the graph before
        `attention`, which reads the cache."""
        ops, size, count, row = self._ops, self._shard.model.head_dim, self._count, self._cache.row
        keys, values = self._cached_tensors(layer)
        k = self._linear(normed, f"blk.{layer}.attn_k")
        k = self._placed(ops.reshape_3d(k, size, self._shard.kv_heads, count), f"blk.{layer}.attn_k_norm")
        v = self._linear(normed, f"blk.{layer}.attn_v")
        rows = self._inputs.rows
        return [ops.set_rows(keys, ops.reshape_2d(k, row, count), rows), ops.set_rows(values, v, rows)]

    def attention(self, normed: int, layer: int) -> int:
        """(hidden, tokens): attention through the output projection."""
        ops, s = self._ops, self._shard
        q = self._linear(normed, f"blk.{layer}.attn_q")
        q = self._placed(
            ops.reshape_3d(q, s.model.head_dim, s.heads, self._count), f"blk.{layer}.attn_q_norm"
        )
        if s.model.architecture.has_scaled_queries:
            q = ops.scale(q, s.model.attention.scale)
        q = ops.permute(q, 0, 2, 1, 3)  # (head_dim, tokens, heads)
        k, v = (self._cached(tensor) for tensor in self._cached_tensors(layer))
        mask = self._mask_of(layer)
        mixed = self._attend_exact(q, k, v, mask) if s.exact else self._attend_flash(q, k, v, mask)
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
        return self._biased(self._ops.mul_mat(self._weights[name], x), name)

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

    def _cached(self, tensor: int) -> int:
        """The cache rows that attention sees, as (head_dim, kv_length, kv_heads)."""
        size, item = self._shard.model.head_dim, self._shard.lib.type_size(self._cache.kind)
        shape = (size, self._shard.kv_heads, self._kv_length)
        heads = self._ops.view_3d(tensor, *shape, size * item, self._cache.row * item, 0)
        return int(self._ops.permute(heads, 0, 2, 1, 3))

    def _mask_of(self, layer: int) -> int:
        window = self._shard.model.window_of(layer)
        return next(
            t for mask, t in zip(self._masks, self._inputs.masks, strict=True) if mask.window == window
        )

    def _attend_flash(self, q: int, k: int, v: int, mask: int) -> int:
        width = self._shard.heads * self._shard.model.head_dim
        softcap = self._shard.model.attention.softcap
        mixed = self._ops.flash_attn_ext(q, k, v, mask, self._scale, self._max_bias, softcap)
        self._shard.lib.prec_set_acc(mixed, _ggml.PREC_F32)
        return int(self._ops.reshape_2d(mixed, width, self._count))

    def _attend_exact(self, q: int, k: int, v: int, mask: int) -> int:
        width, softcap = self._shard.heads * self._shard.model.head_dim, self._shard.model.attention.softcap
        scores = self._ops.mul_mat(k, q)  # (kv_length, tokens, heads)
        self._shard.lib.prec_set_acc(scores, _ggml.PREC_F32)
        scores = self._capped(scores, softcap) if softcap else scores
        shares = self._ops.soft_max_ext(scores, mask, self._scale, self._max_bias)
        columns = self._ops.cont(self._ops.permute(v, 1, 0, 2, 3))  # (kv_length, head_dim, kv_heads)
        mixed = self._ops.mul_mat(columns, shares)  # (head_dim, tokens, heads)
        return int(self._ops.cont_2d(self._ops.permute(mixed, 0, 2, 1, 3), width, self._count))

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
