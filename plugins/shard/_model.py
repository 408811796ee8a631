"""What a Llama GGUF says of itself: its sizes, its rope, and where it can be cut.

`read_model` refuses, in one line each, whatever the graph in `_graph` does not compute. The rules
for rope are llama.cpp's (its hyperparameter loading and context creation).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from edged import EngineError

from .._gguf import Head, Tensor, read_head

ARCHITECTURES = ("llama",)
REPACK_ROWS = 32  # rows of a slice: a multiple of every repacked layout's interleave
LAYER_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


@dataclass(frozen=True, slots=True)
class Rope:
    """The arguments of ggml_rope_ext."""

    dimensions: int
    base: float
    scale: float
    extrapolation: float
    attention: float
    beta_fast: float
    beta_slow: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a Llama model, its tensor table, and the units at which it can be cut."""

    head: Head
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_tokens: int
    norm_epsilon: float
    rope: Rope
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

    def tensor(self, name: str) -> Tensor:
        return self.head.tensors[name + ".weight"]

    def output(self) -> Tensor:
        return self.tensor("token_embd" if self.tied else "output")


class _Keys:
    """Typed access to a file's keys; a missing or misfit one is an EngineError that names it."""

    def __init__(self, head: Head, architecture: str) -> None:
        self.head, self.prefix = head, architecture + "."

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self._misfit(name, value)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._misfit(name, value)
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._misfit(name, value)
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.head.keys.get(self.prefix + name, default)
        if value is None:
            raise EngineError(f"{self.head.path} lacks the key {self.prefix + name}")
        return value

    def _misfit(self, name: str, value: Any) -> EngineError:
        return EngineError(
            f"{self.head.path}: {self.prefix + name} is {value!r}, which this engine cannot use"
        )


def read_model(path: str) -> Model:
    """The model in `path`, every tensor present and of the shape its keys promise."""
    head = read_head(path)
    architecture = head.keys.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise EngineError(
            f"{path} has architecture {architecture!r}; the shard engine runs {', '.join(ARCHITECTURES)}"
        )
    if head.keys.get("split.count", 0) not in (0, 1):
        raise EngineError(f"{path} is one part of a split model; merge it with llama-gguf-split first")
    keys = _Keys(head, architecture)
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", hidden // heads)
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise EngineError(f"{path}: value heads of another size than key heads are not supported")
    if keys.whole("expert_count", 0, least=0):
        raise EngineError(f"{path} is a mixture of experts, which the shard engine does not run")
    if "token_embd.weight" not in head.tensors or len(head.tensors["token_embd.weight"].shape) != 2:
        raise EngineError(f"{path} lacks the tensor token_embd.weight")
    model = Model(
        head=head,
        layers=keys.whole("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=keys.whole("feed_forward_length"),
        vocab=head.tensors["token_embd.weight"].shape[1],
        context_tokens=keys.whole("context_length"),
        norm_epsilon=keys.real("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, head_dim),
        head_unit=1,
        ffn_unit=1,
        vocab_unit=REPACK_ROWS,
    )
    _check_tensors(model)
    return _with_units(model)


def _rope(keys: _Keys, head_dim: int) -> Rope:
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise EngineError(f"{keys.head.path}: rope scaling {kind!r} is not supported; none, linear, yarn are")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0))
    scale = 1.0 if kind == "none" or factor <= 0 else 1.0 / factor
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    extrapolation = 1.0 if kind == "yarn" else 0.0
    if kind == "yarn":
        # llama.cpp takes the magnitude ggml will apply out again and puts its own in: both are
        # 1 + 0.1 ln(1 / scale) for a Llama, so what is left is one but for rounding.
        magnitude = 1.0 + 0.1 * math.log(1.0 / scale)
        attention *= (magnitude if 1.0 / scale > 1.0 else 1.0) / magnitude
    dimensions = keys.whole("rope.dimension_count", head_dim)
    if dimensions > head_dim or dimensions % 2:
        raise EngineError(
            f"{keys.head.path}: rope over {dimensions} of {head_dim} dimensions is not supported"
        )
    return Rope(
        dimensions=dimensions,
        base=keys.real("rope.freq_base", 10000.0),
        scale=scale,
        extrapolation=keys.real("rope.scaling.yarn_ext_factor", extrapolation),
        attention=attention,
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0),
        original_context=keys.whole("rope.scaling.original_context_length", keys.whole("context_length")),
    )


def _shapes(m: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor a Llama model has, with its shape in ggml's order."""
    width, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    layer: tuple[tuple[int, ...], ...] = (
        (m.hidden,),
        (m.hidden, width),
        (m.hidden, kv),
        (m.hidden, kv),
        (width, m.hidden),
        (m.hidden,),
        (m.hidden, m.ffn),
        (m.hidden, m.ffn),
        (m.ffn, m.hidden),
    )
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (m.hidden, m.vocab),
        "output_norm.weight": (m.hidden,),
    }
    for i in range(m.layers):
        shapes.update({f"blk.{i}.{name}.weight": s for name, s in zip(LAYER_TENSORS, layer, strict=True)})
    if not m.tied:
        shapes["output.weight"] = (m.hidden, m.vocab)
    if "rope_freqs.weight" in m.head.tensors:
        shapes["rope_freqs.weight"] = (m.rope.dimensions // 2,)
    return shapes


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
            raise EngineError(f"{path}: tensor {name} belongs to a variant of Llama that is not supported")


def _with_units(m: Model) -> Model:
    """`m` with the steps at which heads and feed-forward columns meet quantisation blocks."""
    output = math.lcm(*(m.tensor(f"blk.{i}.attn_output").block for i in range(m.layers)))
    down = math.lcm(*(m.tensor(f"blk.{i}.ffn_down").block for i in range(m.layers)))
    return dataclasses.replace(
        m,
        head_unit=min(math.lcm(m.group * m.head_dim, output) // m.head_dim, m.heads),
        ffn_unit=min(math.lcm(down, REPACK_ROWS), m.ffn),
    )
