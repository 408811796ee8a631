"""LoRA files for tests: random adapters of a GGUF, the model with one merged into its weights, and a tiny
model with words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from edged_plugins._gguf import read_head
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

LAYER = r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight"
MODELS = Path(os.environ.get("EDGED_TEST_MODELS", "~/.cache/edged/models")).expanduser()
EVERY = LAYER + r"|output\.weight"


def write_adapter(
    path: Path,
    base: str | Path,
    *,
    r: int = 4,
    alpha: float = 8.0,
    seed: int = 5,
    size: float = 1.0,
    matrices: str = EVERY,
    dtype: Any = np.float32,
    architecture: str | None = None,
    kind: str = "lora",
    extra: Iterable[tuple[str, np.ndarray]] = (),
) -> Path:
    """An adapter of every matrix of `base` whose name matches `matrices`. `size`: how far it goes, as a
    part of a matrix's own size; `architecture`, `kind`, `extra`: what does not belong there."""
    head = read_head(str(base))
    writer = GGUFWriter(path, architecture or head.keys["general.architecture"])
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", alpha)
    random = np.random.default_rng(seed)
    for tensor in head.tensors.values():
        if not re.fullmatch(matrices, tensor.name):
            continue
        wide, high = tensor.shape
        a = random.standard_normal((r, wide), np.float32) / np.float32(wide**0.5)
        b = random.standard_normal((high, r), np.float32) * np.float32(size / r**0.5)
        writer.add_tensor(tensor.name + ".lora_a", a.astype(dtype))
        writer.add_tensor(tensor.name + ".lora_b", b.astype(dtype))
    for name, values in extra:
        writer.add_tensor(name, values)
    _finish(writer)
    return path


def write_merged(path: Path, base: str | Path, adapter: Path) -> Path:
    """`base` in F32 with W + (alpha / r) B A in the place of each adapted W, computed in float64."""
    reader, lora = GGUFReader(base), GGUFReader(adapter)
    alpha = float(lora.fields["adapter.lora.alpha"].contents())
    found = {tensor.name: np.array(tensor.data) for tensor in lora.tensors}
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    _copy_keys(writer, reader, but=("GGUF.", "general.architecture"))
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        values = np.ascontiguousarray(values, np.float32)
        if tensor.name + ".lora_a" in found:
            a, b = (found[tensor.name + suffix].astype(np.float64) for suffix in (".lora_a", ".lora_b"))
            values = (values + alpha / len(a) * (b @ a)).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    _finish(writer)
    return path


def tiny(words: Path) -> Path:
    """A random Llama of four small layers that speaks with the vocabulary of the model `words`; made once
    and kept."""
    path = MODELS / "tiny-llama.gguf"
    if not path.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.half")
        _write_tiny(half, words)
        half.rename(path)
    return path


def _write_tiny(path: Path, words: Path) -> None:
    hidden, layers, heads, kv_heads, ffn = 64, 4, 4, 2, 128
    wide = hidden // heads * kv_heads
    reader, random = GGUFReader(words), np.random.default_rng(7)
    vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer = GGUFWriter(path, "llama")
    _copy_keys(writer, reader, only="tokenizer.")
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,), "output": (vocab, hidden)}
    for at in range(layers):
        shapes |= {f"blk.{at}.attn_norm": (hidden,), f"blk.{at}.ffn_norm": (hidden,)}
        shapes |= {f"blk.{at}.{name}": (hidden, hidden) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{at}.{name}": (wide, hidden) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{at}.{name}": (ffn, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{at}.ffn_down"] = (hidden, ffn)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32) * np.float32(2 / shape[-1] ** 0.5)
        writer.add_tensor(f"{name}.weight", values if len(shape) == 2 else 1 + values)
    _finish(writer)


def _copy_keys(
    writer: GGUFWriter, reader: GGUFReader, only: str = "", but: tuple[str, ...] = ("GGUF.",)
) -> None:
    for field in reader.fields.values():
        if not field.name.startswith(only) or field.name.startswith(but):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
