"""How a plan of several stages divides work so that no stage waits: by measured times of one layer.

A pipeline of S stages that works on g batches of n/g sequences gives each sequence a token every
max(g, S) * t(n/g), t being a stage's time for a batch. Which g is best depends on t alone, and t is
no straight line: two rows often cost as much as four. So it is measured, on this rank's first layer,
when the plan is loaded; the other stages got their layers in proportion to their speeds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from ._cache import BUCKET, Cache
from ._graph import Graph
from ._layers import Shard, Span
from ._messages import BATCH_TOKENS, BLOCK

DECODE_ROWS = (1, 2, 4, 8, 16, 32)
PROMPT_ROWS = (BLOCK, 2 * BLOCK, 4 * BLOCK)
REPEATS = 5  # of a decoding batch, of which the shortest counts, since nothing else ran then; a prompt's
# takes long enough to be measured once

Times = Mapping[int, float]  # rows of a batch -> seconds, ascending


def lanes(sequences: int, stages: int, times: Times) -> int:
    """Into how many batches to divide `sequences` that decode, of which none may wait for another."""
    if stages < 2:
        return 1
    choices = range(1, max(1, sequences) + 1)
    return min(choices, key=lambda g: (max(g, stages) * time_of(-(-sequences // g), times), g))


def batch_tokens(tokens: int, stages: int, times: Times) -> int:
    """How many rows of a prompt of `tokens` to run at once."""
    if stages < 2:
        return BATCH_TOKENS
    choices = [rows for rows in times if rows >= BLOCK]
    return min(choices, key=lambda rows: (-(-tokens // rows) + stages - 1) * times[rows])


def time_of(rows: int, times: Times) -> float:
    """Seconds for `rows`, between measured points by a straight line, beyond the last in proportion."""
    points = list(times)
    if rows >= points[-1]:
        return times[points[-1]] * rows / points[-1]
    return float(np.interp(rows, points, list(times.values())))


def measure(shard: Shard, cache: Cache) -> dict[int, float]:
    """Seconds that one layer of `shard` takes for batches of DECODE_ROWS and PROMPT_ROWS; `cache` is
    written to, and must hold no sequence yet."""
    times = {}
    for rows in DECODE_ROWS:
        slots = [Span(i % cache.slots, 1, BUCKET, False) for i in range(rows)]
        times[rows] = _time(shard, cache, tuple(slots))
    for rows in PROMPT_ROWS:
        if rows <= cache.capacity:
            times[rows] = _time(shard, cache, (Span(0, rows, BUCKET, False),))
    return times


def _time(shard: Shard, cache: Cache, spans: tuple[Span, ...]) -> float:
    graph = Graph(shard, cache, spans, is_probe=True)
    try:
        given = np.zeros(graph.count, np.int32)
        if not shard.place.is_first:
            given = np.full((graph.count, shard.model.hidden), 0.1, np.float32)
        repeats = REPEATS if len(spans) == graph.count else 1
        return min(_seconds(graph, given, len(spans)) for _ in range(repeats))
    finally:
        graph.close()


def _seconds(graph: Graph, given: np.ndarray, spans: int) -> float:
    started = time.perf_counter()
    graph.run([0] * spans, given, lambda partial, hidden: None)
    return time.perf_counter() - started
