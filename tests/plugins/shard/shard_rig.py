"""What the shard tests share: plans, an in-memory Channel, engines on threads, and llama.cpp itself."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llama_cpp
import msgpack
import msgspec
import numpy as np
from edged_plugins._gguf import ggml_type
from edged_plugins._tokenizer import silence
from edged_plugins.shard._describe import describe
from edged_plugins.shard._engine import ShardEngine, load

from edged import EngineSpec, ModelDescription, PeerError, ProtocolError, Role, Sampling, Step

GREEDY = Sampling(temperature=0)
CONTEXT = 1024
CACHE = 16 * CONTEXT
Shares = tuple[int, ...]  # of one stage: (2, 1) is two ranks, the first with twice the second's part


def describe_model(path: str) -> ModelDescription:
    return msgspec.convert(describe(path), ModelDescription)


def plan(model: ModelDescription, stages: Sequence[Shares]) -> tuple[Role, ...]:
    """Roles of stages with about equally many layers, each cut by its shares."""
    edges = [round(i * model.layers / len(stages)) for i in range(len(stages) + 1)]
    roles: list[Role] = []
    for stage, shares in enumerate(stages):
        is_last = stage == len(stages) - 1
        vocab = _cut(model.vocab, model.vocab_unit, shares) if is_last else [(0, 0)] * len(shares)
        heads, ffn = _cut(model.heads, model.head_unit, shares), _cut(model.ffn, model.ffn_unit, shares)
        for i, share in enumerate(shares):
            layers = (edges[stage], edges[stage + 1])
            part = share / sum(shares)
            roles.append(Role(len(roles), "self", stage, layers, heads[i], ffn[i], vocab[i], part))
    return tuple(roles)


def _cut(total: int, unit: int, shares: Shares) -> list[tuple[int, int]]:
    sums = [sum(shares[:i]) for i in range(len(shares) + 1)]
    edges = [round(s / sums[-1] * total / unit) * unit for s in sums]
    edges[-1] = total
    return [(edges[i], edges[i + 1]) for i in range(len(shares))]


def specs_of(
    path: str,
    stages: Sequence[Shares],
    numerics: str = "fast",
    threads: int = 0,
    cache_type: str = "f16",
    **settings: Any,
) -> list[EngineSpec]:
    """A spec per rank; by default a lone rank gets two threads, others one."""
    model = describe_model(path)
    roles = plan(model, stages)
    threads = threads or (2 if len(roles) == 1 else 1)
    return [
        EngineSpec(
            path,
            model,
            roles,
            rank,
            CONTEXT,
            numerics,
            threads,
            settings,
            cache_tokens=CACHE,
            cache_type=cache_type,
        )
        for rank in range(len(roles))
    ]


class LlamaCpp:
    """llama-cpp-python, by default with flash attention: the oracle."""

    def __init__(self, path: str, cache_type: str = "f16", flash: bool = True) -> None:
        silence()
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = CONTEXT
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.type_k = parameters.type_v = ggml_type(cache_type)
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def reset(self, threads: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Run `tokens` after what ran before; the last one's logits."""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(tokens))) == 0
        found = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.vocab,)).copy()

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def oracle_run(
    llama: LlamaCpp, prompt: Sequence[int], count: int, threads: int = 2
) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of llama.cpp and the logits each was drawn from.

    From 512 cache rows on its flash attention splits a token's rows between threads, and so sums
    in another order: compare equal numbers of threads there.
    """
    llama.reset(threads)
    tokens, seen, batch = [], [], list(prompt)
    for _ in range(count):
        seen.append(llama.logits(batch))
        batch = [int(seen[-1].argmax())]
        tokens += batch
    return tokens, seen


def logits_run(
    engine: ShardEngine, prompt: Sequence[int], following: Sequence[int], sequence: int = 0
) -> list[np.ndarray]:
    """Logits after the prompt and after each of `following` but the last."""
    seen, at = [], 0
    for batch in [list(prompt), *([t] for t in following[:-1])]:
        seen.append(engine.logits(Step(sequence, batch, at, None)))
        at += len(batch)
    engine.release(sequence)
    return seen


def greedy_run(engine: ShardEngine, prompt: Sequence[int], count: int, sequence: int = 0) -> list[int]:
    """Greedy tokens, drawn as a job draws them."""
    tokens: list[int] = []
    batch, at = list(prompt), 0
    for _ in range(count):
        (token,) = engine.step([Step(sequence, batch, at, GREEDY)])
        at, batch = at + len(batch), [token]
        tokens.append(token)
    engine.release(sequence)
    return tokens


class MemoryChannel:
    """One rank's end. Headers go through msgpack and frames are copied, as on a real wire."""

    def __init__(self, rank: int, queues: dict[tuple[int, int], queue.Queue[Any]], size: int) -> None:
        self.rank, self.size, self.bytes_sent = rank, size, 0
        self._queues = queues
        self._waiting: dict[int, Any] = {}

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        copies = [bytes(memoryview(f).cast("B")) for f in frames]
        self.bytes_sent += sum(map(len, copies))
        self._queues[self.rank, to].put((msgpack.packb(header), copies))

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        if not self.poll(source, timeout_s):
            raise PeerError(f"nothing came from rank {source}")
        header, frames = self._waiting.pop(source)
        return msgpack.unpackb(header), [memoryview(f) for f in frames]

    def poll(self, source: int, timeout_s: float) -> bool:
        if source not in self._waiting:
            try:
                self._waiting[source] = self._queues[source, self.rank].get(timeout=max(timeout_s, 1e-4))
            except queue.Empty:
                return False
        return True

    def exchange(self, ranks: Sequence[int], frame: Any, timeout_s: float) -> list[memoryview]:
        size = memoryview(frame).nbytes
        return self.move([(rank, frame) for rank in ranks], [(rank, size) for rank in ranks], timeout_s)

    def move(
        self, sends: Sequence[tuple[int, Any]], takes: Sequence[tuple[int, int]], timeout_s: float
    ) -> list[memoryview]:
        for rank, frame in sends:
            self.send(rank, {"k": "frame"}, [frame])
        found = []
        for rank, size in takes:
            header, frames = self.receive(rank, timeout_s)
            if header != {"k": "frame"} or [frame.nbytes for frame in frames] != [size]:
                raise ProtocolError(f"expected a frame of {size} bytes of rank {rank}")
            found += frames
        return found


def connect(size: int) -> list[MemoryChannel]:
    queues = {(a, b): queue.Queue() for a in range(size) for b in range(size) if a != b}
    return [MemoryChannel(rank, queues, size) for rank in range(size)]


@contextlib.contextmanager
def loaded(specs: Sequence[EngineSpec]) -> Iterator[list[ShardEngine]]:
    """Engines of a plan, over one channel, loaded at once: ranks of a group settle how to sum."""
    channels = connect(len(specs))
    engines: list[ShardEngine] = []
    try:
        with ThreadPoolExecutor(len(specs)) as threads:
            loading = [threads.submit(load, *pair) for pair in zip(specs, channels, strict=True)]
        engines += [future.result() for future in loading if future.exception() is None]
        for future in loading:
            future.result()
        yield engines
    finally:
        for engine in engines:
            engine.close()


@contextlib.contextmanager
def running(specs: Sequence[EngineSpec]) -> Iterator[list[ShardEngine]]:
    """Engines of a plan, rank 0 for the caller to drive, the others following on threads."""
    with loaded(specs) as engines, following(engines):
        yield engines


@contextlib.contextmanager
def following(engines: Sequence[ShardEngine]) -> Iterator[None]:
    """All but rank 0 follow, each on a thread."""
    ended, errors = threading.Event(), []

    def follow(engine: ShardEngine) -> None:
        try:
            while not ended.is_set():
                engine.follow(0.05)
        except Exception as exc:  # reported to the test below
            errors.append(exc)

    threads = [threading.Thread(target=follow, args=(e,), daemon=True) for e in engines[1:]]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
    assert not errors, errors


def greedy_together(engine: ShardEngine, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens of all prompts, a sequence each, run side by side: stages overlap on them."""
    tokens: list[list[int]] = [[] for _ in prompts]
    batches, at = [list(p) for p in prompts], [0] * len(prompts)
    for _ in range(count):
        found = engine.step([Step(i, b, at[i], GREEDY) for i, b in enumerate(batches)])
        at = [a + len(b) for a, b in zip(at, batches, strict=True)]
        batches = [[token] for token in found]
        for seen, token in zip(tokens, found, strict=True):
            seen.append(token)
    for sequence in range(len(prompts)):
        engine.release(sequence)
    return tokens
