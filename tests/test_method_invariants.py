"""What the methods promise for any input, beside their worked examples."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
from edged_plugins import _cut_layer, _cutting, _paths, _placing, _ring, _sampling, tensor_parallel
from edged_plugins._tensor_group import Group
from edged_plugins.shard._links import RING, time_s
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worked_examples import (
    EXACT,
    LAYERS,
    SLICED,
    best_of_slices,
    by_programme,
    chain,
    conditions,
    even,
    peers,
    three,
    waits,
)

from edged import LinkCost, NodeView, PlanRequest, advising, planning, pricing
from edged.planning import CORE_STRATEGIES
from edged.types import LinkState

few = settings(max_examples=30, deadline=None)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=6)
TIMES = st.tuples(st.integers(1, 40), st.integers(1, 40))
TENSOR = tensor_parallel.edged_strategies({})
STRATEGIES = {strategy.name: strategy for strategy in (*CORE_STRATEGIES, *TENSOR)}

# --- shares (CoLLM, TPI-LLM, Galaxy) ----------------------------------------------------------------


@few
@given(WEIGHTS, st.sampled_from([1, 2, 4]))
def test_heads_go_whole_groups_at_a_time_and_all_of_them(weights: list[float], unit: int) -> None:
    model = dataclasses.replace(SLICED, heads=48, kv_heads=48 // unit, head_unit=unit)
    nodes = peers(len(weights), 1, 1e-3, 1e6)
    roles = Group(model, nodes, weights, EXACT, (0, model.layers), forgiving=True).roles()
    counts = [end - start for start, end in (role.heads for role in roles)]
    assert sum(counts) == model.heads
    assert all(count > 0 and count % unit == 0 for count in counts)


@few
@given(st.floats(0.01, 1), st.floats(1e-4, 1), st.integers(2, 4))
def test_one_device_works_alone_where_a_sync_costs_more_than_it_saves(
    token_s: float, latency_s: float, count: int
) -> None:
    nodes = peers(count, token_s, latency_s, 1e12)
    found = planning.consider(STRATEGIES, SLICED, nodes, EXACT)
    chosen = planning.choose(found)
    assert chosen is not None
    saved = token_s * (1 - 1 / count)
    if SLICED.layers * SLICED.reductions * latency_s > saved:
        assert found[chosen].strategy == "local"


@few
@given(
    st.integers(10, 60), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=2, max_size=4)
)
def test_an_overflow_is_taken_by_those_that_have_room(units: int, rows: list[tuple[int, int]]) -> None:
    speeds, caps = [speed for speed, _ in rows], [cap for _, cap in rows]
    counts = _cutting.balance(units, speeds, caps)
    assert (counts is None) == (sum(caps) < units)
    if counts is not None:
        assert sum(counts) == units
        assert all(count <= cap for count, cap in zip(counts, caps, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_reduce_scatter_and_all_gather_send_an_all_reduces_bytes(ranks: int) -> None:
    links = even(range(ranks), LinkCost(0.0, 1.0))
    assert time_s(RING, range(ranks), links, 1) == pytest.approx(2 * (ranks - 1) / ranks)


# --- the window over weights (TPI-LLM) ---------------------------------------------------------------


@few
@given(TIMES, TIMES)
def test_waiting_follows_the_papers_conditions(compute: tuple[int, int], load: tuple[int, int]) -> None:
    tight, on_average, *from_the_start = conditions(compute, load)
    waited = [waits(held, compute, load) for held in (1, 2, 3, 4, 2 * LAYERS)]
    assert waited[0] == sum(load) * LAYERS
    assert waited == sorted(waited, reverse=True)
    assert (waited[1] == 0) == tight
    assert (waited[-1] == 0) == on_average
    assert waited[-1] == max(0, sum(load) - sum(compute)) * LAYERS
    if tight:
        assert on_average
        assert any(from_the_start)


# --- candidates of a vocabulary in slices (He et al.) ------------------------------------------------


@few
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 5))
def test_the_best_of_all_slices_best_are_the_best(seed: int, keep: int, ranks: int) -> None:
    """With many ties, which go to the lower id."""
    values = np.random.default_rng(seed).integers(0, 30, 200).astype(np.float32)
    ids, found = best_of_slices(values, keep, ranks)
    order = np.lexsort((ids, -found))[:keep]
    assert ids[order].tolist() == _sampling.best(values, keep)[0].tolist()


# --- where layers go (EdgeShard, LinguaLinked, Ren, HexGen) ------------------------------------------


def anything(seed: int, devices: int = 3, layers: int = 5, first: int | None = 0) -> _placing.Chain:
    chance = np.random.default_rng(seed)
    hops = chance.uniform(0, 8, (devices, devices))
    np.fill_diagonal(hops, 0)
    compute = chance.uniform(0.5, 6, (devices, 1)) * chance.uniform(0.8, 1.2, (1, layers))
    room = chance.uniform(0.4, 1.2, devices) * layers
    return chain(compute, [[1] * layers] * devices, hops, room, first)


@pytest.mark.parametrize("seed", range(12))
def test_the_exact_search_and_the_integer_programme_agree(seed: int) -> None:
    it = anything(seed)
    found, known = _placing.fastest(it), by_programme(it)
    assert (found is None) == (known is None)
    if found is not None:
        assert found.seconds == pytest.approx(known)


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_has_each_layer_once_and_begins_at_the_source(seed: int) -> None:
    it = anything(seed, 4, 6)
    best = _placing.fastest(it)
    for found in (best, _placing.highest_throughput(it), _paths.by_recurrence(it), _paths.greedy(it)):
        if found is None:
            continue
        assert [start for _, (start, _) in found.runs] == [0, *(end for _, (_, end) in found.runs[:-1])]
        assert len(found.per_layer) == it.layers
        assert found.runs[0][0] == it.first
        assert all(it.memory[d, a:b].sum() <= it.room[d] for d, (a, b) in found.runs)
        assert best is not None
        assert _placing.latency(it, found.runs) >= best.seconds - 1e-9


@pytest.mark.parametrize("grown", [1, 2, 3])
def test_more_memory_or_quicker_links_never_make_the_best_plan_slower(grown: int) -> None:
    rooms = [three(300 * factor, 400, 600 * factor) for factor in (1, grown)]
    before, after = (_placing.fastest(it) for it in rooms)
    quicker = _placing.fastest(
        dataclasses.replace(three(), hop=three().hop / grown, back=three().back / grown)
    )
    assert before is not None
    assert after is not None
    assert quicker is not None
    assert max(after.seconds, quicker.seconds) <= before.seconds + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_no_even_cut_is_better_than_the_best_uneven_one(seed: int) -> None:
    it = dataclasses.replace(anything(seed, 3, 6, None), room=np.full(3, 6.0))
    best, widest = _placing.fastest(it, least=3), _placing.highest_throughput(it, least=3)
    assert best is not None
    assert widest is not None
    for order in itertools.permutations(range(3)):
        cut = [(device, (2 * at, 2 * at + 2)) for at, device in enumerate(order)]
        assert best.seconds <= _placing.latency(it, cut) + 1e-9
        assert widest.seconds <= _placing.bottleneck(it, cut) + 1e-9


@pytest.mark.parametrize(("devices", "layers"), [(2, 8), (3, 6), (4, 8)])
def test_equal_devices_get_equal_parts(devices: int, layers: int) -> None:
    """By layers, where no one holds more or where the slowest counts; by tensors; by stages of tensors."""
    hops = 0.01 * (1 - np.eye(devices))
    tight = chain([[1] * layers] * devices, [[1] * layers] * devices, hops, [layers / devices] * devices)
    roomy = dataclasses.replace(tight, room=np.full(devices, float(layers)))
    for found in (_placing.fastest(tight), _placing.highest_throughput(roomy)):
        assert found is not None
        assert {b - a for _, (a, b) in found.runs} == {layers // devices}
    nodes = peers(devices, 1, 1e-3, 1e9)
    request = PlanRequest(nodes=tuple(node.node_id for node in nodes))
    tensor, hybrid = TENSOR
    [group] = tensor.propose(dataclasses.replace(SLICED, heads=12 * devices), nodes, request)
    assert {role.heads[1] - role.heads[0] for role in group.roles} == {12}
    if devices == 4:
        [stages] = hybrid.propose(SLICED, nodes, dataclasses.replace(request, strategy="hybrid"))
        assert [role.layers for role in stages.roles] == [(0, 2), (0, 2), (2, 4), (2, 4)]
        assert {role.heads[1] - role.heads[0] for role in stages.roles} == {420}


# --- rings (Halda) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_ring_cuts_the_layers_in_whole_windows_and_choosing_never_costs(seed: int) -> None:
    chance = random.Random(seed)
    devices = [
        _ring.Device(
            chance.uniform(1, 6), chance.uniform(-1, 0), chance.uniform(0, 4), chance.uniform(0, 5),
            chance.randint(2, 8), chance.randint(0, 4),
        )
        for _ in range(3)
    ]  # fmt: skip
    everyone = _ring.solve(devices, 12, is_choosing=False, rounds_max=4)
    chosen = _ring.solve(devices, 12, rounds_max=4)
    assert everyone is not None
    assert chosen is not None
    assert chosen.seconds <= everyone.seconds + 1e-6
    for found in (everyone, chosen):
        assert found.rounds * sum(found.layers) == 12
        assert all(0 <= fast <= count for fast, count in zip(found.accelerated, found.layers, strict=True))


def test_a_strong_accelerator_goes_before_a_weak_one_and_any_before_a_disk() -> None:
    devices = {
        "strong": _ring.Device(5, -4, 1, 9, 8, 8),
        "weak": _ring.Device(5, -2, 1, 9, 8, 8),
        "processor": _ring.Device(4, 0, 1, 9, 8),
        "disk": _ring.Device(4, 0, 1, 2, 1),
    }
    taken = []
    while devices:
        found = _ring.solve(list(devices.values()), 8)
        assert found is not None
        name = list(devices)[int(np.argmax(found.layers))]
        taken.append(name)
        del devices[name]
    assert taken == ["strong", "weak", "processor", "disk"]


# --- choices (MetaInf, ServerlessLLM, Liu) -----------------------------------------------------------


@few
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0, 9), st.floats(0, 9))), st.floats(0, 9)
)
def test_no_method_within_the_budget_is_quicker(table: dict[str, tuple[float, float]], budget: float) -> None:
    seconds, cost = ({name: row[at] for name, row in table.items()} for at in (0, 1))
    able = [name for name in table if cost[name] <= budget]
    found = advising.quickest(seconds, cost, budget)
    assert (found is None) == (not able)
    if found is not None:
        assert found in able
        assert seconds[found] == min(seconds[name] for name in able)


def test_known_hardware_is_likest_to_itself() -> None:
    for known in advising.KNOWN:
        assert advising.nearest(advising.KNOWN, known.machine, known.processors, known.memory_bytes) == known


def test_who_has_the_file_fetches_nothing_and_the_nearest_holder_gives_it() -> None:
    bytes_s = {"ab": 1e6, "ac": 1e6, "bc": 1e8}
    nodes = {
        name: dataclasses.replace(
            node,
            node_id=name,
            links=tuple(
                LinkState(pair[1], 1.0, each, True, 1e-3) for pair, each in bytes_s.items() if pair[0] == name
            ),
        )
        for name, node in zip("abc", peers(3, 1, 1e-3, 1e6), strict=True)
    }
    roles = Group(SLICED, list(nodes.values()), [1, 1, 1], EXACT, (0, 4)).roles()

    def with_file(holders: str) -> dict[str, NodeView]:
        return {
            n: dataclasses.replace(node, holds=("x",) if n in holders else ()) for n, node in nodes.items()
        }

    def load_s(holders: str, holder: str) -> float | None:
        return pricing.loading_s(roles, SLICED, with_file(holders), "x", holder)

    part = sum(SLICED.layer_bytes) / 3
    reading_s = part / pricing.DISK_BYTES_S
    assert load_s("abc", "a") == pytest.approx(reading_s)
    assert load_s("ab", "b") == pytest.approx(reading_s + part / 1e8)
    assert load_s("a", "a") == pytest.approx(reading_s + 2 * part / 1e6)
    assert pricing.soonest_holder(roles, SLICED, with_file("ab"), "x") == "b"
    assert pricing.soonest_holder(roles, SLICED, with_file("a"), "x") == "a"
    assert pricing.soonest_holder(roles, SLICED, with_file(""), "x") is None
    assert pricing.loading_s(roles, SLICED, with_file(""), "x", None) is None


@few
@given(
    st.integers(2, 60), st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0.1, 100), st.floats(0, 20)
)  # fmt: skip
def test_no_cut_costs_less_than_the_best(
    layers: int, device: float, server: float, samples: float, instability: float
) -> None:
    cut = _cut_layer.Cut(layers, device, server, samples, instability)
    assert cut.cost(cut.best()) == pytest.approx(min(cut.cost(n) for n in range(1, layers)))


@few
@given(st.floats(0.1, 5), st.floats(0.1, 5), st.floats(0.1, 5))
def test_turning_by_turning_to_frequency_and_cut_never_costs_more(
    time: float, energy: float, kappa: float
) -> None:
    """Cost of a layer at the device: time_weight / f + energy_weight * kappa * f^2."""

    def cut_at(frequency: float) -> _cut_layer.Cut:
        return _cut_layer.Cut(32, time / frequency + energy * kappa * frequency**2, 2.0)

    cut, frequency, costs = 16, 0.3, []
    for _ in range(3):
        costs.append(cut_at(frequency).cost(cut))
        frequency = _cut_layer.best_frequency(time, energy, kappa, 3.0)
        costs.append(cut_at(frequency).cost(cut))
        cut = cut_at(frequency).best()
    costs.append(cut_at(frequency).cost(cut))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(costs))
