"""All-reduce: every algorithm and codec gives every rank the same bits, and links decide between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from edged_plugins.shard import _ggml
from edged_plugins.shard._codecs import CODECS
from edged_plugins.shard._links import (
    DIRECT,
    RING,
    Load,
    Way,
    choose_codec,
    choose_way,
    choose_ways,
    time_s,
)
from edged_plugins.shard._reduce import Reducer, Terms, settle
from shard_rig import MemoryChannel, connect

from edged import LinkCost, ProtocolError, measure_link
from edged import LinkCost as Link
from edged.exchanging import (
    BURST_BYTES,
    LARGE_BYTES,
    LARGE_TIMES,
    SLOW_S,
    SMALL_BYTES,
    SMALL_TIMES,
    measure_burst,
)

PATIENCE_S = 30.0
WAYS = {"direct": DIRECT, "star": Way("star", 1), "ring": RING}
ROUGHNESS = {"f32": 1e-6, "f16": 1e-3, "q8": 1e-2}  # of the largest value, for each rounding


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [future.result(PATIENCE_S) for future in [threads.submit(task) for task in tasks]]


def summed(reducers: Sequence[Reducer], partials: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each rank's sum."""
    pairs = zip(reducers, partials, strict=True)
    return together([lambda pair=pair: pair[0](pair[1]).copy() for pair in pairs])


# --- codecs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 31, 32, 33, 576, 2048])
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_keeps_values_within_its_rounding(name: str, count: int) -> None:
    codec = CODECS[name](_ggml.load())
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    frame = codec.encode(values)
    assert frame.nbytes == codec.size(count)
    back = codec.decode(memoryview(bytes(frame)), count)
    if name == "f32":
        assert np.array_equal(back, values)
    elif name == "f16":
        assert np.array_equal(back, values.astype(np.float16).astype(np.float32))
    else:  # half a step of the block's largest value in 127, and the scale's own rounding
        blocks = np.pad(values, (0, -count % 32)).reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        bound = np.broadcast_to(step * (0.5 + 127 * 2**-11), blocks.shape).reshape(-1)[:count]
        assert (np.abs(back - values) <= bound * 1.001).all()


def test_half_precision_ends_at_its_largest_value_and_not_at_infinity() -> None:
    codec = CODECS["f16"](_ggml.load())
    values = np.array([1e5, -1e5, 65504, -3], np.float32)
    back = codec.decode(codec.encode(values), len(values))
    assert back.tolist() == [65504, -65504, 65504, -3]
    assert values[0] == 1e5  # which is the caller's


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6])
def test_every_rank_holds_the_same_bits_of_the_right_sum(ranks: int, way: str, codec: str) -> None:
    lib = _ggml.load()
    for shape in ((1, 1), (1, 31), (1, 576), (3, 100), (7, 33)):
        partials = [
            np.random.default_rng(rank).standard_normal(shape).astype(np.float32) for rank in range(ranks)
        ]
        terms = Terms(codec, ((1 << 30, WAYS[way]),))
        reducers = [Reducer(lib, c, range(ranks), terms, PATIENCE_S) for c in connect(ranks)]
        sums = summed(reducers, partials)
        assert all(np.array_equal(sums[0], other) for other in sums[1:])
        exact = np.sum(partials, axis=0, dtype=np.float64)
        largest = max(np.abs(p).max() for p in [*partials, exact])
        assert np.abs(sums[0] - exact).max() <= ROUGHNESS[codec] * largest * (ranks + 1)


def test_a_direct_sum_is_in_the_order_of_ranks() -> None:
    """(1e8 + 1) - 1e8 is 0 in float32, and 1e8 - 1e8 + 1 is 1: the order shows."""
    parts = [1e8, 1.0, -1e8]
    for way in (DIRECT, Way("star", 2)):
        channels = connect(3)
        terms = Terms("f32", ((1 << 30, way),))
        reducers = [Reducer(_ggml.load(), c, range(3), terms, PATIENCE_S) for c in channels]
        values = [np.full((1, 4), part, np.float32) for part in parts]
        for found in summed(reducers, values):
            assert found.tolist() == [[0.0] * 4]


def test_a_group_within_a_plan_keeps_to_itself() -> None:
    channels = connect(5)
    group = (1, 3, 4)
    for way in (DIRECT, RING, Way("star", 3)):
        terms = Terms("f32", ((1 << 30, way),))
        reducers = [Reducer(_ggml.load(), channels[r], group, terms, PATIENCE_S) for r in group]
        for found in summed(reducers, [np.ones((2, 64), np.float32)] * 3):
            assert (found == 3).all()


def test_the_way_is_chosen_by_the_size_of_the_frame() -> None:
    channel = connect(3)[0]
    terms = Terms("f16", ((1024, DIRECT), (4096, Way("star", 1)), (1 << 20, RING)))
    reducer = Reducer(_ggml.load(), channel, range(3), terms, PATIENCE_S)
    assert [reducer._way(size).name for size in (2, 1024, 1025, 4096, 5000, 1 << 24)] == [
        *("direct", "direct", "star", "star", "ring", "ring")
    ]


# --- choosing, as a function of tables ------------------------------------------------------------

LOOPBACK = Link(15e-6, 1e9)
GIGABIT = Link(150e-6, 125e6)
MBIT_100 = Link(200e-6, 12.5e6)
FAR = Link(20e-3, 125e6)


def even(ranks: int, link: Link) -> dict[tuple[int, int], Link]:
    return dict.fromkeys(itertools.combinations(range(ranks), 2), link)


@pytest.mark.parametrize("ranks", [3, 4, 6])
def test_high_latency_takes_the_fewest_hops_and_low_bandwidth_the_ring(ranks: int) -> None:
    group = range(ranks)
    assert choose_way(group, even(ranks, FAR), 8192) == DIRECT
    assert choose_way(group, even(ranks, LOOPBACK), 256) == DIRECT
    # the ring sends 2 (n-1) / n frames where each of all sends n - 1
    large = 1 << 24
    expected = RING if ranks > 2 else DIRECT
    assert choose_way(group, even(ranks, Link(1e-4, 1e6)), large) == expected


def test_a_hub_is_taken_where_the_others_are_far_from_each_other() -> None:
    group, links = range(4), even(4, FAR)
    for other in (0, 1, 3):
        links[min(2, other), max(2, other)] = GIGABIT
    assert choose_way(group, links, 8192) == Way("star", 2)


@pytest.mark.parametrize("size", [64, 8192, 1 << 20, 1 << 26])
def test_two_ranks_exchange_directly(size: int) -> None:
    for link in (LOOPBACK, MBIT_100, FAR):
        assert choose_way((0, 1), even(2, link), size) == DIRECT


def test_times_are_those_of_the_formulas() -> None:
    links, group, size = even(4, Link(1e-3, 1e6)), range(4), 4000
    assert time_s(DIRECT, group, links, size) == pytest.approx(1e-3 + 3 * 4e-3)
    assert time_s(RING, group, links, size) == pytest.approx(6 * (1e-3 + 1e-3))
    assert time_s(Way("star", 0), group, links, size) == pytest.approx(2 * (1e-3 + 3 * 4e-3))


@pytest.mark.parametrize("link", [LOOPBACK, GIGABIT, MBIT_100, FAR, Link(1e-4, 1e5)])
def test_the_table_of_ways_is_the_choice_at_each_size(link: Link) -> None:
    group, links = range(5), even(5, link)
    ways = choose_ways(group, links)
    assert [size for size, _ in ways] == sorted({size for size, _ in ways})
    assert all(a[1] != b[1] for a, b in itertools.pairwise(ways))
    for size in (1 << power for power in range(8, 29)):
        assert next(way for largest, way in ways if size <= largest) == choose_way(group, links, size)


def load_of(hidden: int, layers: int, weight_bytes: float) -> Load:
    lib = _ggml.load()
    sizes = {name: codec(lib).size(hidden) for name, codec in CODECS.items()}
    return Load(2 * layers, weight_bytes, sizes, {"f32": 0.0, "f16": 3e-6, "q8": 5e-6})


SMOL, ONE_B = load_of(576, 30, 45e6), load_of(2048, 22, 300e6)


@pytest.mark.parametrize(
    ("link", "load", "codec"),
    [
        (LOOPBACK, SMOL, "f32"),
        (LOOPBACK, ONE_B, "f32"),
        (Link(40e-6, 3e8), ONE_B, "f32"),  # a loaded machine's loopback
        (Link(25e-6, 125e7), ONE_B, "f32"),
        (MBIT_100, SMOL, "q8"),
        (MBIT_100, ONE_B, "q8"),
        (Link(2e-3, 1e6), ONE_B, "q8"),
        (FAR, ONE_B, "f32"),  # what is far is far with few bytes too
    ],
)
def test_a_narrow_codec_is_for_a_narrow_link(link: Link, load: Load, codec: str) -> None:
    assert choose_codec((0, 1), even(2, link), load) == codec


# --- settling -------------------------------------------------------------------------------------


def settled(ranks: int, wires: Sequence[str]) -> list[Terms]:
    channels, work = connect(ranks), (576, 60, 45e6)
    return together(
        [lambda i=i: settle(_ggml.load(), channels[i], range(ranks), wires[i], work) for i in range(ranks)]
    )


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_settle_on_the_terms_of_the_first(ranks: int) -> None:
    terms = settled(ranks, ["q8", *["f16"] * (ranks - 1)])
    assert {t.codec for t in terms} == {"q8"}
    assert all(t == terms[0] for t in terms)


class Narrow(MemoryChannel):
    """A link on which each exchange of many bytes, or of any, seems to take `SLOW_S`."""

    def __init__(self, channel: MemoryChannel, slow_from: int, clock: list[float]) -> None:
        vars(self).update(vars(channel))
        self._slow_from, self._clock, self.waits, self.sizes = slow_from, clock, [], []

    def exchange(self, ranks: Sequence[int], frame: Any, timeout_s: float) -> list[memoryview]:
        self.waits.append(timeout_s)
        self.sizes.append(len(frame))
        if len(frame) >= self._slow_from:
            self._clock[0] += 2 * SLOW_S
        return super().exchange(ranks, frame, timeout_s)


@pytest.mark.parametrize(
    ("slow_from", "small", "large"), [(LARGE_BYTES, SMALL_TIMES, 2), (SMALL_BYTES, 2, 2)]
)
def test_a_slow_link_is_not_probed_longer_than_it_takes_to_know(
    monkeypatch: pytest.MonkeyPatch, slow_from: int, small: int, large: int
) -> None:
    """One end finds it slow; the other learns that from it, and both stop with the same exchange."""
    clock = [0.0]
    monkeypatch.setattr("edged.exchanging.time.perf_counter", lambda: clock[0])
    a, b = connect(2)
    ends = Narrow(a, slow_from, clock), Narrow(b, LARGE_BYTES + 1, clock)
    links = together([lambda: measure_link(ends[0], 1, 7.0), lambda: measure_link(ends[1], 0, 7.0)])
    assert ends[0].sizes == ends[1].sizes == [SMALL_BYTES] * (1 + small) + [LARGE_BYTES] * large
    assert ends[0].waits[0] == 7.0
    assert links[0].latency_s + LARGE_BYTES / links[0].bytes_s >= SLOW_S


class Swinging(MemoryChannel):
    """A link of `latency` whose ends began one exchange apart: each waits twice as long, then not at all."""

    def __init__(self, latency: float, bytes_s: float, clock: list[float], bucket: int = 0) -> None:
        self._latency, self._bytes_s, self._clock, self._count = latency, bytes_s, clock, 0
        self._bucket = self._filled = bucket

    def exchange(self, ranks: Sequence[int], frame: Any, timeout_s: float) -> list[memoryview]:
        self._count += 1
        queued_s = max(0, len(frame) - self._filled) / self._bytes_s
        self._filled = max(0, self._filled - len(frame))
        self._clock[0] += 2 * (self._count % 2) * self._latency + queued_s
        return [memoryview(bytes(len(frame)))]

    def pause(self, seconds: float) -> None:
        self._clock[0] += seconds
        if seconds:
            self._filled = self._bucket


@pytest.mark.parametrize("latency", [50e-6, 2.5e-3, 10e-3])
def test_an_end_that_is_ahead_of_the_other_does_not_find_the_link_faster(
    monkeypatch: pytest.MonkeyPatch, latency: float
) -> None:
    clock = [0.0]
    monkeypatch.setattr("edged.exchanging.time.perf_counter", lambda: clock[0])
    found = measure_link(Swinging(latency, 12.5e6, clock), 1, 7.0)
    assert found.latency_s == pytest.approx(latency + SMALL_BYTES / 12.5e6)
    assert found.bytes_s == pytest.approx(12.5e6, rel=1e-3)


@pytest.mark.parametrize(("bucket", "burst"), [(0, 0), (3000, 3000), (64 << 10, BURST_BYTES)])
def test_what_a_token_bucket_lets_through_at_once_is_measured(
    monkeypatch: pytest.MonkeyPatch, bucket: int, burst: int
) -> None:
    clock = [0.0]
    link = Swinging(2e-3, 1.25e6, clock, bucket)
    monkeypatch.setattr("edged.exchanging.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("edged.exchanging.time.sleep", link.pause)
    found = measure_burst(link, 1, LinkCost(2e-3, 1.25e6))
    assert found.burst_bytes == pytest.approx(burst, abs=SMALL_BYTES)


LINKS = {"k": "links", "l": [[1, 2, 1e-3, 1e6]]}


@pytest.mark.parametrize(
    "said",
    [
        {"k": "terms"},
        {"k": "links"},
        {"k": "links", "l": []},
        {"k": "links", "l": [[1, 2, 1e-3]]},
        {"k": "links", "l": [[1, 3, 1e-3, 1e6]]},
        {"k": "links", "l": [[1, 2, 0.0, 1e6]]},
        {"k": "links", "l": [[1, 2, 1e-3, math.inf]]},
        {"k": "links", "l": [[1, 2, math.nan, 1e6]]},
        {"k": "links", "l": [[1, 2, "1", 1e6]]},
    ],
)
def test_links_that_are_none_are_a_protocol_error(said: dict[str, Any]) -> None:
    probed = probing(connect(3), [1, 2], [(1, said), (2, {"k": "links", "l": []})])
    with pytest.raises(ProtocolError):
        settle(_ggml.load(), probed, range(3), "auto", (64, 2, 1e6))


@pytest.mark.parametrize(
    "said",
    [
        {"k": "links"},
        {"k": "terms", "w": "f32", "a": []},
        {"k": "terms", "w": "f64", "a": [[1, "direct", -1]]},
        {"k": "terms", "w": "f32", "a": [[1, "star", 7]]},
        {"k": "terms", "w": "f32", "a": [[1, "tree", -1]]},
        {"k": "terms", "w": "f32", "a": [["1", "direct", -1]]},
        {"k": "terms", "w": "f32", "a": [[1, "direct"]]},
        {"k": "terms", "w": "f32", "a": [[size, "direct", -1] for size in range(1, 34)]},
        {"k": "terms", "w": ["f32"], "a": [[1, "direct", -1]]},
        {"k": "terms", "w": "f32", "a": [[1, ["direct"], -1]]},
        {"k": "terms", "w": "f32", "a": [[0, "direct", -1]]},
        {"k": "terms", "w": "f32", "a": [[2, "direct", -1], [1, "ring", -1]]},
        {"k": "terms", "w": "f32", "a": [[2, "direct", -1], [2, "ring", -1]]},
    ],
)
def test_terms_that_are_none_are_a_protocol_error(said: dict[str, Any]) -> None:
    channels = connect(2)
    probed = probing([channels[1], channels[0]], [0], [(0, said)])
    with pytest.raises(ProtocolError):
        settle(_ggml.load(), probed, range(2), "auto", (64, 2, 1e6))


def probing(
    channels: Sequence[MemoryChannel], others: Sequence[int], said: Sequence[tuple[int, dict[str, Any]]]
) -> MemoryChannel:
    """`channels[0]`, to which all `others` answer every probe, and then say what they say."""
    mine, by_rank = channels[0], {c.rank: c for c in channels}
    for other in others:
        for size in [SMALL_BYTES] * (1 + SMALL_TIMES) + [LARGE_BYTES] * LARGE_TIMES:
            by_rank[other].move([(mine.rank, bytes(size))], [], PATIENCE_S)
    for other, header in said:
        by_rank[other].send(mine.rank, header)
    return mine
