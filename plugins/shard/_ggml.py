"""The ctypes binding to the ggml libraries that ship inside llama-cpp-python. No C of our own.

ctypes checks no signatures, so a changed argument list would be silent corruption: the version is
pinned and `load` refuses any other. Pointers are opaque (`c_void_p`); the only layouts declared
are `ggml_init_params` (by value) and the heads of the type traits. ggml aborts the process on
bad input: whoever calls validates first.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

from edged import EngineError

from .._libraries import LLAMA_CPP_VERSION, open_library

GGML_VERSION = "0.25.3"

F32, F16, Q8_0, I32, I64 = 0, 1, 8, 26, 27
PREC_F32 = 10
USAGE_WEIGHTS, USAGE_COMPUTE = 1, 2
ROPE_NORMAL, ROPE_NEOX = 0, 2
STATUS_SUCCESS = 0

P = c_void_p


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", P), ("no_alloc", c_bool))


class TypeTraits(ctypes.Structure):
    """The head of `struct ggml_type_traits`."""

    _fields_ = (
        ("name", c_char_p),
        ("block", c_int64),
        ("block_interleave", c_int64),
        ("bytes", c_size_t),
        ("quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, P, P, c_int64)),
    )


class CpuTypeTraits(ctypes.Structure):
    """The head of `struct ggml_type_traits_cpu`."""

    _fields_ = (("from_float", ctypes.CFUNCTYPE(None, P, P, c_int64)),)


LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, P)

_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_log_set": (None, (LOG_CALLBACK, P)),
    "ggml_init": (P, (InitParams,)),
    "ggml_free": (None, (P,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_type_size": (c_size_t, (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), (c_int,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, P, P, c_int64, c_int64, c_int64, P)),
    "ggml_nbytes": (c_size_t, (P,)),
    "ggml_get_data": (P, (P,)),
    "ggml_new_tensor_1d": (P, (P, c_int, c_int64)),
    "ggml_new_tensor_2d": (P, (P, c_int, c_int64, c_int64)),
    "ggml_new_tensor_3d": (P, (P, c_int, c_int64, c_int64, c_int64)),
    "ggml_new_graph_custom": (P, (P, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_graph_n_nodes": (c_int, (P,)),
    "ggml_set_output": (None, (P,)),
    "ggml_prec_set_acc": (c_bool, (P, c_int)),
    # operations; the first argument is the context
    "ggml_add": (P, (P, P, P)),
    "ggml_mul": (P, (P, P, P)),
    "ggml_cpy": (P, (P, P, P)),
    "ggml_cont": (P, (P, P)),
    "ggml_cont_2d": (P, (P, P, c_int64, c_int64)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_norm": (P, (P, P, c_float)),
    "ggml_rms_norm": (P, (P, P, c_float)),
    "ggml_scale": (P, (P, P, c_float)),
    "ggml_tanh": (P, (P, P)),
    "ggml_gelu": (P, (P, P)),
    "ggml_geglu_split": (P, (P, P, P)),
    "ggml_swiglu_split": (P, (P, P, P)),
    "ggml_get_rows": (P, (P, P, P)),
    "ggml_set_rows": (P, (P, P, P, P)),
    "ggml_reshape_2d": (P, (P, P, c_int64, c_int64)),
    "ggml_reshape_3d": (P, (P, P, c_int64, c_int64, c_int64)),
    "ggml_view_2d": (P, (P, P, c_int64, c_int64, c_size_t, c_size_t)),
    "ggml_view_3d": (P, (P, P, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t)),
    "ggml_permute": (P, (P, P, c_int, c_int, c_int, c_int)),
    "ggml_soft_max_ext": (P, (P, P, P, c_float, c_float)),
    "ggml_concat": (P, (P, P, P, c_int)),
    "ggml_map_custom1_inplace": (P, (P, P, P, c_int, P)),
    "ggml_flash_attn_ext": (P, (P, P, P, P, P, c_float, c_float, c_float)),
    "ggml_rope_ext": (P, (P, P, P, P, c_int, c_int, c_int, *(c_float,) * 6)),
    # buffers, devices, allocation
    "ggml_backend_free": (None, (P,)),
    "ggml_backend_graph_compute": (c_int, (P, P)),
    "ggml_backend_buft_name": (c_char_p, (P,)),
    "ggml_backend_buft_alloc_buffer": (P, (P, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (P, P)),
    "ggml_backend_buffer_get_base": (P, (P,)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_buffer_get_size": (c_size_t, (P,)),
    "ggml_backend_buffer_set_usage": (None, (P, c_int)),
    "ggml_backend_tensor_set": (None, (P, P, c_size_t, c_size_t)),
    "ggml_backend_tensor_alloc": (c_int, (P, P, P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, (P, P)),
    "ggml_backend_cpu_buffer_type": (P, ()),
    "ggml_backend_cpu_buffer_from_ptr": (P, (P, c_size_t)),
    "ggml_backend_reg_dev_get": (P, (P, c_size_t)),
    "ggml_backend_reg_get_proc_address": (P, (P, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (P, P)),
    "ggml_gallocr_new": (P, (P,)),
    "ggml_gallocr_free": (None, (P,)),
    "ggml_gallocr_reserve": (c_bool, (P, P)),
    "ggml_gallocr_alloc_graph": (c_bool, (P, P)),
    "ggml_gallocr_get_buffer_size": (c_size_t, (P, c_int)),
}
_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_cpu_init": (None, ()),
    "ggml_cpu_fp32_to_fp16": (None, (P, P, c_int64)),
    "ggml_cpu_fp16_to_fp32": (None, (P, P, c_int64)),
    "ggml_get_type_traits_cpu": (ctypes.POINTER(CpuTypeTraits), (c_int,)),
    "ggml_backend_cpu_init": (P, ()),
    "ggml_backend_cpu_reg": (P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (P, c_int)),
}


@LOG_CALLBACK
def _silent(level: int, text: bytes, user: int) -> None:
    """ggml prints a line per repacked tensor; the engine reports through exceptions instead."""


class Ggml:
    """The library's functions as attributes, without the `ggml_` prefix."""

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        for library, table in ((base, _BASE), (cpu, _CPU)):
            for name, (result, arguments) in table.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.silence()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"ggml_{name} is not bound; add it to the table in _ggml.py")

    def silence(self) -> None:
        """Drop ggml's log. Importing llama_cpp sets its own; call again after that."""
        self.log_set(_silent, None)


class Ops:
    """Graph operations of one context: `ops.mul_mat(w, x)` is `ggml_mul_mat(context, w, x)`."""

    def __init__(self, lib: Ggml, context: int) -> None:
        self._lib, self._context = lib, context

    def __getattr__(self, name: str) -> Callable[..., Any]:
        bound = functools.partial(getattr(self._lib, name), self._context)
        setattr(self, name, bound)
        return bound


@functools.cache
def load() -> Ggml:
    """The bound libraries, after checking that they are the version this binding was written for."""
    try:
        base, cpu = open_library("ggml-base"), open_library("ggml-cpu")
        base.ggml_version.restype = c_char_p
        version = base.ggml_version().decode()
    except (OSError, AttributeError) as exc:
        raise EngineError(f"ggml's libraries do not load: {exc}") from exc
    if version != GGML_VERSION:
        raise EngineError(
            f"expected ggml {GGML_VERSION} (llama-cpp-python {LLAMA_CPP_VERSION}), found {version}",
            remedy=f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}",
        )
    return Ggml(base, cpu)


def new_context(lib: Ggml, tensors: int, graphs: int = 0, graph_nodes: int = 0) -> int:
    """A context with room for descriptions only; data is allocated in buffers."""
    size = lib.tensor_overhead() * (tensors + 8)
    size += graphs * (lib.graph_overhead_custom(max(graph_nodes, 16), False) + 64)
    context = lib.init(InitParams(size, None, True))
    if not context:
        raise EngineError("out of memory for a ggml context")
    return int(context)


def row_bytes(lib: Ggml, kind: int, count: int) -> int:
    """Bytes of `count` elements of a row, which must be whole blocks of `kind`."""
    assert count % lib.blck_size(kind) == 0
    return int(lib.row_size(kind, count))


def cpu_device(lib: Ggml) -> int:
    return int(lib.backend_reg_dev_get(lib.backend_cpu_reg(), 0))


def extra_buffer_types(lib: Ggml) -> list[int]:
    """Buffer types that rearrange weights for faster kernels (CPU_REPACK, AMX), in ggml's order."""
    address = lib.backend_reg_get_proc_address(lib.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    found = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)(cpu_device(lib))
    types: list[int] = []
    while found and found[len(types)]:
        types.append(int(found[len(types)]))
    return types


def array(lib: Ggml, tensor: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The tensor's host memory as an array, uncopied. `shape` in numpy's order."""
    count = int(np.prod(shape))
    nbytes = count * np.dtype(dtype).itemsize
    assert nbytes <= lib.nbytes(tensor)
    memory = (ctypes.c_char * nbytes).from_address(lib.get_data(tensor))
    return np.frombuffer(memory, dtype=dtype, count=count).reshape(shape)
