"""The self-test: does this engine compute what libllama computes, on this machine, with this build?

The binding trusts signatures that ctypes cannot check, so at first start small random models
run through both, prompt and single tokens. On the CPU the logits must be bit-equal: the same
kernels run on the same numbers.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
import msgspec
import numpy as np

from edged import EngineError, EngineSpec, ModelDescription, Role, Step

from .._tokenizer import silence
from . import _ggml
from ._describe import describe
from ._engine import load
from ._random import Shape, write_model

TOLERANCE = 0.0  # on the CPU: the same kernels, bit for bit
CONTEXT_TOKENS = 512
PROMPT_TOKENS, TOKENS = 33, 8
SHAPES = (  # between them, every operation that some architecture uses
    Shape(),
    Shape(is_tied=True, rope_factors=("rope_freqs",)),
    Shape("gemma2", is_tied=True, keys={"attention.sliding_window": 16}),
    Shape("gptneox", kv_heads=4, has_fused_qkv=True, keys={"use_parallel_residual": True}),
    Shape("bloom", kv_heads=4, has_fused_qkv=True),
)


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"version", "max_error"}; EngineError when this engine and libllama disagree."""
    _ggml.load()
    error = 0.0
    with tempfile.TemporaryDirectory(prefix="edged-check-") as folder:
        for i, shape in enumerate(SHAPES):
            path = os.path.join(folder, f"{i}.gguf")
            write_model(path, shape, "Q4_0", seed=i)
            error = max(error, compare(path, settings))
    if not error <= TOLERANCE:  # so that NaN fails too
        raise EngineError(
            f"the shard engine's logits differ from libllama's by {error:.3g} on this machine, "
            f"expected at most {TOLERANCE}",
            remedy="use the engine llama_cpp here, and report this machine's processor",
        )
    return {"version": _ggml.GGML_VERSION, "max_error": error}


def compare(path: str, settings: Mapping[str, Any]) -> float:
    """The largest difference between the two engines' logits over a prompt and single tokens."""
    random = np.random.default_rng(1)
    description = msgspec.convert(describe(path), ModelDescription)
    ids = random.integers(0, description.vocab, PROMPT_TOKENS + TOKENS).tolist()
    batches = [ids[:PROMPT_TOKENS], *([t] for t in ids[PROMPT_TOKENS:])]
    ours = _our_logits(path, description, settings, batches)
    theirs = llama_logits(path, batches)
    return float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)))


def _our_logits(
    path: str, model: ModelDescription, settings: Mapping[str, Any], batches: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    whole = ((0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab))
    role = Role(0, "self", 0, *whole, share=1.0)
    spec = EngineSpec(path, model, (role,), 0, CONTEXT_TOKENS, settings=settings)
    engine = load(spec, Alone())
    try:
        found, at = [], 0
        for batch in batches:
            found.append(engine.logits(Step(0, batch, at, None)).copy())
            at += len(batch)
        return found
    finally:
        engine.close()


def llama_logits(path: str, batches: Sequence[Sequence[int]], threads: int = 1) -> list[np.ndarray]:
    """libllama's logits of each batch's last token, with flash attention."""
    silence()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise EngineError("libllama cannot load the model of the self-test")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    try:
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return [_decode(context, batch, vocab) for batch in batches]
    finally:
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _decode(context: Any, batch: Sequence[int], vocab: int) -> np.ndarray:
    ids = (llama_cpp.llama_token * len(batch))(*batch)
    if not context or llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(batch))):
        raise EngineError("libllama cannot run the model of the self-test")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab,)).copy()


class Alone:
    """The channel of a rank that has no other; nothing is ever sent over it."""

    rank, size, bytes_sent = 0, 1, 0

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        raise EngineError(f"there is no rank {to}")

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        raise EngineError(f"there is no rank {source}")

    def poll(self, source: int, timeout_s: float) -> bool:
        return False

    def exchange(self, ranks: Sequence[int], frame: Any, timeout_s: float) -> list[memoryview]:
        return self.move([(rank, frame) for rank in ranks], [], timeout_s)

    def move(
        self, sends: Sequence[tuple[int, Any]], takes: Sequence[tuple[int, int]], timeout_s: float
    ) -> list[memoryview]:
        if sends or takes:
            raise EngineError("there is no other rank")
        return []
