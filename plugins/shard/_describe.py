"""Describes a GGUF for planning: sizes, tensor table, and the units at which it can be cut.

Reads the head of the file only. Run by a child process at `models add`; an EngineError says in one
line why the shard engine cannot run the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from edged import ModelDescription, TensorEntry

from ._model import Model, read_model
from ._tensors import Piece

_CUT_BY = {"heads": "heads", "kv": "heads", "ffn": "ffn"}


def describe(path: str) -> dict[str, Any]:
    """The ModelDescription of the model in `path`, as a map."""
    model = read_model(path)
    tensors = model.head.tensors
    pieces = model.pieces
    cuts = tuple(_layer_cuts(model, i) for i in range(model.layers))
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
            weight_type=model.head.weight_type,
            head_unit=model.head_unit,
            ffn_unit=model.ffn_unit,
            vocab_unit=model.vocab_unit,
            layer_bytes=tuple(map(sum, cuts)),
            embedding_bytes=model.tensor("token_embd").bytes + _bytes(model, pieces.embedding()),
            head_bytes=_bytes(model, pieces.head()),
            layer_cuts=cuts,
            reductions=1 if model.is_parallel else 2,
            tensors=tuple(
                TensorEntry(t.name, t.type_name, t.shape, t.offset, t.bytes) for t in tensors.values()
            ),
            chat_template="tokenizer.chat_template" in model.head.keys,
        )
    )


def _layer_cuts(model: Model, layer: int) -> tuple[int, int, int]:
    """Bytes of the layer that are cut by heads, by the feed-forward's columns, and not at all."""
    by_axis: Counter[str] = Counter()
    for piece in model.pieces.layer(layer):
        axis = next((_CUT_BY[a] for a in piece.axes if a in _CUT_BY), "")
        by_axis[axis] += _bytes(model, [piece])
    return by_axis["heads"], by_axis["ffn"], by_axis[""]


def _bytes(model: Model, pieces: Iterable[Piece]) -> int:
    total = 0
    for piece in pieces:
        tensor = model.head.tensors[piece.source]
        total += tensor.bytes * math.prod(model.pieces.shape(piece)) // math.prod(tensor.shape)
    return total
