"""Placement of a chain of layers: the exact search against brute force, worked examples, the heuristics."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from edged_plugins import _cutting, _paths, _placing, _ring

INFINITE = float("inf")


def chain(compute, memory, hop, room, base=None, first=None, back=None):
    compute = np.array(compute, float)
    base = np.zeros(len(compute)) if base is None else np.array(base, float)
    hop = np.array(hop, float)
    back = hop if back is None else np.array(back, float)
    return _placing.Chain(compute, np.array(memory, float), hop, back, np.array(room, float), base, first)


def by_brute_force(it: _placing.Chain, price=_placing.latency):
    """The least price over every order of every set of devices and every cut; None where nothing fits."""
    best = INFINITE
    for count in range(1, it.devices + 1):
        for order in itertools.permutations(range(it.devices), count):
            if it.first is not None and order[0] != it.first:
                continue
            for cuts in itertools.combinations(range(1, it.layers), count - 1):
                runs = list(zip(order, itertools.pairwise([0, *cuts, it.layers]), strict=True))
                fits = all(
                    it.memory[d, a:b].sum() + it.base[d] <= it.room[d] * (1 + 1e-12) for d, (a, b) in runs
                )
                if fits:
                    best = min(best, price(it, runs))
    return None if math.isinf(best) else best


def anything(seed, devices, layers):
    random = np.random.default_rng(seed)
    hop = random.uniform(0, 8, (devices, devices))
    np.fill_diagonal(hop, 0)
    compute = random.uniform(0.5, 6, (devices, 1)) * random.uniform(0.8, 1.2, (1, layers))
    memory = np.tile(random.uniform(0.5, 1.5, (1, layers)), (devices, 1))
    room = random.uniform(0.2, 1.2, devices) * layers
    first = int(random.integers(devices)) if random.random() < 0.3 else None
    back = random.uniform(0, 8, (devices, devices))
    return chain(compute, memory, hop, room, random.uniform(0, 1, devices), first, back)


# --- the exact search ---


@pytest.mark.parametrize("seed", range(60))
def test_the_exact_search_finds_what_brute_force_finds(seed):
    it = anything(seed, devices=2 + seed % 4, layers=3 + seed % 5)
    for search, price in (
        (_placing.fastest, _placing.latency),
        (_placing.highest_throughput, _placing.bottleneck),
    ):
        found, best = search(it), by_brute_force(it, price)
        if best is None:
            assert found is None
            continue
        assert found.seconds == pytest.approx(best)
        assert price(it, found.runs) == pytest.approx(best)
        assert it.first is None or found.runs[0][0] == it.first


@pytest.mark.parametrize("seed", range(20))
def test_what_is_known_is_not_searched_for_again_and_bounds_lose_nothing(seed):
    it = anything(seed, devices=5, layers=7)
    best = _placing.fastest(it)
    if best is None:
        return
    assert _placing.fastest(it, known=best.seconds) is None
    assert _placing.fastest(it, known=best.seconds * 1.001).seconds == pytest.approx(best.seconds)
    narrow, wide = (_placing.fastest_near(it, width) for width in (1, 1000))
    assert wide.seconds == pytest.approx(best.seconds)
    assert narrow is None or narrow.seconds >= best.seconds - 1e-9


def test_at_least_so_many_devices_take_part():
    it = chain([[1] * 4, [2] * 4], [[1] * 4] * 2, [[0, 0.5], [0.5, 0]], [9, 9])
    assert _placing.fastest(it).per_layer == [0] * 4
    both = _placing.fastest(it, least=2)
    assert sorted(both.per_layer) == [0, 0, 0, 1]
    assert both.seconds == 6


# --- phone, Jetson, cloud: every layer 100 MB ---

HOPS = [[0, 1.4, 9], [1.4, 0, 9], [9, 9, 0]]


def three(rooms):
    return chain([[10] * 8, [4] * 8, [2] * 8], [[100] * 8] * 3, HOPS, rooms, first=0)


def test_three_devices_eight_layers():
    it = three([300, 400, 600])
    assert _placing.fastest(it).seconds == pytest.approx(45.4)
    assert _placing.highest_throughput(it).seconds == pytest.approx(10)


@pytest.mark.parametrize(
    ("devices", "latency", "slowest"),
    [
        ("01222222", 45.4, 12),
        ("01122222", 47.4, 10),
        ("00222222", 50.0, 20),
        ("00022222", 58.0, 30),
        ("00011122", 65.4, 30),
        ("00011112", 67.4, 30),
    ],
)
def test_the_price_of_known_plans(devices, latency, slowest):
    runs = _placing.runs_of([int(device) for device in devices])
    it = three([300, 400, 600])
    assert _placing.latency(it, runs) == pytest.approx(latency)
    assert _placing.bottleneck(it, runs) == pytest.approx(slowest)


def test_without_the_cloud():
    assert _placing.fastest(three([300, 400, 0])) is None
    found = _placing.fastest(three([400, 400, 0]))
    assert found.per_layer == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found.seconds == pytest.approx(58.8)


def test_the_recurrence_alone_misses_what_going_back_would_win():
    """Going back to a device is no plan of edged's; the example says what that costs."""
    hops = [[0, 5, 0], [5, 0, 6], [0, 6, 0]]
    it = chain([[6] * 5, [3] * 5, [6] * 5], [[1] * 5] * 3, hops, [2, 1, 2], first=0)
    assert _paths.by_recurrence(it).seconds == pytest.approx(38)
    assert _placing.fastest(it).seconds == pytest.approx(38)
    paths = itertools.product(range(3), repeat=4)
    free = [(0, *rest) for rest in paths if all((0, *rest).count(d) <= (2, 1, 2)[d] for d in range(3))]
    price = [
        sum((6, 3, 6)[d] for d in path) + sum(hops[a][b] for a, b in itertools.pairwise([*path, 0]))
        for path in free
    ]
    assert min(price) == 37


def test_more_room_or_faster_links_never_make_a_plan_slower():
    for seed in range(30):
        it = anything(seed, 4, 6)
        best = _placing.fastest(it)
        roomier = chain(it.compute, it.memory, it.hop, it.room * 1.3, it.base, it.first, it.back)
        quicker = chain(it.compute, it.memory, it.hop * 0.7, it.room, it.base, it.first, it.back * 0.7)
        for better in (roomier, quicker):
            found = _placing.fastest(better)
            assert best is None or found.seconds <= best.seconds + 1e-9


# --- heuristics ---


def test_heuristics_are_valid_and_the_better_of_them_is_near() -> None:
    gaps = []
    for seed in range(200):
        it = anything(seed, 5, 8)
        best = _placing.fastest(it)
        found = [each for each in (_paths.by_recurrence(it), _paths.greedy(it)) if each]
        for each in found:
            assert each.seconds == pytest.approx(_placing.latency(it, each.runs))
            assert each.seconds >= best.seconds - 1e-9
        gaps.append(min(each.seconds for each in found) / best.seconds - 1)
    gaps.sort()
    assert statistics.median(gaps) <= 0.05
    assert gaps[int(len(gaps) * 0.95)] <= 0.15


# --- the ring ---


def test_a_ring_of_two_and_the_one_that_leaves_a_device_out():
    devices = [_ring.Device(6, 0, 3, 1, 10), _ring.Device(2, -1.5, 3, 1, 6, 4)]
    whole = _ring.solve(devices, 8, 1, is_choosing=False)
    assert (whole.layers, whole.accelerated, whole.seconds) == ((1, 7), (0, 4), pytest.approx(21))
    chosen = _ring.solve(devices, 8, 1)
    assert (chosen.layers, chosen.accelerated, chosen.seconds) == ((0, 8), (0, 4), pytest.approx(11))


def ring_by_brute_force(devices, layers, fixed):
    best = INFINITE
    ranges = [range(layers + 1)] * len(devices)
    for counts in itertools.product(*ranges):
        if sum(counts) != layers:
            continue
        used = sum(count > 0 for count in counts)
        total = fixed
        for device, count in zip(devices, counts, strict=True):
            if not count:
                continue
            options = []
            for fast in range(min(count, device.accelerator_holds) + 1):
                slow = count - fast
                again = device.reread_s * slow if slow > device.holds else 0
                options.append(device.layer_s * count + device.accelerator_s * fast + again)
            total += min(options) + (device.hop_s if used > 1 else 0)
        best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(25))
def test_the_ring_is_the_best_there_is(seed):
    random = np.random.default_rng(seed)
    devices = [
        _ring.Device(
            random.uniform(1, 6),
            random.uniform(-1, 0.5),
            random.uniform(0, 4),
            random.uniform(0, 5),
            int(random.integers(0, 6)),
            int(random.integers(0, 4)),
        )
        for _ in range(3)
    ]
    found = _ring.solve(devices, 7, 0.5)
    assert sum(found.layers) == 7
    assert found.seconds == pytest.approx(ring_by_brute_force(devices, 7, 0.5), rel=1e-6)


# --- shares ---


def test_what_overflows_a_memory_goes_to_the_others_by_speed():
    assert _cutting.balance(14, [4, 2, 1]) == [8, 4, 2]
    shares = _cutting.balance(14, [4, 2, 1], [6, 8, 8])
    known = [6, 5, 3]  # another that is done as soon
    assert shares[0] == 6
    slowest = [max(n / s for n, s in zip(each, [4, 2, 1], strict=True)) for each in (shares, known)]
    assert slowest == [3, 3]


def test_two_equal_devices_share_by_their_batteries():
    assert _cutting.apportion(10, [0.8, 0.2]) == [8, 2]
