"""All-reduce of a tensor group's partial sums, bit-identical on every rank.

Each rank adds the same decoded frames in the order of ranks (direct, star), or takes each part of the
sum as the one rank that finished it sent it (ring). How, and in what codec, is settled at load: the
ranks measure their links, the group's first decides and tells the others, by its own settings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edged import Channel, EngineSpec, LinkCost, ProtocolError, measure_link

from . import Settings, _ggml
from ._codecs import ALIGN, CODECS
from ._links import DIRECT, PROBE_S, RING, Links, Load, Way, choose_codec, choose_ways
from ._messages import patience_s
from ._place import Place

SETTLE_S = 120.0  # until every rank has come as far as measuring; ranks begin to load at about one time
WAYS_MAX = 32


@dataclass(frozen=True, slots=True)
class Terms:
    """What a group agreed on."""

    codec: str
    ways: tuple[tuple[int, Way], ...]  # as of `choose_ways`


class Reducer:
    """Sums partials (rows, hidden) of `group`, which holds this rank. The calls of all ranks pair up."""

    def __init__(
        self, lib: _ggml.Ggml, channel: Channel, group: Sequence[int], terms: Terms, base_s: float
    ) -> None:
        """`base_s`: of every wait; work and bytes waited for come on top."""
        self._channel, self._group, self._base_s = channel, tuple(group), base_s
        self._others = tuple(rank for rank in group if rank != channel.rank)
        self._at = self._group.index(channel.rank)
        self._codec = CODECS[terms.codec](lib)
        self.terms = terms
        self._total = np.empty(0, np.float32)

    def __call__(self, partial: np.ndarray) -> np.ndarray:
        """The group's sum of `partial` (rows, hidden) float32, valid until the next call."""
        flat = partial.reshape(-1)
        if len(self._total) < len(flat):
            self._total = np.empty(len(flat), np.float32)
        total = self._total[: len(flat)]
        size = self._codec.size(len(flat))
        timeout_s = patience_s(self._base_s, len(partial), size)
        way = self._way(size)
        if way.name == "direct":
            self._direct(flat, total, timeout_s)
        elif way.name == "star":
            self._star(flat, total, size, way.hub, timeout_s)
        else:
            self._ring(flat, total, timeout_s)
        return total.reshape(partial.shape)

    def _way(self, size: int) -> Way:
        for largest, way in self.terms.ways:
            if size <= largest:
                return way
        return self.terms.ways[-1][1]

    def _direct(self, flat: np.ndarray, total: np.ndarray, timeout_s: float) -> None:
        frame = self._codec.encode(flat)
        frames = self._channel.exchange(self._others, frame, timeout_s)
        self._add(total, [*frames[: self._at], frame, *frames[self._at :]])

    def _star(self, flat: np.ndarray, total: np.ndarray, size: int, hub: int, timeout_s: float) -> None:
        frame = self._codec.encode(flat)
        if self._channel.rank == hub:
            frames = self._channel.move([], [(rank, size) for rank in self._others], timeout_s)
            self._add(total, [*frames[: self._at], frame, *frames[self._at :]])
            frame = self._codec.encode(total)
            self._channel.move([(rank, frame) for rank in self._others], [], timeout_s)
        else:
            (frame,) = self._channel.move([(hub, frame)], [(hub, size)], timeout_s)
        total[:] = self._codec.decode(frame, len(total))

    def _ring(self, flat: np.ndarray, total: np.ndarray, timeout_s: float) -> None:
        """Part c of the sum is finished by the rank before c, which hands it on encoded: the others,
        and itself, take it as those bytes say."""
        codec, n, at = self._codec, len(self._group), self._at
        after, before = self._group[(at + 1) % n], self._group[at - 1]
        edges = [min(round(i * len(flat) / n / ALIGN) * ALIGN, len(flat)) for i in range(n)] + [len(flat)]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]

        def size(part: slice) -> int:
            return codec.size(part.stop - part.start)

        def pass_on(frame: Any, wanted: slice) -> memoryview:
            (got,) = self._channel.move([(after, frame)], [(before, size(wanted))], timeout_s)
            return got

        total[:] = flat
        for step in range(n - 1):
            mine, theirs = parts[(at - step) % n], parts[(at - step - 1) % n]
            got = pass_on(codec.encode(total[mine]), theirs)
            total[theirs] += codec.decode(got, theirs.stop - theirs.start)
        done = parts[(at + 1) % n]
        frame = bytes(codec.encode(total[done]))
        total[done] = codec.decode(memoryview(frame), done.stop - done.start)
        for step in range(n - 1):
            wanted = parts[(at - step) % n]
            frame = bytes(pass_on(frame, wanted))
            total[wanted] = codec.decode(memoryview(frame), wanted.stop - wanted.start)

    def _add(self, total: np.ndarray, frames: Sequence[memoryview]) -> None:
        """total = the decoded frames, added in their order."""
        total[:] = self._codec.decode(frames[0], len(total))
        for frame in frames[1:]:
            total += self._codec.decode(frame, len(total))


# --- settling, at load ----------------------------------------------------------------------------


def join(lib: _ggml.Ggml, channel: Channel, spec: EngineSpec, place: Place, settings: Settings) -> Reducer:
    """This rank's reducer, once its group has settled on how to sum."""
    wire = "f32" if spec.numerics == "exact" else settings.wire
    first, end = place.layers
    weight_bytes = sum(spec.model.layer_bytes[first:end]) / len(place.group)
    work = spec.model.hidden, spec.model.reductions * (end - first), weight_bytes
    terms = settle(lib, channel, place.group, wire, work)
    return Reducer(lib, channel, place.group, terms, settings.timeout_s)


def settle(
    lib: _ggml.Ggml, channel: Channel, group: Sequence[int], wire: str, work: tuple[int, int, float]
) -> Terms:
    """What `group` agrees on; every rank of it calls this at about one time. `wire`: a codec or "auto",
    of which the first rank's counts. `work`: values of a token's partial, all-reduces a token, bytes of
    weights that a rank reads a token."""
    links = _measure(channel, group)
    first, patience = group[0], SETTLE_S + len(_pairs(group)) * PROBE_S
    if channel.rank != first:
        rows = [[a, b, link.latency_s, link.bytes_s] for (a, b), link in links.items() if a == channel.rank]
        channel.send(first, {"k": "links", "l": rows})
        return _read_terms(_receive(channel, first, "terms", patience), group)
    for rank in group[1:]:
        links |= _read_links(_receive(channel, rank, "links", patience), rank, group)
    codec = wire if wire != "auto" else choose_codec(group, links, _load(lib, *work))
    terms = Terms(codec, choose_ways(group, links))
    ways = [[size, way.name, way.hub] for size, way in terms.ways]
    for rank in group[1:]:
        channel.send(rank, {"k": "terms", "w": codec, "a": ways})
    return terms


def _measure(channel: Channel, group: Sequence[int]) -> dict[tuple[int, int], LinkCost]:
    """This rank's links, pair after pair in one order, so that a rank measures one at a time. Pairs that
    share no rank may be measured at once, and share what wire there is between them."""
    found = {}
    for before, pair in enumerate(_pairs(group)):
        if channel.rank in pair:
            other = pair[1] if pair[0] == channel.rank else pair[0]
            found[pair] = measure_link(channel, other, SETTLE_S + before * PROBE_S)
    return found


def _pairs(group: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.combinations(sorted(group), 2))


def _load(lib: _ggml.Ggml, width: int, sums: int, weight_bytes: float) -> Load:
    codecs = {name: codec(lib) for name, codec in CODECS.items()}
    return Load(
        sums,
        weight_bytes,
        {name: codec.size(width) for name, codec in codecs.items()},
        {name: codec.time_s(width) for name, codec in codecs.items()},
    )


def _receive(channel: Channel, source: int, kind: str, timeout_s: float) -> Mapping[str, Any]:
    header, _ = channel.receive(source, timeout_s)
    if header.get("k") != kind:
        raise ProtocolError(f"expected {kind} of rank {source}, got {str(header.get('k'))[:32]!r}")
    return header


def _read_links(header: Mapping[str, Any], rank: int, group: Sequence[int]) -> Links:
    """The links of `rank` to those after it in its group."""
    rows, found = header.get("l"), {}
    expected = [other for other in group if other > rank]
    if not isinstance(rows, list) or len(rows) != len(expected):
        raise ProtocolError(f"expected {len(expected)} links of rank {rank}")
    for row, other in zip(rows, expected, strict=True):
        if not isinstance(row, list) or len(row) != 4 or row[:2] != [rank, other]:
            raise ProtocolError(f"expected the link of rank {rank} to {other}")
        if not all(type(cost) is float and 0 < cost < math.inf for cost in row[2:]):
            raise ProtocolError("expected a link's latency and rate")
        found[rank, other] = LinkCost(*row[2:])
    return found


def _read_terms(header: Mapping[str, Any], group: Sequence[int]) -> Terms:
    codec, rows = header.get("w"), header.get("a")
    if type(codec) is not str or codec not in CODECS:
        raise ProtocolError(f"expected a codec, got {str(codec)[:32]!r}")
    if not isinstance(rows, list) or not 0 < len(rows) <= WAYS_MAX:
        raise ProtocolError(f"expected 1 to {WAYS_MAX} ways to sum")
    ways = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or type(row[0]) is not int or type(row[2]) is not int:
            raise ProtocolError("expected a way to sum with a size, a name and a hub")
        size, name, hub = row
        way = Way(name, hub)
        if way not in (DIRECT, RING) and (name != "star" or hub not in group):
            raise ProtocolError(f"expected a way to sum, got {str(name)[:32]!r}")
        ways.append((size, way))
    if any(a >= b for a, b in itertools.pairwise([0, *(size for size, _ in ways)])):
        raise ProtocolError("expected ways to sum in the order of their sizes")
    return Terms(codec, tuple(ways))
