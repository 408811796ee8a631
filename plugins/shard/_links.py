"""What links between the ranks of a tensor group cost, and what follows for their all-reduce.

Links are measured once, at load, by exchanges over the very connections that partial sums will take.
The choices are pure functions of those costs; one rank makes them and tells the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edged import LinkCost

PROBE_S = 30.0  # allowed a pair while others wait for their turn; 300 kbit/s pass in a large group
SAVES_AT_LEAST = 0.05  # of the time per token, before a narrower codec is worth its rounding
WEIGHT_BYTES_S = 10e9  # a guess at how fast a rank reads its weights; only weighs communication against it

Links = Mapping[tuple[int, int], LinkCost]  # by (lower rank, higher rank)


@dataclass(frozen=True, slots=True)
class Way:
    """How a group sums: `direct` (each sends all it has to each), `star` (through rank `hub`), or `ring`
    (reduce-scatter, then all-gather)."""

    name: str
    hub: int = -1


DIRECT, RING = Way("direct"), Way("ring")


def time_s(way: Way, group: Sequence[int], links: Links, size: int) -> float:
    """Predicted seconds of summing a frame of `size` bytes. A rank sends over one wire, one after another."""
    n = len(group)
    if way.name == "direct":
        latency = max(link.latency_s for link in links.values())
        return latency + max(sum(size / _link(links, a, b).bytes_s for b in group if b != a) for a in group)
    if way.name == "star":
        spokes = [_link(links, way.hub, rank) for rank in group if rank != way.hub]
        return 2 * (max(s.latency_s for s in spokes) + sum(size / s.bytes_s for s in spokes))
    steps = [_link(links, group[i], group[(i + 1) % n]) for i in range(n)]
    return 2 * (n - 1) * max(step.time_s(size / n) for step in steps)


def choose_way(group: Sequence[int], links: Links, size: int) -> Way:
    """The quickest way for frames of `size` bytes; direct where two are equal."""
    ways = [DIRECT]
    if len(group) > 2:
        ways += [RING, *(Way("star", hub) for hub in group)]
    return min(ways, key=lambda way: time_s(way, group, links, size))


def choose_ways(group: Sequence[int], links: Links) -> tuple[tuple[int, Way], ...]:
    """(largest size, way), in the order of sizes; the last holds for all larger ones."""
    sizes = [1 << power for power in range(8, 29)]
    ways = [(size, choose_way(group, links, size)) for size in sizes]
    joined = [list(rows)[-1] for _, rows in itertools.groupby(ways, key=lambda row: row[1])]
    return tuple(joined)


@dataclass(frozen=True, slots=True)
class Load:
    """What a group sums: `sums` all-reduces a token, of frames of these sizes, beside `weight_bytes` that
    each rank reads a token."""

    sums: int
    weight_bytes: float
    sizes: Mapping[str, int]  # codec -> bytes of one token's frame, the widest codec first
    codec_s: Mapping[str, float]  # codec -> seconds to convert


def choose_codec(group: Sequence[int], links: Links, load: Load) -> str:
    """The widest codec, unless a narrower one saves a part of the time per token that is worth it, and
    so on from that one."""
    times = {name: _token_s(group, links, load, name) for name in load.sizes}
    best = next(iter(times))
    for name, predicted in times.items():
        if predicted < times[best] * (1 - SAVES_AT_LEAST):
            best = name
    return best


def _token_s(group: Sequence[int], links: Links, load: Load, codec: str) -> float:
    size = load.sizes[codec]
    sum_s = time_s(choose_way(group, links, size), group, links, size) + load.codec_s[codec]
    return load.weight_bytes / WEIGHT_BYTES_S + load.sums * sum_s


def _link(links: Links, a: int, b: int) -> LinkCost:
    return links[min(a, b), max(a, b)]
