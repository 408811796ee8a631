"""What the benchmarks share: big random models, and rows that are saved as they come."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from edged.cli.demo import model_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edged" / "models"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shape:
    """A Llama model's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


SHAPES = {"1.1b": Shape(2048, 22, 32, 4, 5632)}  # TinyLlama-1.1B's


def random_model(name: str, weight_type: str = "Q4_0") -> Path:
    """A GGUF with random weights of a named shape and SmolLM2's tokenizer, made once and kept.

    For speed, never for text. All layers share the values of one, each in its own place of the file.
    """
    path = CACHE / f"bench-{name}-{weight_type.lower()}.gguf"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    writer = GGUFWriter(part, "llama")
    vocab = _copy_tokenizer(writer)
    _write(writer, SHAPES[name], vocab, GGMLQuantizationType[weight_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


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


def save(out: Path | None, name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document so far; written to `out`, so that a run that is cut off leaves what it measured."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
    }
    made = {"name": name, "commit": commit.stdout.strip() or None, "machine": machine, "rows": list(rows)}
    if out is not None:
        out.write_text(json.dumps(made, indent=2) + "\n")
    return made


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }
