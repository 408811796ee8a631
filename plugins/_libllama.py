"""libllama's models through its own C API, with its reasons as errors.

libllama answers a failed load with a null pointer and says why in its log alone, so that log is
caught while it loads. `architectures` asks the library itself what it knows, by loading empty files
of each name: no list of ours could keep step with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # on an abort ggml would start a debugger, if there is one

import gguf
import llama_cpp

from edged import EngineError

from ._tokenizer import silence

UNKNOWN = "unknown model architecture"
LOG_LINES = 8  # of errors kept: the first names the cause, the others repeat it
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
# Names that libllama knows and that generate no text: encoders, parts of other models.
NOT_GENERATING = frozenset(
    (
        *("clip", "wavtokenizer-dec", "t5", "t5encoder", "gemma-embedding", "llama-embed"),
        *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
        *("jina-bert-v2", "jina-bert-v3"),
    )
)

_errors: deque[str] = deque(maxlen=LOG_LINES)


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, user: ctypes.c_void_p) -> None:
    if level == LOG_ERROR:
        _errors.append(text.decode("utf-8", "replace"))


@contextlib.contextmanager
def _reasons() -> Iterator[deque[str]]:
    """libllama's error lines, while the block runs."""
    _errors.clear()
    llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p())
    try:
        yield _errors
    finally:
        silence()


def open_model(path: str, **parameters: Any) -> int:
    """libllama's model of a file; `parameters`: fields of llama_model_params.

    EngineError with libllama's own reason, or with the architecture's name and those it knows.
    """
    chosen = llama_cpp.llama_model_default_params()
    for name, value in parameters.items():
        setattr(chosen, name, value)
    with _reasons() as reasons:
        model = llama_cpp.llama_model_load_from_file(path.encode(), chosen)
        reason = _cause(reasons)
    if model:
        return int(model)
    if UNKNOWN in reason:
        name = reason.partition(":")[2].strip(" '")
        raise EngineError(
            f"libllama knows no architecture {name!r}; it runs {', '.join(architectures())}",
            remedy="convert the model, or use a llama-cpp-python that knows it",
        )
    raise EngineError(f"libllama cannot load {path}: {reason or 'it gives no reason'}")


def open_context(model: int, **parameters: Any) -> int:
    """A context of the model; `parameters`: fields of llama_context_params. EngineError when refused."""
    chosen = llama_cpp.llama_context_default_params()
    for name, value in parameters.items():
        setattr(chosen, name, value)
    with _reasons() as reasons:
        context = llama_cpp.llama_init_from_model(model, chosen)
        reason = _cause(reasons)
    if not context:
        raise EngineError(
            f"libllama cannot make room for this model's context: {reason or 'it gives no reason'}",
            remedy="free memory, ask for a smaller context, or for another `jobs.cache_type`",
        )
    return int(context)


def open_adapter(model: int, path: str) -> int:
    """A LoRA adapter of the model, from llama.cpp's file of it; freed with the model, and to be opened
    before the model's contexts. EngineError with libllama's own reason."""
    with _reasons() as reasons:
        adapter = llama_cpp.llama_adapter_lora_init(model, path.encode())
        reason = _cause(reasons)
    if not adapter:
        raise EngineError(f"libllama cannot apply the adapter {path}: {reason or 'it gives no reason'}")
    return int(ctypes.cast(adapter, ctypes.c_void_p).value or 0)


def apply_adapter(context: int, adapter: int) -> None:
    """Run whatever comes through the context with the adapter, at its own scale."""
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(
        ctypes.cast(adapter, llama_cpp.llama_adapter_lora_p_ctypes)
    )
    if code := llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
        llama_cpp.llama_free(context)
        raise EngineError(f"libllama could not apply an adapter to its context (code {code})")


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures that this libllama knows and that generate text."""
    with tempfile.TemporaryDirectory(prefix="edged-architectures-") as folder:
        path = os.path.join(folder, "empty.gguf")
        names = sorted(set(gguf.MODEL_ARCH_NAMES.values()) - NOT_GENERATING)
        return tuple(name for name in names if _is_known(name, path))


def _is_known(architecture: str, path: str) -> bool:
    """Does libllama get beyond the name of a file that holds nothing else?"""
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    with _reasons() as reasons:
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if model:
            llama_cpp.llama_model_free(model)
        return UNKNOWN not in _cause(reasons)


def _cause(reasons: deque[str]) -> str:
    """What libllama says first, without the name of the function that says it."""
    if not reasons:
        return ""
    return reasons[0].partition("error loading model: ")[2].strip() or reasons[0].strip()
