"""The adapters over one set of weights, by number, and which sequence runs with which.

Number 0 is what the engine was loaded with: one adapter, or none. Others come and go while it runs. A batch
has one adapter; rows of sequences with others wait for a batch of their own, so that each gets the numbers
that it gets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edged import EngineError

from ._adapter import Adapter

FIRST = 0
ADAPTERS_MAX = 64  # beside the first; a node's memory is used up before, and a coordinator keeps fewer


class Adapters:
    """`load` makes an adapter of a file; `sequences_max` bounds those that are remembered."""

    def __init__(self, first: Adapter | None, load: Callable[[str], Adapter], sequences_max: int) -> None:
        self._load, self._sequences_max = load, sequences_max
        self._found: dict[int, Adapter | None] = {FIRST: first}
        self._of: dict[int, int] = {}  # by sequence, where it is not the first

    def __contains__(self, number: int) -> bool:
        return number in self._found

    def __getitem__(self, number: int) -> Adapter | None:
        return self._found[number]

    @property
    def bytes(self) -> int:
        return sum(adapter.bytes for adapter in self._found.values() if adapter is not None)

    def add(self, number: int, path: str) -> None:
        """EngineError where the file is none that fits, or the number is taken."""
        if number in self._found:
            raise EngineError(f"expected another number for an adapter; {number} is taken")
        if len(self._found) > ADAPTERS_MAX:
            raise EngineError(f"expected at most {ADAPTERS_MAX} adapters over one model")
        self._found[number] = self._load(path)

    def assign(self, sequence: int, number: int) -> None:
        """`sequence` runs with it until it is released. EngineError where there is no such adapter."""
        if number not in self._found:
            raise EngineError(f"there is no adapter {number} here", remedy="run it again")
        if number == FIRST:
            return
        if sequence not in self._of and len(self._of) >= self._sequences_max:
            raise EngineError(f"{self._sequences_max} sequences have adapters already")
        self._of[sequence] = number

    def of(self, sequence: int) -> int:
        return self._of.get(sequence, FIRST)

    def release(self, sequence: int) -> None:
        self._of.pop(sequence, None)

    def idle(self, numbers: Iterable[int]) -> list[int]:
        """Those that no sequence runs with."""
        used = set(self._of.values())
        return [number for number in numbers if number not in used]

    def remove(self, number: int) -> None:
        """Give its memory back; no sequence runs with it."""
        adapter = self._found.pop(number)
        if adapter is not None:
            adapter.close()

    def close(self) -> None:
        for number in list(self._found):
            self.remove(number)
        self._of.clear()
