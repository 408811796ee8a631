"""LoRA files for tests: random adapters of a GGUF, and the model with one merged into its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

LAYER = r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight"
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
    reader = GGUFReader(base)
    writer = GGUFWriter(path, architecture or reader.fields["general.architecture"].contents())
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", alpha)
    random = np.random.default_rng(seed)
    for tensor in reader.tensors:
        if not re.fullmatch(matrices, tensor.name):
            continue
        wide, high = (int(n) for n in tensor.shape)
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
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        values = np.ascontiguousarray(values, np.float32)
        if tensor.name + ".lora_a" in found:
            a, b = (found[tensor.name + suffix].astype(np.float64) for suffix in (".lora_a", ".lora_b"))
            values = (values + alpha / len(a) * (b @ a)).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    _finish(writer)
    return path


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
