"""Describes a GGUF for planning: sizes, tensor table, and the units at which it can be cut.

Reads the head of the file only. Run by a child process at `models add`; an EngineError says in one
line why the shard engine cannot run the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from edged import ModelDescription, TensorEntry

from ._model import LAYER_TENSORS, Model, read_model


def describe(path: str) -> dict[str, Any]:
    """The ModelDescription of the model in `path`, as a map."""
    model = read_model(path)
    tensors = model.head.tensors
    output = model.output()
    return dataclasses.asdict(
        ModelDescription(
            architecture=str(model.head.keys["general.architecture"]),
            parameters=sum(math.prod(t.shape) for t in tensors.values()),
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            ffn=model.ffn,
            vocab=model.vocab,
            context_tokens=model.context_tokens,
            weight_type=_weight_type(model),
            head_unit=model.head_unit,
            ffn_unit=model.ffn_unit,
            vocab_unit=model.vocab_unit,
            layer_bytes=tuple(_layer_bytes(model, i) for i in range(model.layers)),
            embedding_bytes=model.tensor("token_embd").bytes,
            head_bytes=output.bytes + model.tensor("output_norm").bytes,
            tensors=tuple(
                TensorEntry(t.name, t.type_name, t.shape, t.offset, t.bytes) for t in tensors.values()
            ),
            chat_template="tokenizer.chat_template" in model.head.keys,
        )
    )


def _layer_bytes(model: Model, layer: int) -> int:
    return sum(model.tensor(f"blk.{layer}.{name}").bytes for name in LAYER_TENSORS)


def _weight_type(model: Model) -> str:
    """The type that holds most of the layers' bytes."""
    count: Counter[str] = Counter()
    for tensor in model.head.tensors.values():
        if tensor.name.startswith("blk."):
            count[tensor.type_name] += tensor.bytes
    return count.most_common(1)[0][0]
