"""Describes a model for planning, measures this device's arithmetic in PyTorch, and checks the engine.

A model is described from its head, without torch: a GGUF by its keys, a safetensors file by its config.
Heads, columns and vocabulary are not cut here, so the unit of each is the whole.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from edged import EngineError, EngineSpeed, ModelDescription, TensorEntry

from .._gguf import read_head
from .._tensors.families import FAMILIES, Family
from ._config import Sizes, read_config, sizes_of
from ._gguf_config import config_of, family_of, refuse_unknown_tensors
from ._safetensors_head import is_safetensors, main_type, read_safetensors_head

WIDTH, ROWS, BATCH = 1024, 2048, 512  # of the benchmark's matrix, and positions that it is multiplied by
RUNS = 5
TOLERANCE = 1e-5  # of the check's hidden states, which are about 1
CHECKED = ("torch", "transformers", "peft")


def describe(path: str) -> dict[str, Any]:
    """The ModelDescription of the model at `path`, as a map; EngineError says why it cannot be run."""
    return dataclasses.asdict(_of_safetensors(path) if is_safetensors(path) else _of_gguf(path))


def _of_gguf(path: str) -> ModelDescription:
    head = read_head(path)
    family = family_of(head)
    config = config_of(head, family)
    refuse_unknown_tensors(head, family, config)
    found = head.tensors.values()
    tensors = tuple(TensorEntry(t.name, t.type_name, t.shape, t.offset, t.bytes) for t in found)
    return _description(
        str(head.keys["general.architecture"]),
        sizes_of(family, config, path),
        tensors,
        block="blk.",
        outer=("token_embd.", "position_embd.", "token_embd_norm."),
        head="output.weight",
        weight_type=head.weight_type,
        has_template="tokenizer.chat_template" in head.keys,
    )


def _of_safetensors(path: str) -> ModelDescription:
    head = read_safetensors_head(path)
    config, family = read_config(head)
    if "tokenizer" not in head.texts:
        raise EngineError(f"{path} holds no tokenizer", remedy="pack the model's folder again, with it")
    prefix = f"{family.base}."
    tensors = tuple(
        TensorEntry(t.name.removeprefix(prefix), t.type, t.shape, t.offset, t.bytes)
        for t in head.tensors.values()
    )
    described = _description(
        family.name,
        sizes_of(family, config, path),
        tensors,
        block=f"{family.layers}.",
        outer=_outer(family),
        head="embed_out.weight" if "embed_out.weight" in head.tensors else f"{family.head}.weight",
        weight_type=main_type(head.tensors),
        has_template="chat_template" in head.texts,
    )
    names = tuple(dataclasses.replace(t, name=name) for t, name in zip(tensors, head.tensors, strict=True))
    return dataclasses.replace(described, tensors=names)


def _outer(family: Family) -> tuple[str, ...]:
    """Beginnings of the names of what belongs to the embedding."""
    names = (family.embedding, family.positions, family.embedding_norm)
    return tuple(f"{name}." for name in names if name)


def _description(
    architecture: str,
    sizes: Sizes,
    tensors: tuple[TensorEntry, ...],
    *,
    block: str,
    outer: tuple[str, ...],
    head: str,
    weight_type: str,
    has_template: bool,
) -> ModelDescription:
    of_layers = [0] * sizes.layers
    for tensor in tensors:
        number = tensor.name.removeprefix(block).partition(".")[0] if tensor.name.startswith(block) else ""
        if number.isdecimal() and int(number) < sizes.layers:
            of_layers[int(number)] += tensor.bytes
    if 0 in of_layers:
        raise EngineError(f"expected tensors of {sizes.layers} blocks; block {of_layers.index(0)} has none")
    embedding = sum(tensor.bytes for tensor in tensors if tensor.name.startswith(outer))
    rest = sum(tensor.bytes for tensor in tensors) - embedding - sum(of_layers)
    is_tied = all(tensor.name != head for tensor in tensors)
    first = next((tensor.bytes for tensor in tensors if tensor.name.startswith(outer[0])), 0)
    return ModelDescription(
        architecture=architecture,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        layers=sizes.layers,
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn=sizes.ffn,
        vocab=sizes.vocab,
        context_tokens=sizes.context_tokens,
        weight_type=weight_type,
        head_unit=sizes.heads,
        ffn_unit=sizes.ffn,
        vocab_unit=sizes.vocab,
        layer_bytes=tuple(of_layers),
        embedding_bytes=embedding,
        head_bytes=rest + (first if is_tied else 0),
        tensors=tensors,
        chat_template=has_template,
    )


# --- measuring ------------------------------------------------------------------------------------


def measure(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How fast this device multiplies in PyTorch: an EngineSpeed, as a map, for each way weights are kept.

    `prefill_flops_s`: floating-point operations a second of matrix products over many positions, which is
    what a training consists of; `decode_bytes_s`: bytes of weights a second with one position. The weight
    types have names of their own, "torch_f32" and "torch_bf16": no plan for generation takes them for ggml's.
    Empty where torch is not installed, so that other engines' measurements stand; `check` says so then.
    """
    try:
        import torch

        from ._narrow import widened
    except ImportError:
        return []

    torch.set_num_threads(int(settings.get("threads") or len(os.sched_getaffinity(0))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    many, one = torch.ones(BATCH, WIDTH, device=device), torch.ones(1, WIDTH, device=device)
    found = []
    for name, dtype in (("torch_f32", torch.float32), ("torch_bf16", torch.bfloat16)):
        weight = torch.ones(ROWS, WIDTH, dtype=dtype, device=device)
        with torch.no_grad():
            batch_s = min(_seconds(lambda w=weight: widened(many, w)[0, 0].item()) for _ in range(RUNS))
            one_s = min(_seconds(lambda w=weight: widened(one, w)[0, 0].item()) for _ in range(RUNS))
        size = weight.numel() * weight.element_size()
        found.append(EngineSpeed("torch_blocks", name, size / one_s, 2 * BATCH * weight.numel() / batch_s))
    return [dataclasses.asdict(speed) for speed in found]


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return max(time.perf_counter() - start, 1e-9)


# --- checking -------------------------------------------------------------------------------------


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"version", "max_error"}: does a small model, cut in two, compute here what it computes whole?

    EngineError where a library is missing or does not fit, or the two differ.
    """
    try:
        version = ", ".join(f"{name} {metadata.version(name)}" for name in CHECKED)
        error = _cut_error()
    except (ImportError, AttributeError, TypeError) as reason:  # libraries whose names moved
        raise EngineError(
            f"expected torch, transformers and peft that this engine can use; {reason}",
            remedy="pip install 'edged[train]' with constraints.txt",
        ) from reason
    if not error <= TOLERANCE:  # so that NaN fails too
        raise EngineError(f"a model cut in two differs from itself by {error:.3g}, expected {TOLERANCE}")
    return {"version": version, "max_error": error}


def _cut_error() -> float:
    import torch

    from ._memory_model import MemoryModel
    from ._span import Span

    model = MemoryModel(
        FAMILIES["llama"],
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    )
    whole = Span(model, 0, 2, embed=True, head=True)
    start, end = Span(model, 0, 1, embed=True), Span(model, 1, 2, head=True)
    for span in (whole, start, end):
        span.add_lora(r=2, alpha=4, targets=["q_proj"], seed=0)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return float((whole(ids) - end(start(ids))).abs().max())
