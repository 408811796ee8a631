"""Describes any GGUF that libllama runs, and checks that libllama itself is there.

libllama reads the file's head and says whether its tensors are those of the architecture; no weight
is read. What planning needs comes from general keys and the tensor table. The units at which heads,
columns and vocabulary could be cut are the whole of each: this engine cuts nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import llama_cpp

from edged import EngineError, ModelDescription, TensorEntry

from . import _libllama
from ._gguf import Head, read_head
from ._libraries import LLAMA_CPP_VERSION


def describe(path: str) -> dict[str, Any]:
    """The ModelDescription of the model in `path`, as a map; EngineError says why libllama cannot run it."""
    head = read_head(path)
    architecture = str(head.keys.get("general.architecture", ""))
    _refuse_what_generates_nothing(head, architecture)
    mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # of no_alloc: sizes without a mapping
    model = _libllama.open_model(path, no_alloc=True, load_mode=mode, n_gpu_layers=0)
    try:
        return dataclasses.asdict(_description(head, architecture, model))
    finally:
        llama_cpp.llama_model_free(model)


def measure(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nothing: libllama's kernels are ggml's, whose speed the shard engine measures by weight type."""
    return []


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """libllama is the reference; what can be wrong is its version."""
    if llama_cpp.__version__ != LLAMA_CPP_VERSION:
        raise EngineError(
            f"expected llama-cpp-python {LLAMA_CPP_VERSION}, found {llama_cpp.__version__}",
            remedy=f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}",
        )
    llama_cpp.llama_backend_init()
    return {"version": llama_cpp.__version__, "max_error": 0.0}


def _refuse_what_generates_nothing(head: Head, architecture: str) -> None:
    if architecture in _libllama.NOT_GENERATING or head.keys.get(f"{architecture}.attention.causal") is False:
        raise EngineError(f"a model of architecture {architecture!r} generates no text")
    if head.keys.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        raise EngineError("the file holds no tokenizer", remedy="convert the model with its tokenizer")
    if head.keys.get("split.count", 0) > 1:
        raise EngineError(
            f"it is one of {head.keys['split.count']} parts of a model",
            remedy="merge the parts first: llama-gguf-split --merge",
        )


def _description(head: Head, architecture: str, model: int) -> ModelDescription:
    tensors = head.tensors
    layers = llama_cpp.llama_model_n_layer(model)
    hidden = llama_cpp.llama_model_n_embd(model)
    # An architecture without attention (Mamba) has no heads: one, since nothing here is cut by them.
    heads = max(1, llama_cpp.llama_model_n_head(model))
    kv_heads = max(1, llama_cpp.llama_model_n_head_kv(model))
    of_layers = _layer_bytes(head, layers)
    embedding = tensors["token_embd.weight"].bytes if "token_embd.weight" in tensors else 0
    rest = sum(t.bytes for t in tensors.values()) - embedding - sum(of_layers)
    is_tied = "output.weight" not in tensors
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ffn = _ffn(head, architecture, hidden)
    return ModelDescription(
        architecture=architecture,
        parameters=sum(math.prod(t.shape) for t in tensors.values()),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(head, architecture, hidden, heads),
        ffn=ffn,
        vocab=vocab,
        context_tokens=max(1, llama_cpp.llama_model_n_ctx_train(model)),
        weight_type=head.weight_type,
        head_unit=heads,
        ffn_unit=ffn,
        vocab_unit=vocab,
        layer_bytes=tuple(of_layers),
        embedding_bytes=embedding,
        head_bytes=rest + (embedding if is_tied else 0),
        tensors=tuple(TensorEntry(t.name, t.type_name, t.shape, t.offset, t.bytes) for t in tensors.values()),
        chat_template="tokenizer.chat_template" in head.keys,
    )


def _layer_bytes(head: Head, layers: int) -> list[int]:
    """Bytes of each layer's tensors; those of layers beyond the model's own are counted with the rest."""
    found = [0] * layers
    for tensor in head.tensors.values():
        block, _, rest = tensor.name.partition(".")
        with contextlib.suppress(ValueError, IndexError):
            if block == "blk":
                found[int(rest.partition(".")[0])] += tensor.bytes
    return found


def _head_dim(head: Head, architecture: str, hidden: int, heads: int) -> int:
    """Width of one head's keys or values, the larger: what a position of the KV cache takes."""
    keys = [head.keys.get(f"{architecture}.attention.{name}_length") for name in ("key", "value")]
    known = [key for key in keys if isinstance(key, int) and key > 0]
    return max(known, default=max(1, hidden // heads))


def _ffn(head: Head, architecture: str, hidden: int) -> int:
    """The feed-forward's width; where layers differ or have none, the hidden width."""
    width = head.keys.get(f"{architecture}.feed_forward_length")
    return width if isinstance(width, int) and width > 0 else hidden
