"""What a download is on its way: the values that travel, once for all members that get the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from edged import Download, Factors

from ._rank import THIN_DOWN, Arrays

Pair = tuple[np.ndarray, np.ndarray]


class Packed(NamedTuple):
    """`start`: the factors that are those of the start, or "none"; `stack`: the rank of what is merged, whose
    values come first; `mask`: where the values are sent that are not 0, and which those are, else None."""

    start: str
    stack: int
    values: np.ndarray
    mask: np.ndarray | None


class Packing:
    """`start`: the job's, at the largest r; `flat(factors, sides)`: their values in the order of the layers.

    Members that share a download's factors and stack, the very dicts, share what is made of them.
    """

    def __init__(self, start: Arrays, flat: Callable[[Mapping[str, Pair], str], np.ndarray]) -> None:
        self._start, self._flat = start, flat
        self.forget()

    def forget(self) -> None:
        """At the end of a round's downloads: their copies are as large as a stack."""
        self._last: tuple[Factors, Factors, int, bool, Packed] | None = None
        self._stack: tuple[Factors, int, np.ndarray] | None = None

    def whole(self, download: Download, r: int) -> Packed:
        """For a member of that r which trains."""
        is_thin = any(word in download.extras for word in THIN_DOWN)
        if self._last is not None:
            factors, merged, *same, packed = self._last
            is_merged = merged is download.merged or not (merged or download.merged)
            if factors is download.factors and is_merged and same == [r, is_thin]:
                return packed
        packed = self._pack(download, r, is_thin)
        self._last = (download.factors, download.merged, r, is_thin, packed)
        return packed

    def merged(self, download: Download) -> tuple[int, np.ndarray]:
        """Rank and values of what is merged for good: all that a member needs which rests."""
        stack = max((a.shape[0] for a, _ in download.merged.values()), default=0)
        if not stack:
            return 0, np.zeros(0, "<f4")
        if self._stack is None or self._stack[0] is not download.merged:
            padded = {name: _padded(pair, stack) for name, pair in download.merged.items()}
            self._stack = (download.merged, stack, self._flat(padded, "AB"))
        return self._stack[1:]

    def _pack(self, download: Download, r: int, is_thin: bool) -> Packed:
        same = {
            letter
            for side, letter in enumerate("AB")
            if not is_thin
            and all(
                np.array_equal(pair[side], _first(self._start[name], r)[side])
                for name, pair in download.factors.items()
            )
        }
        start = "".join(sorted(same)) if download.factors else "none"
        stack, merged = self.merged(download)
        own = self._flat(download.factors, "".join(side for side in "AB" if side not in same))
        values = np.concatenate([merged, own]) if stack else own
        if not is_thin:
            return Packed(start, stack, values, None)
        mask = values != 0
        return Packed(start, stack, values[mask], mask)


def _padded(pair: Pair, r: int) -> Pair:
    """The same product at a larger rank: all layers of a stack travel at one."""
    more = r - pair[0].shape[0]
    return np.pad(pair[0], ((0, more), (0, 0))), np.pad(pair[1], ((0, 0), (0, more)))


def _first(pair: Pair, r: int) -> Pair:
    return pair[0][:r], pair[1][:, :r]
