"""edged's shard engine behind the pipe, called as a worker calls it: load, step, release."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np
from _peer import CONTEXT, Turns
from edged_plugins.shard._check import Alone
from edged_plugins.shard._describe import describe
from edged_plugins.shard._engine import ShardEngine, load

from edged import EngineSpec, ModelDescription, Role, Sampling, Step

GREEDY = Sampling(temperature=0)


class Ours(Turns):
    """See `_peer.Turns`."""

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

    def _step(self, numbers: Sequence[int], position: int, count: int) -> float:
        assert self._engine is not None
        steps = [Step(number, self._tokens(count), position, GREEDY) for number in numbers]
        started = time.perf_counter()
        self._engine.step(steps)
        return (time.perf_counter() - started) * 1000

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._vocab, count)]

    def _clear(self, sequences: int) -> None:
        assert self._engine is not None
        for number in range(sequences):
            self._engine.release(number)
