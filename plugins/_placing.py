"""Where the layers go: exact and approximate placement of a chain of layers on devices.

One cost model for all: device d runs layer i in `compute[d][i]` seconds (infinity: never) and needs
`memory[d][i]` of its `room[d]` for it; a device that has any layer pays `base[d]` of its room. Going from
device a to b costs `hop[a][b]` seconds, and from the last device back to the first `back[a][b]`: the token
returns. Every device holds one run of consecutive layers.
Sources: EdgeShard (arXiv:2405.14371) for the recurrences; the exact one keeps the set of used devices, since
the published recurrence remembers one path for each device and so misses optima once memory binds.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

INFINITE = float("inf")
IMPROVED = 8  # greedy paths that are worth trying swaps on


@dataclass(frozen=True)
class Chain:
    """`compute`, `memory`: (devices, layers); `hop`, `back`: (devices, devices), the diagonal of `back` being
    what a device alone pays; `room`, `base`: (devices,). `first`: who must have the first layer, or None."""

    compute: np.ndarray
    memory: np.ndarray
    hop: np.ndarray
    back: np.ndarray
    room: np.ndarray
    base: np.ndarray
    first: int | None = None
    linked: np.ndarray | None = None  # (devices, devices) bool: who may be in one plan; None: everyone

    @property
    def devices(self) -> int:
        return len(self.compute)

    @property
    def layers(self) -> int:
        return self.compute.shape[1]

    @functools.cached_property
    def partners(self) -> list[int]:
        """For each device the set, as bits, of those that may be in a plan with it, and itself."""
        if self.linked is None:
            return [(1 << self.devices) - 1] * self.devices
        return [
            sum(1 << other for other in range(self.devices) if other == device or self.linked[device, other])
            for device in range(self.devices)
        ]

    @functools.cached_property
    def run_costs(self) -> np.ndarray:
        """(devices, from, to) seconds of a run, infinite where it is empty or does not fit."""
        edges = self.layers + 1
        spent = np.concatenate([np.zeros((self.devices, 1)), self.compute.cumsum(axis=1)], axis=1)
        needed = np.concatenate([np.zeros((self.devices, 1)), self.memory.cumsum(axis=1)], axis=1)
        cost = spent[:, None, :] - spent[:, :, None]
        memory = needed[:, None, :] - needed[:, :, None] + self.base[:, None, None]
        fits = memory <= self.room[:, None, None] * (1 + 1e-12)
        return np.where(fits & np.triu(np.ones((edges, edges), bool), 1), cost, INFINITE)

    @functools.cached_property
    def reach(self) -> np.ndarray:
        """(devices, from) the furthest end of a run from there; `from` itself where none fits."""
        ends = np.where(np.isfinite(self.run_costs), np.arange(self.layers + 1), 0).max(axis=2)
        return np.maximum(ends, np.arange(self.layers + 1))


@dataclass(frozen=True)
class Placement:
    """`runs`: (device, layers) in order. `seconds`: of one token."""

    runs: tuple[tuple[int, tuple[int, int]], ...]
    seconds: float

    @property
    def per_layer(self) -> list[int]:
        """The device of each layer."""
        return [device for device, (start, end) in self.runs for _ in range(start, end)]


def latency(chain: Chain, runs: Sequence[tuple[int, tuple[int, int]]]) -> float:
    """Seconds of one token through these runs and back to the first device."""
    total = sum(float(chain.compute[device, start:end].sum()) for device, (start, end) in runs)
    return total + sum(_links_of(chain, runs))


def bottleneck(chain: Chain, runs: Sequence[tuple[int, tuple[int, int]]]) -> float:
    """Seconds between tokens of a full pipeline: its slowest device or hop."""
    busy = [float(chain.compute[device, start:end].sum()) for device, (start, end) in runs]
    return max(busy + _links_of(chain, runs))


def _links_of(chain: Chain, runs: Sequence[tuple[int, tuple[int, int]]]) -> list[float]:
    """Seconds of each hop, and of the way back."""
    stops = [device for device, _ in runs]
    hops = [float(chain.hop[a, b]) for a, b in itertools.pairwise(stops)]
    return [*hops, float(chain.back[stops[-1], stops[0]])]


def fastest(chain: Chain, least: int = 1) -> Placement | None:
    """The exact optimum of `latency` over runs on at least `least` devices; None where memory holds none.

    Over states (used devices, last device) it keeps, for each first device and number of placed layers, the
    least time: O(2^M M^2 L^2) with M devices and L layers.
    """
    return _exact(chain, least, np.add)


def highest_throughput(chain: Chain, least: int = 1) -> Placement | None:
    """The exact optimum of `bottleneck`; `seconds` is the bottleneck."""
    return _exact(chain, least, np.maximum)


def _exact(chain: Chain, least: int, join: np.ufunc) -> Placement | None:
    size, layers = chain.devices, chain.layers
    run = chain.run_costs
    # (first, placed layers) -> seconds, by (set, last)
    best: dict[tuple[int, int], np.ndarray] = {}
    came: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for device in range(size):
        if chain.first is None or device == chain.first:
            table = np.full((size, layers + 1), INFINITE)
            table[device] = run[device][0]
            best[1 << device, device] = table
    found: tuple[float, int, int, int] | None = None
    for used in range(1, 1 << size):
        lasts = [device for device in range(size) if (used, device) in best]
        if not lasts:
            continue
        if used.bit_count() >= least:
            for last in lasts:
                closed = join(best[used, last][:, layers], chain.back[last])
                first = int(closed.argmin())
                if closed[first] < (INFINITE if found is None else found[0]):
                    found = (float(closed[first]), used, last, first)
        for device in range(size):
            if used >> device & 1 or used & ~chain.partners[device]:
                continue
            arriving = np.stack([join(best[used, last], chain.hop[last, device]) for last in lasts])
            via = arriving.argmin(axis=0)
            reached = np.take_along_axis(arriving, via[None], 0)[0]
            whole = join(reached[:, :, None], run[device][None])  # (first, from, to)
            start = whole.argmin(axis=1)
            best[used | 1 << device, device] = np.take_along_axis(whole, start[:, None], 1)[:, 0]
            came[used | 1 << device, device] = (start, np.array(lasts)[via])
    return None if found is None else _walk_back(found, came, layers)


def _walk_back(
    found: tuple[float, int, int, int],
    came: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
    layers: int,
) -> Placement:
    seconds, used, device, first = found
    runs, end = [], layers
    while device != first or used.bit_count() > 1:
        starts, lasts = came[used, device]
        start = int(starts[first, end])
        runs.append((device, (start, end)))
        used, device, end = used & ~(1 << device), int(lasts[first, start]), start
    runs.append((device, (0, end)))
    return Placement(tuple(reversed(runs)), seconds)


def by_recurrence(chain: Chain) -> Placement | None:
    """EdgeShard's recurrence over (layer, device): O(L M^2), for many devices; not always the optimum.

    A device may come up twice only where it is the last one, since the runs of one path are kept.
    """
    size = chain.devices
    # by last device: seconds, the device of each layer, bytes of its run so far, the devices as bits
    paths: dict[int, tuple[float, list[int], float, int]] = {}
    for device in range(size) if chain.first is None else (chain.first,):
        memory = float(chain.base[device] + chain.memory[device, 0])
        if memory <= chain.room[device] * (1 + 1e-12):
            paths[device] = (float(chain.compute[device, 0]), [device], memory, 1 << device)
    for layer in range(1, chain.layers):
        further: dict[int, tuple[float, list[int], float, int]] = {}
        for device in range(size):
            best: tuple[float, int, float] | None = None
            for last, (seconds, _, run, used) in paths.items():
                stays = last == device
                if not stays and (used >> device & 1 or used & ~chain.partners[device]):
                    continue
                memory = float(chain.memory[device, layer]) + (run if stays else float(chain.base[device]))
                if memory > chain.room[device] * (1 + 1e-12):
                    continue
                reached = seconds + (0.0 if stays else float(chain.hop[last, device]))
                if best is None or reached < best[0]:
                    best = (reached, last, memory)
            if best is not None:
                reached, last, memory = best
                path, used = [*paths[last][1], device], paths[last][3] | 1 << device
                further[device] = (reached + float(chain.compute[device, layer]), path, memory, used)
        paths = further
    ended = [
        (seconds + float(chain.back[last, path[0]]), path) for last, (seconds, path, _, _) in paths.items()
    ]
    if not ended:
        return None
    seconds, path = min(ended, key=lambda option: option[0])
    return Placement(runs_of(path), seconds)


def greedy(chain: Chain) -> Placement | None:
    """A shortest path by greedy steps, from the best start, with pairs swapped while that helps: O(M^3).

    After the idea of Ren, "Task Scheduling for Decentralized LLM Serving" (UCB/EECS-2024-111), whose text
    was not at hand: from each device on to the one that adds the least time for each layer it can hold.
    """
    starts = range(chain.devices) if chain.first is None else (chain.first,)
    found = [order for order in (_greedy_order(chain, start) for start in starts) if order]
    found.sort(key=lambda order: _filled_s(chain, order))
    improved = [_swapped(chain, order) for order in found[:IMPROVED]]
    return min(improved, key=lambda placement: placement.seconds, default=None)


def _greedy_order(chain: Chain, start: int) -> list[int]:
    order, placed = [start], _reach(chain, start, 0)
    if not placed:
        return []
    while placed < chain.layers:
        options = []
        for device in range(chain.devices):
            end = _reach(chain, device, placed)
            is_partner = all(chain.partners[device] >> other & 1 for other in order)
            if device not in order and end > placed and is_partner:
                time = float(chain.compute[device, placed:end].sum() + chain.hop[order[-1], device])
                options.append((time / (end - placed), device, end))
        if not options:
            return []
        _, device, placed = min(options)
        order.append(device)
    return order


def _swapped(chain: Chain, order: list[int]) -> Placement:
    best = fill(chain, order)
    assert best is not None  # the order was made by filling
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(0 if chain.first is None else 1, len(order)), 2):
            swapped = order.copy()
            swapped[a], swapped[b] = swapped[b], swapped[a]
            other = fill(chain, swapped)
            if other is not None and other.seconds < best.seconds - 1e-12:
                best, order, improved = other, swapped, True
    return best


def _filled_s(chain: Chain, order: Sequence[int]) -> float:
    found = fill(chain, order)
    return INFINITE if found is None else found.seconds


def fill(chain: Chain, order: Sequence[int]) -> Placement | None:
    """The best runs on these devices in this order, none left out: O(M L^2)."""
    run, layers = chain.run_costs, chain.layers
    table, starts = run[order[0]][0], []
    for device in order[1:]:
        whole = table[:, None] + run[device]
        starts.append(whole.argmin(axis=0))
        table = whole.min(axis=0)
    if not np.isfinite(table[layers]):
        return None
    ends = [layers]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    edges = [0, *reversed(ends)]
    runs = tuple((device, (a, b)) for device, (a, b) in zip(order, itertools.pairwise(edges), strict=True))
    return Placement(runs, latency(chain, runs))


def _reach(chain: Chain, device: int, start: int) -> int:
    """The last layer's end that a run from `start` fits to."""
    return int(chain.reach[device, start])


def runs_of(path: Sequence[int]) -> tuple[tuple[int, tuple[int, int]], ...]:
    """Runs of equal devices in a list with the device of each layer."""
    runs, start = [], 0
    for device, group in itertools.groupby(path):
        end = start + len(list(group))
        runs.append((device, (start, end)))
        start = end
    return tuple(runs)
