"""The sequences a rank holds: their KV caches, lengths, and the graphs built for them.

Bounded: `sequences_max` caches, and per sequence one graph for single tokens, one for batches.
"""

from __future__ import annotations

from edged import EngineError

from ._cache import BUCKET, Cache, round_up
from ._graph import Graph
from ._layers import Shard


class Sequence:
    """One KV cache, how many positions of it are written, and its latest graphs."""

    def __init__(self, shard: Shard, context_tokens: int) -> None:
        self._shard = shard
        layers = shard.place.layers[1] - shard.place.layers[0]
        row = shard.kv_heads * shard.model.head_dim
        self._cache = Cache(shard.lib, layers, row, context_tokens, shard.cache_type)
        self._graphs: dict[bool, Graph] = {}  # by "is a single token"
        self.length = 0

    def graph(self, position: int, count: int, keep: bool) -> Graph:
        """A graph for `count` tokens from `position`; the one of the step before where it fits."""
        kv_length = min(round_up(position + count, BUCKET), self._cache.capacity)
        keep = keep and self._shard.place.is_last
        held = self._graphs.get(count == 1)
        if held and (held.count, held.kv_length, held.keep) == (count, kv_length, keep):
            return held
        if held:
            del self._graphs[count == 1]
            held.close()
        graph = Graph(self._shard, self._cache, count, kv_length, keep)
        self._graphs[count == 1] = graph
        return graph

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._cache.close()


class Sequences:
    def __init__(self, shard: Shard, context_tokens: int, sequences_max: int) -> None:
        self._shard, self._context, self._max = shard, context_tokens, sequences_max
        self._held: dict[int, Sequence] = {}

    def check(self, sequence: int, position: int, count: int) -> None:
        """EngineError unless `count` tokens can run from `position` of `sequence`."""
        length = self._held[sequence].length if sequence in self._held else 0
        if count < 1 or not 0 <= position <= length:
            raise EngineError(
                f"sequence {sequence} holds {length} positions; {count} tokens cannot start at {position}"
            )
        if position + count > self._context:
            raise EngineError(
                f"sequence {sequence} would have {position + count} tokens; the context is {self._context}",
                remedy="shorten the prompt or ask for a larger context",
            )
        if sequence not in self._held and len(self._held) >= self._max:
            raise EngineError(f"{self._max} sequences are held already", remedy="run fewer jobs at a time")

    def get(self, sequence: int) -> Sequence:
        if sequence not in self._held:
            self._held[sequence] = Sequence(self._shard, self._context)
        return self._held[sequence]

    def release(self, sequence: int) -> None:
        held = self._held.pop(sequence, None)
        if held:
            held.close()

    def close(self) -> None:
        for sequence in list(self._held):
            self.release(sequence)
