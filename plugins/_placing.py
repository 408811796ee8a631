"""Where the layers go: a chain of layers on devices, its prices, and its exact placement.

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

from . import _sweep

INFINITE = float("inf")


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
    def together(self) -> np.ndarray:
        """(devices, devices) bool: may they be in one plan? Each with itself."""
        everyone = np.ones((self.devices, self.devices), bool) if self.linked is None else self.linked
        return everyone | np.eye(self.devices, dtype=bool)

    @functools.cached_property
    def partners(self) -> np.ndarray:
        """For each device the set, as bits, of those that may be in a plan with it, and itself."""
        return np.array((self.together * self.bits).sum(axis=1), np.uint64)

    @functools.cached_property
    def bits(self) -> np.ndarray:
        """Of each device."""
        return np.array([1 << device for device in range(self.devices)], np.uint64)

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
    def stops(self) -> _sweep.Stops:
        """Each device as a stop of its own."""
        return _sweep.Stops(
            self.run_costs,
            self.hop,
            self.back,
            self.bits,
            self.partners,
            np.concatenate([np.zeros((self.devices, 1)), self.compute.cumsum(axis=1)], axis=1)
            if np.isfinite(self.compute).all()
            else None,
            self.first,
        )

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


def fastest(chain: Chain, least: int = 1, known: float = INFINITE) -> Placement | None:
    """The exact optimum of `latency` over runs on at least `least` devices; None where memory holds none, or
    none takes less than `known` seconds.

    Over states (used devices, first, last) and numbers of placed layers: O(2^M M^3 L log L) with M devices
    and L layers, less what the bound saves.
    """
    return _placed(_sweep.shortest(chain.stops, least, known=known))


def fastest_near(chain: Chain, width: int, least: int = 1, known: float = INFINITE) -> Placement | None:
    """As `fastest`, with the `width` most promising states of each number of devices: for many devices, and
    not always the optimum."""
    return _placed(_sweep.shortest(chain.stops, least, known=known, width=width))


def highest_throughput(chain: Chain, least: int = 1) -> Placement | None:
    """The exact optimum of `bottleneck`; `seconds` is the bottleneck."""
    return _placed(_sweep.shortest(chain.stops, least, join=np.maximum))


def _placed(found: tuple[float, _sweep.Path] | None) -> Placement | None:
    return None if found is None else Placement(found[1], found[0])


def runs_of(path: Sequence[int]) -> tuple[tuple[int, tuple[int, int]], ...]:
    """Runs of equal devices in a list with the device of each layer."""
    runs, start = [], 0
    for device, group in itertools.groupby(path):
        end = start + len(list(group))
        runs.append((device, (start, end)))
        start = end
    return tuple(runs)
