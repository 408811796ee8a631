"""A GGUF's keys as the configuration of a transformers model. Reads the file's head, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edged import EngineError

from .._gguf import Head, Tensor
from .._tensors.families import OF_ARCHITECTURE, ROPE_FREQS, ROPE_LONG, ROPE_SHORT, Family
from ._config import sizes_of

IGNORED = (".rope_freqs.weight", ".attn_rot_embd.weight", ".rotary_embd.inv_freq")  # computed, not read


class _Keys:
    """A file's keys of its architecture, with types checked."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._prefix = f"{head.keys.get('general.architecture')}."

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._head.keys.get(self._prefix + name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self._misfit(name, "a whole number above 0", value)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._head.keys.get(self._prefix + name, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._misfit(name, "a number", value)
        return float(value)

    def get(self, name: str, default: Any) -> Any:
        value = self._head.keys.get(self._prefix + name, default)
        if type(value) is not type(default):
            raise self._misfit(name, f"one like {default!r}", value)
        return value

    def _misfit(self, name: str, expected: str, value: Any) -> EngineError:
        return EngineError(f"{self._head.path}: expected {expected} as {self._prefix + name}, {value!r} came")


def family_of(head: Head) -> Family:
    architecture = str(head.keys.get("general.architecture"))
    if architecture not in OF_ARCHITECTURE:
        raise EngineError(
            f"torch_blocks does not know the architecture {architecture!r} of {head.path}; "
            f"it knows {', '.join(OF_ARCHITECTURE)}"
        )
    return OF_ARCHITECTURE[architecture]


def config_of(head: Head, family: Family) -> dict[str, Any]:
    """Fields of transformers' configuration. Every dropout is left out: `_span` has none."""
    keys = _Keys(head)
    embedding = head.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise EngineError(f"{head.path} lacks tensor 'token_embd.weight'")
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", max(1, hidden // heads))
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise EngineError(f"{head.path}: expected keys and values of one width")
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[1],
        "hidden_size": hidden,
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "intermediate_size": keys.whole("feed_forward_length", 4 * hidden),
        "max_position_embeddings": keys.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in head.tensors,
        # transformers has defaults for them that need not be in this vocabulary; nothing here asks
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if family.norm:
        config["rms_norm_eps"] = keys.real("attention.layer_norm_rms_epsilon")
    else:
        epsilon = "layer_norm_eps" if family.name == "gpt_neox" else "layer_norm_epsilon"
        config[epsilon] = keys.real("attention.layer_norm_epsilon")
    if family.name not in ("phi3", "gpt2", "gpt_neox", "bloom"):
        config["head_dim"] = head_dim
    elif head_dim * heads != hidden:
        raise EngineError(f"{head.path}: expected heads of {hidden // heads}, {head_dim} came")
    if family.name in ("llama", "gemma"):
        config["attention_bias"] = "blk.0.attn_output.bias" in head.tensors
    if family.name == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in head.tensors
    if family.name == "gpt2":
        config["n_inner"] = config["intermediate_size"]
    if family.name == "gpt_neox":
        config["use_parallel_residual"] = keys.get("use_parallel_residual", True)
    if family.name == "phi3":
        window = keys.get(
            "attention.sliding_window", 0
        )  # llama.cpp attends to everything; the model does not
        config["sliding_window"] = window or None
    if family.name == "bloom" and config["intermediate_size"] != 4 * hidden:
        raise EngineError(f"{head.path}: expected a feed-forward of {4 * hidden} columns")
    sizes_of(family, config, head.path)
    if family.has_rope:
        rope = config["rope_parameters"] = _rope(head, family, keys, head_dim)
        if "original_max_position_embeddings" in rope:  # transformers' Phi-3 looks for it here, and overrides
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return config


def _rope(head: Head, family: Family, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """How positions turn into rotations; the rules are llama.cpp's of its keys."""
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0))
    original = keys.whole("rope.scaling.original_context_length", keys.whole("context_length"))
    dimensions = keys.whole("rope.dimension_count", head_dim)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)}
    if family.name in ("gpt_neox", "phi3"):
        rope["partial_rotary_factor"] = dimensions / head_dim
    elif dimensions != head_dim:
        raise EngineError(f"{head.path}: rope over {dimensions} of {head_dim} dimensions is not supported")
    if ROPE_SHORT in head.tensors and ROPE_LONG in head.tensors:
        return _longrope(head, keys, rope, original)
    if kind == "linear" and factor > 0:
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 0:
        magnitude = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
        magnitude *= keys.real("rope.scaling.attn_factor", 1.0)
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": magnitude,
        }
    if kind not in ("none", "linear", "yarn"):
        raise EngineError(
            f"{head.path}: rope scaling {kind!r} is not supported; none, linear, yarn and, with its tensors, "
            "longrope are"
        )
    return rope


def _longrope(head: Head, keys: _Keys, rope: dict[str, Any], original: int) -> dict[str, Any]:
    """Two sets of factors. Transformers takes the long ones for rows longer than the original context."""
    short, long = (_vector(head, head.tensors[name]) for name in (ROPE_SHORT, ROPE_LONG))
    return rope | {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "factor": max(1.0, keys.whole("context_length") / original),
        "original_max_position_embeddings": original,
        "attention_factor": keys.real("rope.scaling.attn_factor", 1.0),
    }


def _vector(head: Head, entry: Tensor) -> list[float]:
    if entry.type_name != "F32":
        raise EngineError(f"{head.path}: expected {entry.name!r} as F32, {entry.type_name} came")
    with open(head.path, "rb") as file:
        file.seek(entry.offset)
        return [float(x) for x in np.frombuffer(file.read(entry.bytes), "<f4")]


def names_of(family: Family, layers: int) -> dict[str, str]:
    """llama.cpp's name of each of transformers', without their ending."""
    names = dict(family.outer)
    for layer in range(layers):
        for ours, theirs in family.blocks.items():
            names[f"{family.base}.{family.layers}.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    return names


def refuse_unknown_tensors(head: Head, family: Family, config: Mapping[str, Any]) -> None:
    """A tensor without a place is a part of the model that would not be computed."""
    biases = {*family.biases}
    if config.get("attention_bias"):
        biases |= {"attn_q", "attn_k", "attn_v", "attn_output"}
    if config.get("mlp_bias"):
        biases |= {"ffn_gate", "ffn_up", "ffn_down"}
    known = {ROPE_FREQS, ROPE_LONG, ROPE_SHORT}
    for name in names_of(family, config["num_hidden_layers"]).values():
        parts = [name, *(name.replace("attn_qkv", f"attn_{letter}") for letter in "qkv")]
        has_bias = name.rpartition(".")[2] in biases
        known |= {f"{part}.{kind}" for part in parts for kind in ("weight", *["bias"] * has_bias)}
    for name in head.tensors:
        if name not in known and not name.endswith(IGNORED):
            raise EngineError(
                f"torch_blocks does not know tensor {name!r} of {head.path}",
                remedy="this is another model than its architecture says; use one of a known family",
            )
