"""Rank 0's book of the KV cache: who may come in, and whose prompt has been computed before.

Memory is planned as a number of positions for all sequences together. A sequence that begins
reserves as many as it may grow to; where they are not there, it waits. One that is over keeps its
rows until somebody needs them: a new prompt with the same beginning starts from a copy of these.

Only rows that a prompt's batches wrote are shared, in whole blocks of BLOCK, and so that at least a
block is left to compute: then the batches of the rest are those of a prompt computed whole, and the
logits are bit-equal to it (measured: batches of 64 rows and more give each row the same numbers;
smaller ones, and single tokens, round differently).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ._messages import BLOCK

NOBODY = -1


@dataclass(slots=True)
class Held:
    """What a sequence has in the cache. `positions`: reserved; `prefilled`: rows that can be shared;
    `adapter`: that wrote them."""

    positions: int
    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0
    is_over: bool = False
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class Opening:
    """What has to happen, in this order, for a sequence to begin with `shared` positions of `source`."""

    evicted: tuple[int, ...]
    source: int
    shared: int
    evict_source: bool


class Admission:
    def __init__(self, positions_max: int, sequences_max: int) -> None:
        self._positions_max, self._sequences_max = positions_max, sequences_max
        self._held: dict[int, Held] = {}  # those that are over in the order in which they ended

    def open(self, sequence: int, prompt: Sequence[int], positions: int, adapter: int = 0) -> Opening | None:
        """Admit `sequence`, which will hold at most `positions`; None while it has to wait. What an
        earlier sequence of the same number left is forgotten. Rows of another adapter are not shared."""
        running = [held for held in self._held.values() if not held.is_over]
        room = self._positions_max - sum(held.positions for held in running)
        if positions > room or len(running) >= self._sequences_max:
            return None
        evicted = [sequence] if self._held.pop(sequence, None) else []
        source, shared = self._longest_prefix(prompt, adapter)
        evicted += self._evict(positions, keep=source)
        evict_source = shared > 0 and self._is_short_of(positions) and self._held[source].is_over
        if evict_source:
            del self._held[source]
        self._held[sequence] = Held(positions, list(prompt[:shared]), shared, adapter=adapter)
        return Opening(tuple(evicted), source, shared, evict_source)

    def has(self, sequence: int) -> bool:
        return sequence in self._held and not self._held[sequence].is_over

    def note(self, sequence: int, position: int, tokens: Sequence[int]) -> None:
        """`tokens` of an open sequence run from `position`, in one step."""
        held = self._held[sequence]
        del held.tokens[position:]
        held.tokens += tokens
        held.prefilled = min(held.prefilled, position // BLOCK * BLOCK)
        if len(tokens) >= BLOCK and held.prefilled == position:
            held.prefilled = len(held.tokens) // BLOCK * BLOCK

    def finish(self, sequence: int) -> bool:
        """The sequence is over; False when nothing of it is worth keeping."""
        held = self._held.pop(sequence, None)
        if held is None or not held.prefilled:
            return False
        held.is_over, held.positions = True, len(held.tokens)
        self._held[sequence] = held
        return True

    def remove(self, sequence: int) -> None:
        """Keep nothing of it."""
        self._held.pop(sequence, None)

    def forget(self, adapter: int) -> list[int]:
        """Forget the sequences that are over and had this adapter; which they were."""
        gone = [s for s, held in self._held.items() if held.is_over and held.adapter == adapter]
        for sequence in gone:
            del self._held[sequence]
        return gone

    def _longest_prefix(self, prompt: Sequence[int], adapter: int) -> tuple[int, int]:
        """The sequence with most to share, and how many positions; (NOBODY, 0) where there is none."""
        most = (len(prompt) // BLOCK - 1) * BLOCK
        best = (NOBODY, 0)
        for sequence, held in self._held.items():
            if held.adapter != adapter:
                continue
            shared = min(_common(prompt, held.tokens) // BLOCK * BLOCK, held.prefilled, most)
            if shared > best[1]:
                best = (sequence, shared)
        return best

    def _evict(self, positions: int, keep: int) -> list[int]:
        """Forget sequences that are over, the oldest first, until there is room."""
        evicted = []
        for sequence in [s for s, held in self._held.items() if held.is_over and s != keep]:
            if not self._is_short_of(positions):
                break
            del self._held[sequence]
            evicted.append(sequence)
        return evicted

    def _is_short_of(self, positions: int) -> bool:
        taken = sum(held.positions for held in self._held.values())
        return taken + positions > self._positions_max or len(self._held) >= self._sequences_max


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items are the same."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
