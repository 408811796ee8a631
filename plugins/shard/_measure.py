"""The micro-benchmark: how fast this device multiplies by weights of each type.

Decode is one token: a matrix times a vector, bound by memory, so before each run other bytes than the
weights pass through the caches, as the rest of a model does. Prefill is a batch: matrix times matrix,
bound by arithmetic. Weights are properly quantised (random bytes run up to 1.8 times slower) and placed
as the engine places them. All types together take under three seconds.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from gguf import GGMLQuantizationType

from edged import EngineError, EngineSpec, EngineSpeed, ModelDescription, Role, Sampling, Step

from . import Settings, _ggml
from ._check import Alone
from ._describe import describe
from ._engine import ShardEngine, load
from ._random import Shape, write_model
from ._weights import takes_weight

WEIGHT_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16", "F32")
WIDTH, ROWS = 2048, 1024
DECODED_BYTES = 48 << 20  # of weights in one run
EVICTED_BYTES = 192 << 20  # that pass through the caches between two runs, or a quarter of the free memory
DECODE_RUNS = 5
BATCH = 64
FIXED_SHAPE = Shape(hidden=64, heads=2, kv_heads=2, ffn=64, vocab=64, context_tokens=256)
FIXED_LAYERS, FIXED_TOKENS = (2, 12), 40
ATTENDING_SHAPE = Shape(hidden=512, heads=8, kv_heads=2, ffn=64, vocab=64, layers=2, context_tokens=1024)
ATTENDED, ATTENDING_TOKENS = 960, 8  # positions before a token that attends to many
GREEDY = Sampling(temperature=0)
PART_S = 0.08  # measuring time of prefill; placing the weights takes about as long


def measure(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An EngineSpeed, as a map, for each of WEIGHT_TYPES."""
    threads = Settings.read(settings).threads or _cores()
    lib = _ggml.load()
    backend = lib.backend_cpu_init()
    lib.backend_cpu_set_n_threads(backend, threads)
    weights = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)
    others = np.ones(min(EVICTED_BYTES, _memory_free() // 4) // 8)
    try:
        speeds = [_measure_type(lib, backend, name, weights, others) for name in WEIGHT_TYPES]
    finally:
        lib.backend_free(backend)
    layer_s, token_s = fixed_costs(settings, threads)
    beside = {"layer_s": layer_s, "token_s": token_s, "attend_s": attending_s(settings, threads)}
    return [dataclasses.asdict(dataclasses.replace(speed, **beside)) for speed in speeds]


def fixed_costs(settings: Mapping[str, Any], threads: int) -> tuple[float, float]:
    """Seconds that a layer, and a token beside its layers, take for any size of weights.

    From two models that have next to no weights, of few and of many layers: their difference is that of
    the layers. The least times count, or what else the machine does would be part of them.
    """
    times = {}
    with tempfile.TemporaryDirectory(prefix="edged-measure-") as folder:
        for layers in FIXED_LAYERS:
            path = os.path.join(folder, f"{layers}.gguf")
            write_model(path, dataclasses.replace(FIXED_SHAPE, layers=layers), "Q8_0")
            times[layers] = _token_s(path, settings, threads)
    few, many = FIXED_LAYERS
    layer_s = max(0.0, (times[many] - times[few]) / (many - few))
    return layer_s, max(0.0, times[few] - few * layer_s)


def _token_s(path: str, settings: Mapping[str, Any], threads: int) -> float:
    engine = _alone(path, settings, threads, FIXED_SHAPE.context_tokens)
    try:
        return _least_s(engine, 0, FIXED_TOKENS)
    finally:
        engine.close()


def attending_s(settings: Mapping[str, Any], threads: int) -> float:
    """Seconds that a token takes for each position before it, of each element of its queries in a layer.

    From one model of next to no weights: tokens late in a sequence against tokens at its beginning. Reading
    the keys and values is the least of it: their products take several times as long.
    """
    shape = ATTENDING_SHAPE
    with tempfile.TemporaryDirectory(prefix="edged-measure-") as folder:
        path = os.path.join(folder, "attending.gguf")
        write_model(path, shape, "Q8_0")
        engine = _alone(path, settings, threads, shape.context_tokens)
        try:
            early = _least_s(engine, 0, ATTENDING_TOKENS)
            engine.step([Step(0, [1] * (ATTENDED - ATTENDING_TOKENS), ATTENDING_TOKENS, GREEDY)])
            late = _least_s(engine, ATTENDED, ATTENDING_TOKENS)
        finally:
            engine.close()
    return max(0.0, (late - early) / (ATTENDED * shape.layers * shape.hidden))


def _alone(path: str, settings: Mapping[str, Any], threads: int, context_tokens: int) -> ShardEngine:
    """An engine with the whole of a model."""
    model = msgspec.convert(describe(path), ModelDescription)
    whole = ((0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab))
    role = Role(0, "self", 0, *whole, share=1.0)
    spec = EngineSpec(path, model, (role,), 0, context_tokens, threads=threads, settings=settings)
    return load(spec, Alone())


def _least_s(engine: ShardEngine, start: int, count: int) -> float:
    """The least time of so many tokens from a position on."""
    times = []
    for position in range(start, start + count):
        began = time.perf_counter()
        engine.step([Step(0, [1], position, GREEDY)])
        times.append(time.perf_counter() - began)
    return min(times)


def _measure_type(
    lib: _ggml.Ggml, backend: int, name: str, weights: np.ndarray, others: np.ndarray
) -> EngineSpeed:
    """`others`: what passes through the caches before weights are read again."""
    matrices = Matrices(lib, int(GGMLQuantizationType[name]), weights)
    try:
        decode_s = _decode_s(matrices.graph(1), lib, backend, others)
        prefill_s = _prefill_s(matrices.graph(BATCH, count=1), lib, backend)
    finally:
        matrices.close()
    flops = 2.0 * WIDTH * ROWS * BATCH
    return EngineSpeed("shard", name, matrices.bytes / decode_s, flops / prefill_s)


def _decode_s(graph: int, lib: _ggml.Ggml, backend: int, others: np.ndarray) -> float:
    """Median seconds of a run that finds nothing of its weights in the caches, after one that warms up."""
    times = []
    for _ in range(DECODE_RUNS + 1):
        others.max()
        times.append(_run_s(graph, lib, backend))
    return float(np.median(times[1:]))


def _prefill_s(graph: int, lib: _ggml.Ggml, backend: int) -> float:
    """Median seconds of one run over PART_S, at least three, after one that warms up."""
    _run_s(graph, lib, backend)
    return float(np.median(_repeat(lambda: _run_s(graph, lib, backend))))


def _run_s(graph: int, lib: _ggml.Ggml, backend: int) -> float:
    start = time.perf_counter()
    if lib.backend_graph_compute(backend, graph):
        raise EngineError("ggml could not compute the micro-benchmark")
    return time.perf_counter() - start


def _repeat(run: Callable[[], float]) -> list[float]:
    times: list[float] = []
    while sum(times) < PART_S or len(times) < 3:
        times.append(run())
    return times


class Matrices:
    """Equal matrices of one type, together DECODED_BYTES, and graphs that multiply by them."""

    def __init__(self, lib: _ggml.Ggml, kind: int, weights: np.ndarray) -> None:
        self._lib = lib
        packed = quantise(lib, kind, weights)
        self._count = max(2, DECODED_BYTES // packed.nbytes)
        context = _ggml.new_context(lib, self._count)
        self._contexts, self._buffers, self._allocators = [context], list[int](), list[int]()
        self._tensors = [lib.new_tensor_2d(context, kind, WIDTH, ROWS) for _ in range(self._count)]
        extra = [b for b in _ggml.extra_buffer_types(lib) if takes_weight(lib, b, kind, (WIDTH, ROWS))]
        place = extra[0] if extra else lib.backend_cpu_buffer_type()
        lib.backend_buffer_set_usage(self._allocate(context, place), _ggml.USAGE_WEIGHTS)
        for tensor in self._tensors:
            lib.backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)
        self.bytes = self._count * packed.nbytes

    def graph(self, batch: int, count: int | None = None) -> int:
        """A graph that multiplies `batch` vectors by the first `count` matrices, by all without it."""
        lib, tensors = self._lib, self._tensors[:count]
        inputs = _ggml.new_context(lib, 1)
        context = _ggml.new_context(lib, len(tensors), 1, len(tensors) * 4)
        self._contexts += [inputs, context]
        x = lib.new_tensor_2d(inputs, _ggml.F32, WIDTH, batch)
        self._allocate(inputs, lib.backend_cpu_buffer_type())
        _ggml.array(lib, x, np.float32, (batch, WIDTH))[:] = np.random.default_rng(1).standard_normal(WIDTH)
        graph: int = lib.new_graph_custom(context, len(tensors) * 4, False)
        for tensor in tensors:
            lib.build_forward_expand(graph, lib.mul_mat(context, tensor, x))
        allocator = lib.gallocr_new(lib.backend_cpu_buffer_type())
        self._allocators.append(allocator)
        if not lib.gallocr_alloc_graph(allocator, graph):
            raise EngineError("out of memory for the micro-benchmark")
        return graph

    def close(self) -> None:
        for allocator in self._allocators:
            self._lib.gallocr_free(allocator)
        for buffer in self._buffers:
            self._lib.backend_buffer_free(buffer)
        for context in self._contexts:
            self._lib.free(context)

    def _allocate(self, context: int, place: int) -> int:
        buffer: int = self._lib.backend_alloc_ctx_tensors_from_buft(context, place)
        if not buffer:
            raise EngineError("out of memory for the micro-benchmark")
        self._buffers.append(buffer)
        return buffer


def quantise(lib: _ggml.Ggml, kind: int, weights: np.ndarray) -> np.ndarray:
    """(rows, width) float32 as the bytes of `kind`."""
    rows, width = weights.shape
    if kind == _ggml.F32:
        return np.ascontiguousarray(weights).view(np.uint8)
    if kind == _ggml.F16:
        return weights.astype(np.float16).view(np.uint8)
    size = rows * width // lib.blck_size(kind) * lib.type_size(kind)
    packed = np.empty(size, np.uint8)
    # a slab of rows, repeated: quantising takes longer than measuring
    slab = min(rows, 64)
    written = lib.quantize_chunk(kind, weights.ctypes.data, packed.ctypes.data, 0, slab, width, None)
    assert written * rows == size * slab
    packed.reshape(rows // slab, -1)[1:] = packed[:written]
    return packed


def _memory_free() -> int:
    """Bytes; a small figure where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return EVICTED_BYTES


def _cores() -> int:
    count = getattr(os, "sched_getaffinity", None)
    return len(count(0)) if count else os.cpu_count() or 1
