"""The tensors of an architecture: what they are called, their shapes, and how a place cuts them.

One table gives both shape and cut: each axis of a tensor is named, and the axes `heads`, `kv`,
`ffn` and `vocab` are the ones a tensor group shares out. A file may keep several of the graph's
tensors in one, rows after rows (`attn_qkv`); a `Piece` is one of the graph's, found in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ._architectures import QKV, Architecture

# Row length first, as in ggml. `heads` and `kv`: all query or KV heads' dimensions; `head`: one's.
AXES: dict[str, tuple[str, ...]] = {
    "token_embd": ("hidden", "vocab"),
    "token_embd_norm": ("hidden",),
    "position_embd": ("hidden", "context"),
    "rope_freqs": ("rotary",),
    "rope_factors_long": ("rotary",),
    "rope_factors_short": ("rotary",),
    "output_norm": ("hidden",),
    "output": ("hidden", "vocab"),
    "attn_norm": ("hidden",),
    "attn_q": ("hidden", "heads"),
    "attn_q_norm": ("head",),
    "attn_k": ("hidden", "kv"),
    "attn_k_norm": ("head",),
    "attn_v": ("hidden", "kv"),
    "attn_output": ("heads", "hidden"),
    "post_attention_norm": ("hidden",),
    "ffn_norm": ("hidden",),
    "ffn_gate": ("hidden", "ffn"),
    "ffn_up": ("hidden", "ffn"),
    "ffn_down": ("ffn", "hidden"),
    "post_ffw_norm": ("hidden",),
}
Sizes = Mapping[str, int]  # of the axes


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the graph: `key` there, `source` in the file, of which it is the rows from `first`
    on. `once`: an axis; the piece belongs to the one rank whose share of that axis begins at 0,
    because what it is added to is a sum over all ranks."""

    key: str
    source: str
    axes: tuple[str, ...]
    first: int = 0
    once: str = ""


def layer_names(architecture: Architecture) -> tuple[str, ...]:
    """The tensors every layer has, but for biases."""
    gate = ("ffn_gate",) if architecture.is_gated else ()
    own = ("attn_norm", *QKV, "attn_output", "ffn_norm", *gate, "ffn_up", "ffn_down")
    return own + architecture.layer_norms


def fused_of(architecture: Architecture, name: str, has_fused_qkv: bool) -> tuple[str, tuple[str, ...]]:
    """The file's tensor that holds `name`, and all it holds, in the order of its rows."""
    if has_fused_qkv and name in QKV:
        return "attn_qkv", QKV
    if architecture.has_fused_gate and name in ("ffn_gate", "ffn_up"):
        return "ffn_up", ("ffn_gate", "ffn_up")
    return name, (name,)


class Pieces:
    """The pieces of a model whose file holds the tensors `present`."""

    def __init__(self, architecture: Architecture, sizes: Sizes, present: Mapping[str, object]) -> None:
        self._architecture, self._sizes, self._present = architecture, sizes, present

    def layer(self, index: int) -> Iterator[Piece]:
        for name in layer_names(self._architecture):
            yield from self._named(f"blk.{index}.", name)

    def embedding(self) -> Iterator[Piece]:
        """What makes the first hidden states, but for token_embd."""
        for name in self._architecture.embedding:
            yield from self._named("", name)

    def rope(self) -> Iterator[Piece]:
        for name in self._architecture.rope_factors:
            if name + ".weight" in self._present:
                yield from self._named("", name)

    def head(self) -> Iterator[Piece]:
        """Norm and output matrix; where the file has none, that is the embedding."""
        yield from self._named("", "output_norm")
        if "output.weight" in self._present:
            yield from self._named("", "output")
        else:
            yield Piece("output", "token_embd.weight", AXES["output"])
            yield from self._bias("", "output", "output", 0)

    def shape(self, piece: Piece) -> tuple[int, ...]:
        return tuple(self._sizes[axis] for axis in piece.axes)

    def _named(self, prefix: str, name: str) -> Iterator[Piece]:
        has_fused_qkv = f"{prefix}attn_qkv.weight" in self._present
        source, members = fused_of(self._architecture, name, has_fused_qkv)
        before = members[: members.index(name)]
        first = sum(self._sizes[AXES[member][-1]] for member in before)
        yield Piece(prefix + name, f"{prefix}{source}.weight", AXES[name], first)
        yield from self._bias(prefix, name, source, first)

    def _bias(self, prefix: str, name: str, source: str, first: int) -> Iterator[Piece]:
        """The bias of `name`: rows of the fused tensor's, or its own."""
        if name not in self._architecture.biases:
            return
        axes = AXES[name]
        once = axes[0] if len(axes) == 2 and axes[0] != "hidden" else ""
        for stem, at in ((source, first), (name, 0)):
            if f"{prefix}{stem}.bias" in self._present or self._architecture.needs_biases:
                yield Piece(f"{prefix}{name}.bias", f"{prefix}{stem}.bias", axes[-1:], at, once)
                return
