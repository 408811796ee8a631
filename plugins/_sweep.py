"""The dynamic programme behind the placements: which stops, in which order, take which layers.

A stop is whatever can be one stage: a node, or nodes that work as a group. A path of stops covers the layers
in order, no node twice. The programme goes from paths of one stop to paths of two, and so on; paths with the
same nodes, the same first and the same last stop are one row, which keeps the least seconds for each number
of placed layers. That is exact, since what follows depends on nothing else. A row, or an entry of it, goes
where even the best continuation is no better than what is known: a bound that forgets which nodes are taken.
With a `width` only so many rows go on, the most promising: a beam, for more nodes than all sets of them.
Source of the exact state: EdgeShard's throughput programme (arXiv:2405.14371), kept for latency too.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

INFINITE = float("inf")
NEAR = 1e-12  # relative: what floats make of equal sums
BOUNDED_BY_FIRST = 16  # stops up to which the bound knows the way back
STEPS = 3  # of a beam for each of its states
Path = tuple[tuple[int, tuple[int, int]], ...]  # (stop, layers) in order
Join = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Stops:
    """`run`: (stops, from, to) seconds, infinite where it may not be. `hop`, `back`: (from stop, to stop)
    seconds. `bits`: the nodes of each stop, `partners`: those that may be in one path with it, both as bits.
    `spent`: (stops, layers + 1), where a run that may be costs `spent[to] - spent[from]`, and one that
    may be may be shorter; None where runs cost anything. `first`: the first stop, or None."""

    run: np.ndarray
    hop: np.ndarray
    back: np.ndarray
    bits: np.ndarray
    partners: np.ndarray
    spent: np.ndarray | None = None
    first: int | None = None

    @property
    def size(self) -> int:
        return len(self.run)

    @property
    def layers(self) -> int:
        return self.run.shape[1] - 1

    @functools.cached_property
    def windows(self) -> list[Window]:
        return [Window.of(run) for run in self.run]

    @functools.cached_property
    def rest(self) -> np.ndarray:
        """(first or 1, last, placed) seconds that at least follow, one more stop at least: with nodes that
        may come again."""
        return self._bounds[0]

    @functools.cached_property
    def through(self) -> np.ndarray:
        """(stop, placed) seconds that at least follow from the arrival at a stop."""
        return self._bounds[1]

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        apart = (self.bits[:, None] & self.bits) == 0
        allowed = apart & ((self.bits[None, :] & ~self.partners[:, None]) == 0)
        hop = np.where(allowed, self.hop, INFINITE)
        back = self.back.T if self.size <= BOUNDED_BY_FIRST else self.back.min(axis=1)[None]
        rest = np.full((len(back), self.size, self.layers + 1), INFINITE)
        through = np.full((self.size, self.layers + 1), INFINITE)
        onward = rest.copy()
        onward[:, :, self.layers] = back
        for placed in range(self.layers - 1, -1, -1):
            run = self.run[None, :, placed, placed + 1 :]
            whole = (run + onward[:, :, placed + 1 :]).min(axis=2)
            through[:, placed] = whole.min(axis=0)
            rest[:, :, placed] = (hop[None] + whole[:, None, :]).min(axis=2)
            onward[:, :, placed] = rest[:, :, placed]
        return rest, through


@dataclass(frozen=True)
class Window:
    """From where a run of a stop may begin, for each end: `[low, end)`. `level`: of the table of minima
    over 1, 2, 4, ... entries, two of which cover it. `is_open`: it may always begin at 0."""

    ends: np.ndarray
    low: np.ndarray
    level: np.ndarray
    is_open: bool

    @staticmethod
    def of(run: np.ndarray) -> Window:
        """Of a stop's (from, to) seconds; longer runs need more room, so what may be is a window."""
        may = np.isfinite(run)
        ends = np.flatnonzero(may.any(axis=0))
        low = may[:, ends].argmax(axis=0)
        level = np.log2(np.maximum(1, ends - low)).astype(int)
        is_open = len(ends) == len(run) - 1 and not low.any()
        return Window(ends, low, level, is_open)

    def least(self, values: np.ndarray) -> np.ndarray:
        """(rows, layers + 1) the least of each row's values in the window of each end."""
        found = np.full_like(values, INFINITE)
        if self.is_open:
            found[:, 1:] = np.minimum.accumulate(values, axis=1)[:, :-1]
            return found
        table = values
        for level in range(int(self.level.max(initial=-1)) + 1):
            at = self.level == level
            ends, low = self.ends[at], self.low[at]
            found[:, ends] = np.minimum(table[:, low], table[:, ends - (1 << level)])
            table = np.minimum(table[:, : -(1 << level)], table[:, 1 << level :])
        return found


@dataclass(frozen=True)
class Rows:
    """Paths of equally many stops. `nodes`: as bits; `seconds`: (rows, layers + 1). Ordered by nodes and
    first stop."""

    nodes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.nodes)

    def taken(self, which: np.ndarray) -> Rows:
        return Rows(self.nodes[which], self.first[which], self.last[which], self.seconds[which])

    def onward(self, stops: Stops) -> np.ndarray:
        """Seconds of the best path through each entry, at least."""
        first = self.first if len(stops.rest) > 1 else np.zeros_like(self.first)
        return np.asarray(self.seconds + stops.rest[first, self.last])


def shortest(
    stops: Stops,
    least: int = 1,
    *,
    join: Join = np.add,
    known: float = INFINITE,
    width: int | None = None,
    is_grouped: bool = False,
) -> tuple[float, Path] | None:
    """The best path of at least `least` stops, if it takes less than `known` seconds.

    `join`: how a hop or a run comes to a path: `np.add` for the seconds of a token, `np.maximum` for the
    slowest part of a full pipeline. `is_grouped`: some stop of the path must be of several nodes.
    """
    rows = _beginnings(stops)
    levels: list[Rows] = []
    found: tuple[int, int] | None = None  # number of stops, row
    while len(rows):
        stop_count = len(levels) + 1
        if stop_count >= least:
            closed = join(rows.seconds[:, -1], stops.back[rows.last, rows.first])
            if is_grouped:
                counts = np.array([int(nodes).bit_count() for nodes in rows.nodes])
                closed = np.where(counts > stop_count, closed, INFINITE)
            best = int(closed.argmin())
            if closed[best] < known * (1 - NEAR):
                known, found = float(closed[best]), (stop_count, best)
        levels.append(rows)
        rows = _narrowed(stops, rows, known, width, join)
        rows = _ordered([*_continued(stops, rows, known, width, join)])
    return None if found is None else (known, _walked_back(stops, levels, found, join))


def _beginnings(stops: Stops) -> Rows:
    first = np.arange(stops.size) if stops.first is None else np.array([stops.first])
    return _ordered([Rows(stops.bits[first], first, first, stops.run[first, 0])])


def _narrowed(stops: Stops, rows: Rows, known: float, width: int | None, join: Join) -> Rows:
    if join is not np.add:
        return rows
    reachable = rows.onward(stops).min(axis=1)
    kept = np.flatnonzero(reachable < known * (1 - NEAR))
    if width is not None and len(kept) > width:
        kept = np.sort(kept[np.argsort(reachable[kept], kind="stable")[:width]])
    return rows.taken(kept)


def _continued(stops: Stops, rows: Rows, known: float, width: int | None, join: Join) -> Iterator[Rows]:
    """Each path gone on to each stop that it may go on to, or to the most promising ones."""
    may = _steps(stops, rows, known, width, join)
    for stop in np.flatnonzero(may.any(axis=1)):
        came = rows.taken(np.flatnonzero(may[stop]))
        arriving = join(came.seconds, stops.hop[came.last, stop][:, None])
        is_new = np.ones(len(came), bool)
        is_new[1:] = (came.nodes[1:] != came.nodes[:-1]) | (came.first[1:] != came.first[:-1])
        starts = np.flatnonzero(is_new)
        arriving = np.minimum.reduceat(arriving, starts, axis=0)
        first, nodes = came.first[starts], came.nodes[starts] | stops.bits[stop]
        made = Rows(nodes, first, np.full(len(starts), stop), _run(stops, stop, arriving, join))
        if join is np.add:
            through = made.onward(stops)
            through[:, -1] = made.seconds[:, -1] + stops.back[stop, first]  # all layers are placed: it closes
            made.seconds[through >= known * (1 - NEAR)] = INFINITE
        yield made.taken(np.flatnonzero(np.isfinite(made.seconds).any(axis=1)))


def _steps(stops: Stops, rows: Rows, known: float, width: int | None, join: Join) -> np.ndarray:
    """(stops, rows) bool: which path is worth going on to which stop."""
    nodes = rows.nodes[None]
    may = ((nodes & stops.bits[:, None]) == 0) & ((nodes & ~stops.partners[:, None]) == 0)
    if join is not np.add or not len(rows):
        return may
    least = stops.hop[rows.last].T.copy()
    for stop in range(stops.size):
        least[stop] += (rows.seconds + stops.through[stop]).min(axis=1)
    least[~may] = INFINITE
    may = least < known * (1 - NEAR)
    if width is not None and may.sum() > STEPS * width:
        may &= least <= np.partition(least, STEPS * width, axis=None)[STEPS * width]
    return may


def _run(stops: Stops, stop: int, arriving: np.ndarray, join: Join) -> np.ndarray:
    """(rows, layers + 1) seconds with a run on this stop behind, from (rows, layers + 1) before it."""
    if stops.spent is not None and join is np.add:
        spent = stops.spent[stop]
        return stops.windows[stop].least(arriving - spent) + spent
    live = np.flatnonzero(np.isfinite(arriving).any(axis=0))
    if not len(live):
        return np.full_like(arriving, INFINITE)
    return np.asarray(join(arriving[:, live, None], stops.run[stop][None, live]).min(axis=1))


def _ordered(parts: Sequence[Rows]) -> Rows:
    if not parts:
        nobody = np.zeros(0, int)
        return Rows(np.zeros(0, np.uint64), nobody, nobody, np.zeros((0, 1)))
    whole = Rows(
        np.concatenate([part.nodes for part in parts]),
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.last for part in parts]),
        np.concatenate([part.seconds for part in parts]),
    )
    return whole.taken(np.lexsort((whole.first, whole.nodes)))


def _walked_back(stops: Stops, levels: Sequence[Rows], found: tuple[int, int], join: Join) -> Path:
    count, row = found
    path, end = [], stops.layers
    for level in range(count - 1, 0, -1):
        rows, before = levels[level], levels[level - 1]
        stop, first = int(rows.last[row]), rows.first[row]
        nodes = rows.nodes[row] & ~stops.bits[stop]
        came = np.flatnonzero((before.nodes == nodes) & (before.first == first))
        arriving = join(before.seconds[came], stops.hop[before.last[came], stop][:, None])
        total = join(arriving, stops.run[stop][None, :, end])
        which, start = np.unravel_index(int(total.argmin()), total.shape)
        path.append((stop, (int(start), end)))
        row, end = int(came[which]), int(start)
    path.append((int(levels[0].last[row]), (0, end)))
    return tuple(reversed(path))
