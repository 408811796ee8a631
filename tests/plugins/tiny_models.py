"""Tiny random models of architectures that the shard engine leaves to libllama, with SmolLM2's words.

The tensors are those that libllama asks for, by name and shape; the values are random, so a text
means nothing and a token that differs means a difference of engines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 64, 4, 4, 2, 128
HEAD_DIM = HIDDEN // HEADS
STATE, CONV, RANK = 16, 4, 4  # of Mamba
CONTEXT = 1024
MODELS = Path(os.environ.get("EDGED_TEST_MODELS", "~/.cache/edged/models")).expanduser()

Shapes = Mapping[str, tuple[int, ...]]  # of one layer, in numpy's order; a bias where one stands


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}


_ATTENTION: Shapes = {
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
}
_UP_DOWN: Shapes = {"ffn_up.weight": (FFN, HIDDEN), "ffn_down.weight": (HIDDEN, FFN)}
LAYER_OF: dict[str, Shapes] = {
    "stablelm": {
        **_norm("attn_norm"),
        **_ATTENTION,
        **_norm("ffn_norm"),
        "ffn_gate.weight": (FFN, HIDDEN),
        **_UP_DOWN,
    },
    "starcoder2": {
        **_norm("attn_norm"),
        **_ATTENTION,
        "attn_q.bias": (HIDDEN,),
        "attn_k.bias": (KV_HEADS * HEAD_DIM,),
        "attn_v.bias": (KV_HEADS * HEAD_DIM,),
        "attn_output.bias": (HIDDEN,),
        **_norm("ffn_norm"),
        **_UP_DOWN,
        "ffn_up.bias": (FFN,),
        "ffn_down.bias": (HIDDEN,),
    },
    "mamba": {
        "attn_norm.weight": (HIDDEN,),
        "ssm_in.weight": (4 * HIDDEN, HIDDEN),
        "ssm_conv1d.weight": (2 * HIDDEN, CONV),
        "ssm_conv1d.bias": (2 * HIDDEN,),
        "ssm_x.weight": (RANK + 2 * STATE, 2 * HIDDEN),
        "ssm_dt.weight": (2 * HIDDEN, RANK),
        "ssm_dt.bias": (2 * HIDDEN,),
        "ssm_a": (2 * HIDDEN, STATE),
        "ssm_d": (2 * HIDDEN,),
        "ssm_out.weight": (HIDDEN, 2 * HIDDEN),
    },
}


def tiny(architecture: str, words: Path) -> Path:
    """The tiny model of an architecture, made once and kept; its tokenizer is that of `words`."""
    path = MODELS / f"tiny-{architecture}.gguf"
    if not path.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.half")
        write(half, architecture, words)
        half.rename(path)
    return path


def write(path: Path, architecture: str, words: Path, change: Callable[[str], bool] = bool) -> None:
    """Write the model; tensors for whose name `change` is false are left out."""
    writer = GGUFWriter(path, architecture)
    vocab = _copy_words(writer, words)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_vocab_size(vocab)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "mamba":
        writer.add_ssm_conv_kernel(CONV)
        writer.add_ssm_inner_size(2 * HIDDEN)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_time_step_rank(RANK)
    else:
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_count(HEAD_DIM)
    if architecture == "stablelm":
        writer.add_parallel_residual(False)
    random = np.random.default_rng(7)
    shapes = {"token_embd.weight": (vocab, HIDDEN), **_norm("output_norm"), "output.weight": (vocab, HIDDEN)}
    for layer in range(LAYERS):
        of_layer = LAYER_OF.get(architecture, LAYER_OF["stablelm"])
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    if architecture == "mamba":
        del shapes["output_norm.bias"]
    for name, shape in shapes.items():
        if change(name):
            writer.add_tensor(name, _values(name, shape, random))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    values = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        return values / np.float32(8)
    if "norm" in name:
        return np.float32(1) + values / np.float32(8)
    if name.endswith("ssm_a"):
        return -np.exp(values)
    return values * np.float32(2 / shape[-1] ** 0.5)  # layers that outweigh the embedding


def _copy_words(writer: GGUFWriter, words: Path) -> int:
    fields = GGUFReader(words).fields
    for field in fields.values():
        if field.name.startswith("tokenizer."):
            if field.types[0] == GGUFValueType.ARRAY:
                writer.add_array(field.name, field.contents())
            else:
                writer.add_key_value(field.name, field.contents(), field.types[0])
    return len(fields["tokenizer.ggml.tokens"].data)
