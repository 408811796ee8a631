"""The searches against brute force, by the core's own price and rules."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from edged_plugins import _search
from edged_plugins._tensor_group import Group

from edged import planning
from edged.errors import PolicyViolation
from edged.types import (
    Candidate,
    EngineSpeed,
    LinkState,
    ModelDescription,
    NodeView,
    PlanRequest,
    Role,
)

MODEL = ModelDescription(
    architecture="llama", parameters=10**9, layers=6, hidden=1024, heads=16, kv_heads=8, head_dim=64,
    ffn=4096, vocab=32_000, context_tokens=8192, weight_type="Q4_K", head_unit=2, ffn_unit=256,
    vocab_unit=1, layer_bytes=(80 << 20, 90 << 20) * 3, embedding_bytes=100 << 20, head_bytes=100 << 20,
)  # fmt: skip
REQUEST = PlanRequest(context_tokens=512)


def nodes_of(seed: int, count: int) -> list[NodeView]:
    """Nodes of any speed and budget, with links of any cost, some of them missing."""
    chance = random.Random(seed)
    names = [f"n{i}" for i in range(count)]
    costs = {
        pair: (10 ** chance.uniform(-4.5, -2), 10 ** chance.uniform(6, 9))
        for pair in itertools.combinations(names, 2)
        if chance.random() > 0.1
    }
    made = []
    for name in names:
        links = tuple(
            LinkState((set(pair) - {name}).pop(), 1.0, bytes_s, True, latency_s)
            for pair, (latency_s, bytes_s) in costs.items()
            if name in pair
        )
        speed = EngineSpeed(
            "shard", "Q4_K", 10 ** chance.uniform(9, 10.5), 1e11, 10 ** chance.uniform(-6, -4), 1e-4
        )
        budget = chance.choice([None, int(chance.uniform(250, 800) * 2**20)])
        made.append(
            NodeView(name, name, engines=("shard",), speeds=(speed,), links=links, memory_budget=budget)
        )
    return made


def best_of(candidates: list[Candidate], nodes: list[NodeView]) -> float | None:
    """The least time per token of those that no rule refuses."""
    by_id = {node.node_id: node for node in nodes}
    finished = [planning.finish(each, MODEL, by_id, REQUEST) for each in candidates]
    times = [each.predicted.tpot_ms for each in finished if each.refused_because is None]
    return min((time for time in times if time is not None), default=None)


def all_runs(nodes: list[NodeView]) -> list[Candidate]:
    """Every way to give runs of layers to at least two nodes."""
    found = []
    for count in range(2, len(nodes) + 1):
        for order in itertools.permutations(nodes, count):
            for cuts in itertools.combinations(range(1, MODEL.layers), count - 1):
                edges = [0, *cuts, MODEL.layers]
                roles = tuple(
                    Role(
                        rank, node.node_id, rank, (a, b), (0, MODEL.heads), (0, MODEL.ffn),
                        (0, MODEL.vocab) if b == MODEL.layers else (0, 0), (b - a) / MODEL.layers,
                    )
                    for rank, (node, (a, b)) in enumerate(zip(order, itertools.pairwise(edges), strict=True))
                )  # fmt: skip
                found.append(Candidate("layers", roles))
    return found


def all_groups(nodes: list[NodeView]) -> list[Candidate]:
    """Every set of at least two nodes as a tensor group, divided by speed as the search does."""
    found = []
    for count in range(2, len(nodes) + 1):
        for members in itertools.combinations(nodes, count):
            weights = _search.weights_of(MODEL, members, REQUEST)
            try:
                roles = Group(MODEL, members, weights, REQUEST, (0, MODEL.layers)).roles()
            except PolicyViolation:
                continue
            found.append(Candidate("tensor", roles))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_runs_of_layers_are_the_best_there_are(seed: int) -> None:
    nodes = nodes_of(seed, 2 + seed % 3)
    best, found = best_of(all_runs(nodes), nodes), best_of(_search.layers(MODEL, nodes, REQUEST), nodes)
    assert found == (best if best is None else pytest.approx(best, rel=1e-9))


@pytest.mark.parametrize("seed", range(40))
def test_a_tensor_group_is_the_best_set_of_nodes(seed: int) -> None:
    nodes = nodes_of(seed, 2 + seed % 5)
    best, found = best_of(all_groups(nodes), nodes), best_of(_search.tensor(MODEL, nodes, REQUEST), nodes)
    assert found == (best if best is None else pytest.approx(best, rel=1e-9))


def test_a_node_that_saves_or_was_never_measured_has_no_part() -> None:
    nodes = [dataclasses.replace(node, memory_budget=None) for node in nodes_of(3, 4)]
    nodes[1] = dataclasses.replace(nodes[1], refuses="its battery is low")
    nodes[2] = dataclasses.replace(nodes[2], speeds=())
    for search in (_search.layers, _search.tensor):
        for candidate in search(MODEL, nodes, REQUEST):
            assert {role.node_id for role in candidate.roles} <= {"n0", "n3"}


@pytest.mark.parametrize("count", [20, 64])
def test_many_nodes_get_a_plan_that_the_rules_allow(count: int) -> None:
    """None of them holds the whole model, or the best run of layers would be on one."""
    nodes = [
        dataclasses.replace(node, memory_budget=node.memory_budget or 700 << 20)
        for node in nodes_of(count, count)
    ]
    model = dataclasses.replace(MODEL, layers=60, layer_bytes=(40 << 20,) * 60)
    by_id = {node.node_id: node for node in nodes}
    found = _search.layers(model, nodes, REQUEST)
    assert found
    for each in [*found, *_search.tensor(model, nodes, REQUEST)]:
        assert planning.finish(each, model, by_id, REQUEST).refused_because is None
