"""The models of the benchmarks: random weights in known shapes, and the real small one, by weight type.

Made once and kept below the cache. For speed, never for text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from _record import QUICK
from _runner_llama import silence
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from edged.cli.demo import model_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edged" / "models"


@dataclass(frozen=True)
class Shape:
    """A Llama model's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


SHAPES = {
    "1.1b": Shape(2048, 22, 32, 4, 5632),  # TinyLlama-1.1B's
    "3b": Shape(3072, 28, 24, 8, 8192),  # Llama-3.2-3B's, but for the vocabulary
}
SMALL = "smollm2"  # the shipped file, quantised again
FILE_TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def model(name: str, weight_type: str = "Q4_0") -> Path:
    """The file of a model: `smollm2`, `1.1b` or `3b`. In a quick run the small one stands for all."""
    path = CACHE / f"bench-{SMALL if QUICK else name}-{weight_type.lower()}.gguf"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    if QUICK or name == SMALL:
        return _made(path, lambda part: _quantise(model_file(), part, weight_type))
    if weight_type == "Q4_K_M":  # gguf's own quantiser has no K types
        return _made(path, lambda part: _quantise(model(name, "F16"), part, weight_type))
    return _made(path, lambda part: _random(part, SHAPES[name], GGMLQuantizationType[weight_type]))


def _made(path: Path, write: Callable[[Path], None]) -> Path:
    """The whole file or none: a run that is cut off leaves a part under another name."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        write(part)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _quantise(source: Path, target: Path, weight_type: str) -> None:
    silence()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[weight_type]
    parameters.allow_requantize = True  # SmolLM2 comes in Q4_1
    failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    if failed:
        raise OSError(f"expected {source.name} in {weight_type}; llama.cpp's quantiser answered {failed}")


def _random(path: Path, shape: Shape, kind: GGMLQuantizationType) -> None:
    """Random weights and SmolLM2's tokenizer. All layers share the values of one, each in its place."""
    writer = GGUFWriter(path, "llama")
    vocab = _copy_tokenizer(writer)
    _write(writer, shape, vocab, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(writer: GGUFWriter) -> int:
    fields = GGUFReader(model_file()).fields
    for field in fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    return len(fields["tokenizer.ggml.tokens"].data)


def _write(writer: GGUFWriter, shape: Shape, vocab: int, kind: GGMLQuantizationType) -> None:
    head_dim = shape.hidden // shape.heads
    writer.add_name("random")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab)
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.6 / columns**0.5)
        return quants.quantize(values, kind)

    ones = np.ones(shape.hidden, np.float32)
    embedding = matrix(vocab, shape.hidden)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, embedding, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", ones)
    matrices = {
        "attn_q": matrix(shape.hidden, shape.hidden),
        "attn_k": matrix(head_dim * shape.kv_heads, shape.hidden),
        "attn_v": matrix(head_dim * shape.kv_heads, shape.hidden),
        "attn_output": matrix(shape.hidden, shape.hidden),
        "ffn_gate": matrix(shape.ffn, shape.hidden),
        "ffn_up": matrix(shape.ffn, shape.hidden),
        "ffn_down": matrix(shape.hidden, shape.ffn),
    }
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for name, values in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", values, raw_dtype=kind)
