"""edged's shard engine behind the pipe, called as a worker calls it: load, step, release."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from _peer import CONTEXT
from edged_plugins.shard._describe import describe
from edged_plugins.shard._engine import ShardEngine, load

from edged import EngineSpec, ModelDescription, PeerError, Role, Sampling, Step

GREEDY = Sampling(temperature=0)


class Alone:
    """The channel of a rank that has no other."""

    rank, size, bytes_sent = 0, 1, 0

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        raise PeerError(f"there is no rank {to}")

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        raise PeerError(f"there is no rank {source}")

    def poll(self, source: int, timeout_s: float) -> bool:
        return False


class Ours:
    """See `_peer.Runner`."""

    def __init__(self) -> None:
        self._engine: ShardEngine | None = None
        self._random = np.random.default_rng(0)
        self._vocab = 0

    def load(self, path: str, threads: int, sequences: int) -> None:
        if self._engine is not None:
            self._engine.close()
        model = msgspec.convert(describe(path), ModelDescription)
        whole = Role(0, "self", 0, (0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab), 1.0)
        settings = {"sequences_max": sequences}
        spec = EngineSpec(
            path, model, (whole,), 0, CONTEXT, "fast", threads, settings, cache_tokens=CONTEXT * sequences
        )
        self._engine, self._vocab = load(spec, Alone()), model.vocab

    def prefill(self, count: int) -> float:
        spent = self._step([0], 0, count)
        self._release(1)
        return spent

    def decode(self, after: int, steps: int) -> list[float]:
        return self.batch(1, after, steps)

    def batch(self, sequences: int, after: int, steps: int) -> list[float]:
        numbers = range(sequences)
        for number in numbers:
            self._step([number], 0, after)
        spent = [self._step(numbers, after + position, 1) for position in range(steps + 1)]
        self._release(sequences)
        return spent[1:]

    def _step(self, numbers: Sequence[int], position: int, count: int) -> float:
        assert self._engine is not None
        steps = [Step(number, self._tokens(count), position, GREEDY) for number in numbers]
        started = time.perf_counter()
        self._engine.step(steps)
        return (time.perf_counter() - started) * 1000

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._vocab, count)]

    def _release(self, sequences: int) -> None:
        assert self._engine is not None
        for number in range(sequences):
            self._engine.release(number)
