"""Writes small random Llama GGUFs: the compute of a real model, never its text.

Used by the self-test, which needs a model that libllama loads too. Values are scaled so that
logits spread as a real model's do, which is what makes a wrong kernel visible.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model, and keys beyond the usual ones (`rope.scaling.type`, ...)."""

    hidden: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 512
    vocab: int = 512
    context_tokens: int = 1024
    is_tied: bool = False
    rope_factors: bool = False
    keys: dict[str, Any] = field(default_factory=dict)


def write_model(path: str, shape: Shape, weight_type: str, seed: int = 0) -> None:
    """A model of `shape` with matrices of `weight_type` (what gguf quantises) and no vocabulary."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    _write_keys(writer, shape)
    for name, size in _matrices(shape):
        values = random.standard_normal(size, dtype=np.float32) * (2.0 / np.sqrt(size[1]))
        _add_matrix(writer, name, values, GGMLQuantizationType[weight_type])
    for name in _norms(shape):
        writer.add_tensor(name, random.uniform(0.5, 1.5, shape.hidden).astype(np.float32))
    if shape.rope_factors:
        half = shape.hidden // shape.heads // 2
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, half, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


def _write_keys(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    for name, value in shape.keys.items():
        add: dict[type, Any] = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)]("llama." + name, value)


def _matrices(shape: Shape) -> list[tuple[str, tuple[int, int]]]:
    """Names and (rows, columns)."""
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    found = [("token_embd.weight", (shape.vocab, hidden))]
    if not shape.is_tied:
        found.append(("output.weight", (shape.vocab, hidden)))
    for i in range(shape.layers):
        layer = {
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (shape.ffn, hidden),
            "ffn_up": (shape.ffn, hidden),
            "ffn_down": (hidden, shape.ffn),
        }
        found += [(f"blk.{i}.{name}.weight", size) for name, size in layer.items()]
    return found


def _norms(shape: Shape) -> list[str]:
    layers = range(shape.layers)
    return ["output_norm.weight"] + [
        f"blk.{i}.{name}.weight" for i in layers for name in ("attn_norm", "ffn_norm")
    ]


def _add_matrix(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        writer.add_tensor(name, values.astype(plain[kind]))
    else:
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
