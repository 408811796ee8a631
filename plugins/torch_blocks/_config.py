"""What planning and callers need of a model's configuration, whatever its family calls it. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edged import EngineError

from .._tensors.families import FAMILIES, Family
from ._safetensors_head import SafetensorsHead

# What transformers' configurations call a size: the common name, then what GPT-2 and BLOOM say.
NAMES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd", "n_embed"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
    "context_tokens": ("max_position_embeddings", "n_positions", "seq_length"),
}
# What a damaged or hostile file may cost before its tensors are looked at; others cost nothing until then.
MOST = {"layers": 1024, "head_dim": 1 << 16}
CONTEXT_TOKENS = 2048  # of a model that has no positions of its own (BLOOM) and does not say


@dataclass(frozen=True, slots=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_tokens: int


def sizes_of(family: Family, config: Mapping[str, Any], path: str) -> Sizes:
    """The sizes in a configuration of transformers; EngineError where one is missing or makes no sense."""
    found: dict[str, int] = {}
    for size, names in NAMES.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is None:
            value = _default(size, found)
        most = MOST.get(size, 2**31 - 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise EngineError(
                f"{path}: expected {names[0]} as a whole number from 1 to {most}, {value!r} came"
            )
        found[size] = value
    if found["heads"] % found["kv_heads"]:
        raise EngineError(
            f"{path}: expected heads in whole groups, {found['heads']} over {found['kv_heads']} came"
        )
    return Sizes(**found)


def _default(size: str, found: Mapping[str, int]) -> int | None:
    match size:
        case "kv_heads":
            return found["heads"]
        case "head_dim":
            return found["hidden"] // found["heads"]
        case "ffn":
            return 4 * found["hidden"]
        case "context_tokens":
            return CONTEXT_TOKENS
    return None


def read_config(head: SafetensorsHead) -> tuple[dict[str, Any], Family]:
    """config.json's fields, and the family; EngineError where it is of none, or a size makes no sense."""
    text = head.texts.get("config")
    if text is None:
        raise EngineError(
            f"{head.path} holds no config", remedy="pack the model's folder first: edged models add FOLDER"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{head.path}: expected JSON as its config; {error}") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise EngineError(
            f"torch_blocks does not know the model type {family!r} of {head.path}; "
            f"it knows {', '.join(FAMILIES)}"
        )
    sizes_of(FAMILIES[family], config, head.path)
    return config, FAMILIES[family]
