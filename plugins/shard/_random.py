"""Writes small random GGUFs of any architecture: the compute of a real model, never its text.

Used by the self-test, which needs models that libllama loads too. Values are scaled so that
logits spread as a real model's do, which is what makes a wrong kernel visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from ._architectures import ARCHITECTURES, Architecture
from ._tensors import AXES, fused_of, layer_names


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model, and keys beyond the usual ones (`rope.scaling.type`, ...).

    `biases`: those that the architecture may do without; the needed ones are always there.
    """

    architecture: str = "llama"
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0  # 0: hidden / heads
    ffn: int = 512
    vocab: int = 512
    context_tokens: int = 1024
    is_tied: bool = False
    has_fused_qkv: bool = False
    biases: tuple[str, ...] = ()
    rope_factors: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of `_tensors.AXES`."""
        head = self.head_dim or self.hidden // self.heads
        return {
            "hidden": self.hidden,
            "heads": self.heads * head,
            "kv": self.kv_heads * head,
            "head": head,
            "ffn": self.ffn,
            "vocab": self.vocab,
            "context": self.context_tokens,
            "rotary": self.keys.get("rope.dimension_count", head) // 2,
        }


def write_model(path: str, shape: Shape, weight_type: str, seed: int = 0) -> None:
    """A model of `shape` with matrices of `weight_type` (what gguf quantises) and no vocabulary."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, shape.architecture)
    _write_keys(writer, shape)
    for name, size in _tensors(shape):
        if len(size) == 2:
            values = random.standard_normal(size, dtype=np.float32) * (2.0 / np.sqrt(size[1]))
            _add_matrix(writer, name, values, GGMLQuantizationType[weight_type])
        elif name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
            writer.add_tensor(name, np.linspace(1, random.uniform(2, 8), size[0], dtype=np.float32))
        else:
            low, high = (-0.5, 0.5) if name.endswith(".bias") else (0.5, 1.5)
            writer.add_tensor(name, random.uniform(low, high, size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


def _write_keys(writer: GGUFWriter, shape: Shape) -> None:
    architecture = ARCHITECTURES[shape.architecture]
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    keys: dict[str, Any] = {architecture.epsilon_key: 1e-5}
    if shape.head_dim:
        keys |= {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim}
    for name, value in (keys | shape.keys).items():
        add: dict[type, Any] = {
            bool: writer.add_bool,
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
        }
        add[type(value)](f"{shape.architecture}.{name}", value)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in numpy's order: rows before columns."""
    architecture = ARCHITECTURES[shape.architecture]
    outer = ("token_embd", *architecture.embedding, *shape.rope_factors, "output_norm")
    for name in outer if shape.is_tied else (*outer, "output"):
        yield from _tensor(shape, architecture, "", name)
    for i in range(shape.layers):
        for name in layer_names(architecture):
            yield from _tensor(shape, architecture, f"blk.{i}.", name)


def _tensor(
    shape: Shape, architecture: Architecture, prefix: str, name: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensor of the file that begins with `name`, and its bias."""
    source, members = fused_of(architecture, name, shape.has_fused_qkv)
    if members[0] != name:
        return
    sizes = shape.sizes
    rows = sum(sizes[AXES[member][-1]] for member in members)
    yield f"{prefix}{source}.weight", (rows, *(sizes[axis] for axis in AXES[name][-2::-1]))
    if name in shape.biases or (architecture.needs_biases and name in architecture.biases):
        yield f"{prefix}{source}.bias", (rows,)


def _add_matrix(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        writer.add_tensor(name, values.astype(plain[kind]))
    else:
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
