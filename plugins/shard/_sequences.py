"""The sequences a rank holds: which slot of the KV cache each has, and how far it is written."""

from __future__ import annotations

from dataclasses import dataclass

from edged import EngineError

from ._cache import Cache


@dataclass(slots=True)
class Sequence:
    slot: int
    length: int = 0


class Sequences:
    """At most `cache.slots` at once; the same calls in the same order on every rank."""

    def __init__(self, cache: Cache, context_tokens: int) -> None:
        self._cache, self._context = cache, context_tokens
        self._free = list(range(cache.slots))[::-1]
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
        if sequence not in self._held and not self._free:
            raise EngineError(f"{self._cache.slots} sequences are held already", remedy="run fewer at a time")

    def advance(self, sequence: int, position: int, count: int) -> int:
        """Note that `count` tokens run from `position`; the sequence's slot, a new one where it has none."""
        self.check(sequence, position, count)
        held = self._held.get(sequence)
        if held is None:
            held = self._held[sequence] = Sequence(self._free.pop())
        held.length = position + count
        return held.slot

    def fork(self, source: int, sequence: int, positions: int) -> None:
        """Begin `sequence` as a copy of the first `positions` of `source`."""
        held = self._held.get(source)
        if held is None or not 0 < positions <= held.length or sequence in self._held or not self._free:
            raise EngineError(f"expected a sequence {source} of {positions} positions and a free slot")
        made = self._held[sequence] = Sequence(self._free.pop(), positions)
        self._cache.copy(held.slot, made.slot, positions)

    def release(self, sequence: int) -> int | None:
        """The slot that is free now, if the sequence had one."""
        held = self._held.pop(sequence, None)
        if held is None:
            return None
        self._cache.clear(held.slot)
        self._free.append(held.slot)
        return held.slot

    def close(self) -> None:
        self._held.clear()
        self._cache.close()
