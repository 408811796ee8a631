"""A GGUF as a model of transformers: its configuration, and its tensors one by one as transformers has them.

Tensors are dequantised by the `gguf` package, a few rows at a time, into their place. What llama.cpp's
converter changes of a family's tensors is undone here: rows of queries and keys permuted for its rope
(Llama), matrices transposed (GPT-2), queries, keys and values of all heads put one after the other
(GPT-NeoX, BLOOM), and one added to norms (Gemma).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from edged import EngineError

from .._gguf import Head, Tensor, read_head, section_sha256
from ._families import OF_ARCHITECTURE, ROPE_FREQS, ROPE_LONG, ROPE_SHORT, Family
from ._tokens import LlamaTokenizer, Tokenizer

PIECE_BYTES = 4 << 20  # of a tensor's file bytes that are dequantised at a time
IGNORED = (".rope_freqs.weight", ".attn_rot_embd.weight", ".rotary_embd.inv_freq")  # computed, not read
_NUMPY = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
}


class GgufModel:
    """The model of the GGUF at `path`; EngineError where this engine does not know all of it.

    `config`: fields of transformers' configuration. `reads`: names of tensors read so far, llama.cpp's.
    """

    def __init__(self, path: str) -> None:
        self.path, self.head = path, read_head(path)
        self.reads: list[str] = []
        self.family = _family(self.head)
        self._keys = _Keys(self.head)
        self.config = _config(self.head, self.family, self._keys)
        self._names = _names(self.head, self.family, self.config["num_hidden_layers"])
        _refuse_unknown_tensors(self.head, set(self._names.values()))

    def tokenizer(self) -> Tokenizer:
        """Its vocabulary; the hash is of every key that says how text becomes tokens, chat template too."""
        has_template = "tokenizer.chat_template" in self.head.keys
        return LlamaTokenizer(self.path, has_template, section_sha256(self.path, "tokenizer."))

    def has(self, name: str) -> bool:
        """Does the file hold transformers' tensor `name`?"""
        source = self._source(name)
        return source in self.head.tensors or (name.endswith("_proj.weight") and self._parts(source) != [])

    def tensor(self, name: str) -> torch.Tensor:
        """Transformers' tensor `name`, F32, in transformers' layout."""
        source = self._source(name)
        if source in self.head.tensors:
            found = self._read(source)
        elif parts := self._parts(source):
            found = torch.cat([self._read(part) for part in parts])
        else:
            raise EngineError(f"{self.path} lacks tensor {source!r} ({name} of a {self.family.name} model)")
        return self._undo(name, found)

    def rope_factors(self) -> torch.Tensor | None:
        """What the file divides rope's frequencies by, where it says so in a tensor (Llama 3)."""
        return self._read(ROPE_FREQS) if ROPE_FREQS in self.head.tensors else None

    def _source(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        return f"{self._names.get(stem, stem)}.{kind}"

    def _parts(self, source: str) -> list[str]:
        """The three tensors that stand in the file for a fused one."""
        if "attn_qkv" not in source:
            return []
        parts = [source.replace("attn_qkv", f"attn_{letter}") for letter in "qkv"]
        return parts if all(part in self.head.tensors for part in parts) else []

    def _undo(self, name: str, found: torch.Tensor) -> torch.Tensor:
        stem = name.rpartition(".")[0]
        block = f"{self.family.base}.{self.family.layers}."
        if stem.startswith(block):
            stem = stem.removeprefix(block).partition(".")[2]
        undo = (self.family.undo or {}).get(stem)
        heads = self.config["num_attention_heads"]
        if undo == "permuted":
            if stem.endswith("k_proj"):
                heads = self.config["num_key_value_heads"]
            half = found.shape[0] // heads // 2
            return found.reshape(heads, half, 2, -1).transpose(1, 2).reshape(found.shape)
        if undo == "interleaved":
            width = found.shape[0] // heads // 3
            return found.reshape(3, heads, width, -1).transpose(0, 1).reshape(found.shape)
        if undo == "transposed" and found.ndim == 2:
            return found.T.contiguous()
        if undo == "plus one":
            return found - 1
        return found

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of the file in F32, rows before columns."""
        entry = self.head.tensors[name]
        self.reads.append(name)
        shape = entry.shape[::-1]
        rows, width = math.prod(shape[:-1]), shape[-1]
        found = torch.empty((rows, width), dtype=torch.float32)
        at_once = max(1, PIECE_BYTES // max(1, entry.bytes // rows))
        out = found.numpy()
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.offset)
                for row in range(0, rows, at_once):
                    count = min(at_once, rows - row)
                    out[row : row + count] = _numbers(entry, file.read(entry.bytes // rows * count), count)
        except OSError as error:
            raise EngineError(f"cannot read {self.path}: {error.strerror or error}") from error
        return found.reshape(shape)


def _numbers(entry: Tensor, data: bytes, rows: int) -> np.ndarray:
    if entry.type_name in _NUMPY:
        return np.frombuffer(data, _NUMPY[entry.type_name]).reshape(rows, -1)
    raw = np.frombuffer(data, np.uint8).reshape(rows, -1)
    try:
        return dequantize(raw, GGMLQuantizationType(entry.type))
    except NotImplementedError as error:
        raise EngineError(
            f"tensor {entry.name!r} has type {entry.type_name}, which cannot be dequantised",
            remedy="convert the model to another type, such as Q8_0",
        ) from error


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


def _family(head: Head) -> Family:
    architecture = str(head.keys.get("general.architecture"))
    if architecture not in OF_ARCHITECTURE:
        raise EngineError(
            f"torch_blocks does not know the architecture {architecture!r} of {head.path}; "
            f"it knows {', '.join(OF_ARCHITECTURE)}"
        )
    return OF_ARCHITECTURE[architecture]


def _config(head: Head, family: Family, keys: _Keys) -> dict[str, Any]:
    """Fields of transformers' configuration. Every dropout is left out: `_span` has none."""
    embedding = head.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise EngineError(f"{head.path} lacks tensor 'token_embd.weight'")
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", max(1, hidden // heads))
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise EngineError(f"{head.path}: expected keys and values of one width")
    has = {name for name in head.tensors if name.startswith("blk.0.")}
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[1],
        "hidden_size": hidden,
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "intermediate_size": keys.whole("feed_forward_length", 4 * hidden),
        "max_position_embeddings": keys.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in head.tensors,
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
        config["attention_bias"] = "blk.0.attn_output.bias" in has
        config["mlp_bias"] = "blk.0.ffn_down.bias" in has
    if family.name == "gpt2":
        config["n_inner"] = config["intermediate_size"]
    if family.name == "gpt_neox":
        config["use_parallel_residual"] = keys.get("use_parallel_residual", True)
    if family.name == "phi3":
        window = keys.get(
            "attention.sliding_window", 0
        )  # llama.cpp attends to everything; the model does not
        config |= {"sliding_window": window or None, "pad_token_id": None}
    if family.name in ("bloom",) and config["intermediate_size"] != 4 * hidden:
        raise EngineError(f"{head.path}: expected a feed-forward of {4 * hidden} columns")
    if family.has_rope:
        config["rope_parameters"] = _rope(head, family, keys, head_dim)
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
    read = {}
    for name in (ROPE_SHORT, ROPE_LONG):
        entry = head.tensors[name]
        with open(head.path, "rb") as file:
            file.seek(entry.offset)
            read[name] = _numbers(entry, file.read(entry.bytes), 1)[0].astype(float).tolist()
    return rope | {
        "rope_type": "longrope",
        "short_factor": read[ROPE_SHORT],
        "long_factor": read[ROPE_LONG],
        "factor": max(1.0, keys.whole("context_length") / original),
        "original_max_position_embeddings": original,
        "attention_factor": keys.real("rope.scaling.attn_factor", 1.0),
    }


def _names(head: Head, family: Family, layers: int) -> dict[str, str]:
    """llama.cpp's name of each of transformers', without their ending."""
    names = dict(family.outer)
    for layer in range(layers):
        for ours, theirs in family.blocks.items():
            names[f"{family.base}.{family.layers}.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    return names


def _refuse_unknown_tensors(head: Head, known: set[str]) -> None:
    """A tensor without a place is a part of the model that would not be computed."""
    known |= {name.replace("attn_qkv", f"attn_{letter}") for name in known for letter in "qkv"}
    for name in head.tensors:
        if name.rpartition(".")[0] in known or name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT):
            continue
        if not name.endswith(IGNORED):
            raise EngineError(
                f"torch_blocks does not know tensor {name!r} of {head.path}",
                remedy="this is another model than its architecture says; use one of a known family",
            )
