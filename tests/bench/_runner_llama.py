"""llama.cpp behind the pipe, through its C interface: no copy of the logits, no sampling in its time."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from _peer import CONTEXT, Turns


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Kept alive here; ggml calls it for every line."""


def silence() -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


class Llama(Turns):
    """See `_peer.Turns`."""

    def __init__(self) -> None:
        silence()
        llama_cpp.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        self._random = np.random.default_rng(0)
        self._vocab = 0

    def load(self, path: str, threads: int, sequences: int) -> None:
        if self._model is not None:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise OSError(f"llama.cpp could not load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = CONTEXT * sequences, sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise OSError(f"llama.cpp made no context for {sequences} sequences")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def _step(self, numbers: Sequence[int], position: int, count: int) -> float:
        """`count` tokens of each sequence, with the logits of each one's last."""
        total = len(numbers) * count
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        batch.n_tokens = total
        for i, token in enumerate(self._random.integers(0, self._vocab, total)):
            batch.token[i], batch.pos[i] = int(token), position + i % count
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, numbers[i // count]
            batch.logits[i] = i % count == count - 1
        started = time.perf_counter()
        failed = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_synchronize(self._context)
        spent = (time.perf_counter() - started) * 1000
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise OSError(f"llama_decode answered {failed}")
        return spent

    def _clear(self, sequences: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
