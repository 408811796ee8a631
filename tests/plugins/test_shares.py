"""Shares by measured speed and by what each budget holds, against brute force."""

from dataclasses import replace
from itertools import product

import pytest
from edged_plugins import _cutting, _fitting, layer_parallel, tensor_parallel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategy_rig import assert_covers, model, named, view

from edged import NodeView, PlanRequest, Role, memory_of, planning

MIB = 1 << 20
SPEEDS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def slowest(counts, speeds):
    return max(count / speed for count, speed in zip(counts, speeds, strict=True))


@settings(max_examples=400)
@given(st.integers(1, 9), SPEEDS, st.data(), st.sampled_from([0, 1]))
def test_no_division_within_the_caps_ends_sooner(units, speeds, data, least):
    caps = [data.draw(st.integers(0, units)) for _ in speeds]
    allowed = [
        counts
        for counts in product(*(range(least, cap + 1) for cap in caps))
        if sum(counts) == units and len(counts) == len(caps)
    ]
    counts = _cutting.balance(units, speeds, caps, least)
    assert (counts is None) == (not allowed)
    if counts is not None:
        assert tuple(counts) in allowed
        assert slowest(counts, speeds) == min(slowest(other, speeds) for other in allowed)


@given(st.integers(1, 200_000), st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=8), st.data())
def test_what_a_capped_rank_cannot_take_the_others_share_by_speed(units, speeds, data):
    caps = [data.draw(st.integers(1, units)) for _ in speeds]
    assume(sum(caps) >= units >= len(speeds))
    counts = _cutting.balance(units, speeds, caps)
    assert sum(counts) == units
    ranks = range(len(speeds))
    assert all(1 <= counts[rank] <= caps[rank] for rank in ranks)
    for a, b in product(ranks, ranks):  # moving one unit from a to b would end later than a does now
        if counts[a] > 1 and counts[b] < caps[b]:
            assert (counts[b] + 1) / speeds[b] >= counts[a] / speeds[a] * (1 - 1e-12)


def test_a_mixed_type_counts_as_its_main_one():
    nodes = [view(0, ("Q4_K", 3e9)), view(1, ("Q4_K", 1e9))]
    assert _cutting.weights_of(model(weight_type="Q4_K_M"), nodes, PlanRequest()) == (3e9, 1e9)


def test_a_rank_gets_as_much_as_its_device_sustains():
    cool, hot = view(0, ("Q4_K", 3e9)), view(1, ("Q4_K", 3e9))
    hot = replace(hot, speeds=tuple(replace(speed, sustained=0.5) for speed in hot.speeds))
    assert _cutting.weights_of(model(weight_type="Q4_K"), [cool, hot], PlanRequest()) == (3e9, 1.5e9)


# --- budgets --------------------------------------------------------------------------------------


def layers_of(shape, nodes, request):
    [strategy] = layer_parallel.edged_strategies({})
    [candidate] = strategy.propose(shape, nodes, request)
    return candidate


def tensor_of(shape, nodes, request):
    strategy, _ = tensor_parallel.edged_strategies({})
    [candidate] = strategy.propose(shape, nodes, request)
    return candidate


def fits(candidate, shape, nodes, request):
    return [
        node.memory_budget is None or memory_of(role, shape, request) <= node.memory_budget
        for role, node in zip(candidate.roles, nodes, strict=True)
    ]


@given(st.integers(90, 800), st.integers(1, 60), st.sampled_from([1, 32, 1000]))
def test_the_most_that_a_budget_holds_is_found_as_by_counting(budget, units, unit):
    shape = model(vocab=units * unit, head_bytes=500 * MIB)
    node = view(0, budget=budget * MIB)

    def role(count):
        return Role(0, "node0", 0, (0, 2), (0, 9), (0, 1536), (0, count * unit), 1.0)

    held = [
        count for count in range(units + 1) if memory_of(role(count), shape, PlanRequest()) <= budget * MIB
    ]
    found = _fitting.largest(units, role, node, shape, PlanRequest())
    assert found == max(held, default=0)


def test_a_fast_node_with_little_memory_gets_the_layers_that_it_holds():
    shape = model(layer_bytes=(10 * MIB,) * 30)
    request = PlanRequest(nodes=("node0", "node1", "node2"), context_tokens=1)
    nodes = [view(0, ("q4_1", 9e9), budget=147 * MIB), view(1, ("q4_1", 2e9)), view(2, ("q4_1", 1e9))]
    candidate = layers_of(shape, nodes, request)  # 96 MiB for the worker, 10 a layer
    assert [end - begin for begin, end in (role.layers for role in candidate.roles)] == [5, 17, 8]


@settings(max_examples=150)
@given(st.data())
def test_layers_stay_within_every_budget_wherever_some_division_does(data):
    count = data.draw(st.integers(2, 3))
    layers = data.draw(st.integers(count, 8))
    shape = model(layers=layers, layer_bytes=(20 * MIB,) * layers, head_bytes=30 * MIB)
    nodes = [
        view(
            number,
            ("q4_1", data.draw(st.integers(1, 9)) * 1e9),
            budget=data.draw(st.none() | st.integers(100, 400).map(lambda size: size * MIB)),
        )
        for number in range(count)
    ]
    request = named(nodes, context_tokens=64)
    candidate = layers_of(shape, nodes, request)
    by_hand = named(nodes, context_tokens=64)
    possible = any(
        all(fits(layers_of(shape, nodes, _asking(by_hand, counts)), shape, nodes, request))
        for counts in product(range(1, layers + 1), repeat=count)
        if sum(counts) == layers
    )
    assert all(fits(candidate, shape, nodes, request)) == possible


def _asking(request, shares):
    return PlanRequest(request.strategy, request.nodes, tuple(map(float, shares)), request.context_tokens)


def test_slices_are_shifted_to_the_nodes_that_hold_them():
    shape = model(heads=32, kv_heads=8, head_unit=4, ffn=8192, layer_bytes=(20 * MIB,) * 30)
    speeds = ("q4_1", 1e9)
    nodes = [view(0, speeds, budget=260 * MIB), view(1, speeds, budget=700 * MIB)]
    request = named(nodes, context_tokens=256)
    candidate = tensor_of(shape, nodes, request)
    even = tensor_of(shape, [view(0, speeds), view(1, speeds)], request)
    assert [role.heads for role in even.roles] == [(0, 16), (16, 32)]
    assert not all(fits(even, shape, nodes, request))
    assert all(fits(candidate, shape, nodes, request))
    assert candidate.roles[0].heads == (0, 8)
    assert_covers([role.ffn for role in candidate.roles], 8192, 32)


@settings(max_examples=100)
@given(st.lists(st.integers(97, 900), min_size=2, max_size=4), st.data())
def test_slices_fit_or_the_core_says_what_is_missing(budgets, data):
    shape = model(heads=36, kv_heads=12, layer_bytes=(20 * MIB,) * 30, head_bytes=60 * MIB)
    nodes = [
        view(number, ("q4_1", data.draw(st.integers(1, 4)) * 1e9), budget=size * MIB)
        for number, size in enumerate(budgets)
    ]
    request = named(nodes, context_tokens=256)
    candidate = tensor_of(shape, nodes, request)
    if not all(fits(candidate, shape, nodes, request)):
        by_id = {node.node_id: node for node in nodes}
        assert "MiB and the budget is" in planning.finish(candidate, shape, by_id, request).refused_because


@pytest.mark.parametrize("cut", [layers_of, tensor_of])
def test_named_shares_are_taken_as_they_are(cut):
    nodes = [view(0, ("q4_1", 1e9), budget=1), view(1, ("q4_1", 9e9), budget=1)]
    candidate = cut(model(), nodes, named(nodes, shares=(2.0, 1.0)))
    assert [role.share for role in candidate.roles] == [2 / 3, 1 / 3]


@pytest.mark.parametrize("cut", [layers_of, tensor_of])
def test_nodes_that_hold_nothing_are_left_to_the_core_s_refusal(cut):
    nodes = [view(0, ("q4_1", 1e9), budget=1), view(1, ("q4_1", 1e9), budget=1)]
    candidate = cut(model(), nodes, named(nodes))
    by_id: dict[str, NodeView] = {node.node_id: node for node in nodes}
    reason = planning.finish(candidate, model(), by_id, named(nodes)).refused_because
    assert "budget is 0 MiB" in reason
