"""What a GGUF says of itself: its architecture, its sizes, its rope, and where it can be cut.

`read_model` refuses, in one line each, whatever the graph in `_graph` does not compute. Constants of
the graph are computed in float32, as llama.cpp does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edged import EngineError

from .._gguf import Head, Tensor, read_head
from ._architectures import ARCHITECTURES, Architecture, Scales
from ._keys import Keys
from ._rope import Rope, read_rope
from ._tensors import Piece, Pieces

REPACK_ROWS = 32  # rows of a slice: a multiple of every repacked layout's interleave
CONTEXT_UNIT = 256  # llama.cpp's contexts are multiples of it


@dataclass(frozen=True, slots=True)
class Attention:
    """`scale` of the scores; `softcap`: 0 or the largest score; `window`: 0 or how many positions a
    token of a windowed layer sees, itself included."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    pattern: int = 1


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model, its tensor table, and the units at which it can be cut."""

    head: Head
    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_tokens: int
    norm_epsilon: float
    rope: Rope | None
    attention: Attention
    scales: Scales
    final_softcap: float
    is_parallel: bool  # attention and feed-forward read the same hidden states
    head_unit: int
    ffn_unit: int
    vocab_unit: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.head.tensors

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.architecture, self.sizes, self.head.tensors)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of `_tensors.AXES`."""
        return {
            "hidden": self.hidden,
            "heads": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn,
            "vocab": self.vocab,
            "context": self.context_tokens,
            "rotary": self.rope.dimensions // 2 if self.rope else 0,
        }

    def tensor(self, name: str) -> Tensor:
        return self.head.tensors[name + ".weight"]

    def output(self) -> Tensor:
        return self.tensor("token_embd" if self.tied else "output")

    def all_pieces(self) -> Iterator[Piece]:
        yield Piece("token_embd", "token_embd.weight", ("hidden", "vocab"))
        yield from self.pieces.embedding()
        yield from self.pieces.rope()
        for layer in range(self.layers):
            yield from self.pieces.layer(layer)
        yield from self.pieces.head()

    def window_of(self, layer: int) -> int:
        """How many positions a token of `layer` sees, itself included; 0: all before it."""
        at = self.attention
        return at.window if layer % at.pattern < at.pattern - 1 else 0

    def rope_factors(self, context_tokens: int) -> str | None:
        """The tensor that divides rope's frequencies in a context of that size."""
        assert self.rope is not None
        padded = -(-context_tokens // CONTEXT_UNIT) * CONTEXT_UNIT
        by_length = "long" if padded > self.rope.original_context else "short"
        held = [piece.key for piece in self.pieces.rope()]
        return next((n for n in ("rope_freqs", f"rope_factors_{by_length}") if n in held), None)


def read_model(path: str) -> Model:
    """The model in `path`, every tensor present and of the shape its keys promise."""
    head = read_head(path)
    name = head.keys.get("general.architecture")
    if name not in ARCHITECTURES:
        raise EngineError(
            f"{path} has architecture {name!r}; the shard engine runs {', '.join(ARCHITECTURES)}"
        )
    if head.keys.get("split.count", 0) not in (0, 1):
        raise EngineError(f"{path} is one part of a split model; merge it with llama-gguf-split first")
    architecture, keys = ARCHITECTURES[name], Keys(head, name)
    layers, hidden, heads = (
        keys.whole(key) for key in ("block_count", "embedding_length", "attention.head_count")
    )
    head_dim = keys.whole("attention.key_length", hidden // heads)
    _check_variant(keys, head_dim)
    parallel = architecture.parallel_key
    model = Model(
        head=head,
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=keys.whole("feed_forward_length"),
        vocab=head.tensors["token_embd.weight"].shape[1],
        context_tokens=keys.whole("context_length"),
        norm_epsilon=keys.real(architecture.epsilon_key),
        rope=None if architecture.rope is None else read_rope(keys, head_dim, architecture),
        attention=_attention(keys, architecture, layers, hidden // heads, head_dim),
        scales=_scales(keys, architecture, hidden, layers),
        final_softcap=_softcap(keys, "final_logit_softcapping", architecture.final_softcap),
        is_parallel=parallel is not None and keys.flag(parallel),
        head_unit=1,
        ffn_unit=1,
        vocab_unit=REPACK_ROWS,
    )
    _check_tensors(model)
    return _with_units(model)


def _check_variant(keys: Keys, head_dim: int) -> None:
    """Refuse what no record of `_architectures` describes."""
    path, tensors = keys.head.path, keys.head.tensors
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise EngineError(f"{path}: value heads of another size than key heads are not supported")
    if keys.whole("expert_count", 0, least=0):
        raise EngineError(f"{path} is a mixture of experts, which the shard engine does not run")
    if not keys.flag("attention.causal", True):
        raise EngineError(f"{path} attends to later tokens too; the shard engine runs causal models")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise EngineError(f"{path} lacks the tensor token_embd.weight")


def _attention(keys: Keys, architecture: Architecture, layers: int, wide: int, head_dim: int) -> Attention:
    width = wide if layers == architecture.wide_scale_layers else head_dim
    scale = float(np.float32(1) / np.sqrt(np.float32(width)))
    softcap = _softcap(keys, "attn_logit_softcapping", architecture.attention_softcap)
    if not architecture.window:
        return Attention(scale, softcap)
    for name in ("freq_base_swa", "dimension_count_swa"):
        if f"{keys.prefix}rope.{name}" in keys.head.keys:
            raise EngineError(f"{keys.head.path}: rope of their own in windowed layers is not supported")
    window = keys.whole("attention.sliding_window", architecture.window)
    pattern = keys.whole("attention.sliding_window_pattern", architecture.window_pattern)
    return Attention(scale, softcap, window, pattern)


def _softcap(keys: Keys, name: str, default: float) -> float:
    """0 where the architecture has none."""
    if not default:
        return 0.0
    value = keys.real(name, default)
    if value <= 0:
        raise EngineError(f"{keys.head.path}: {keys.prefix}{name} is {value}; expected more than 0")
    return value


def _scales(keys: Keys, architecture: Architecture, hidden: int, layers: int) -> Scales:
    """As the architecture sets them, or as the file does; 0 of the file means none."""
    scales = architecture.scales(hidden, layers)
    if not architecture.has_scale_keys:
        return scales
    return Scales(
        embedding=keys.real("embedding_scale", scales.embedding) or 1.0,
        residual=keys.real("residual_scale", scales.residual) or 1.0,
        logits=keys.real("logit_scale", scales.logits) or 1.0,
    )


def _check_tensors(m: Model) -> None:
    path = m.head.path
    if m.heads % m.kv_heads:
        raise EngineError(f"{path}: {m.heads} heads are no multiple of {m.kv_heads} KV heads")
    shapes = _shapes(m)
    for name, shape in shapes.items():
        tensor = m.head.tensors.get(name)
        if tensor is None:
            raise EngineError(f"{path} lacks the tensor {name}")
        if tensor.shape != shape:
            raise EngineError(f"{path}: {name} is {list(tensor.shape)}, its keys promise {list(shape)}")
        if len(shape) == 1 and tensor.type_name != "F32":
            raise EngineError(f"{path}: {name} is {tensor.type_name}; F32 is supported")
    for name in m.head.tensors:
        if name not in shapes:
            kind = m.head.keys["general.architecture"]
            raise EngineError(f"{path}: tensor {name} belongs to a variant of {kind} that is not supported")


def _shapes(m: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the file: that of its pieces, one after the other."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in m.all_pieces():
        *row, rows = m.pieces.shape(piece)
        before = shapes.get(piece.source, (0,))[-1]
        shapes[piece.source] = (*row, max(before, piece.first + rows))
    return shapes


def _with_units(m: Model) -> Model:
    """`m` with the steps at which heads and feed-forward columns meet quantisation blocks."""
    output = math.lcm(*(m.tensor(f"blk.{i}.attn_output").block for i in range(m.layers)))
    down = math.lcm(*(m.tensor(f"blk.{i}.ffn_down").block for i in range(m.layers)))
    return dataclasses.replace(
        m,
        head_unit=min(math.lcm(m.group * m.head_dim, output) // m.head_dim, m.heads),
        ffn_unit=min(math.lcm(down, REPACK_ROWS), m.ffn),
    )
