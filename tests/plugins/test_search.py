"""The searches against brute force, by the core's own price and rules."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from edged_plugins import _search, _staging
from edged_plugins._tables import Tables
from planning_rig import (
    MIB,
    MODEL,
    REQUEST,
    all_groups,
    all_runs,
    all_stages,
    instance,
    nodes_of,
    regret,
    settled,
)

from edged import planning, wire, worker
from edged.types import Candidate

LAYERS, TENSOR, HYBRID = map(settled, (_search.layers, _search.tensor, _search.hybrid))
EXACT = 1e-6  # the core counts whole bytes, the searches' tables do not
HYBRID_BY_FORCE = 4  # nodes: with five there are a hundred times as many plans


@pytest.mark.parametrize("seed", range(60))
def test_exact_searches_find_what_brute_force_finds(seed: int) -> None:
    count = 2 + seed % 5
    model, nodes = instance(seed, count, layers=3 + seed % 3)
    for search, every in (
        (LAYERS, all_runs),
        (TENSOR, all_groups),
        (HYBRID, all_stages if count <= HYBRID_BY_FORCE else None),
    ):
        if every is not None:
            lost = regret(search(model, nodes, REQUEST), [*every(model, nodes)], model, nodes)
            assert lost is None or abs(lost) <= EXACT, search


def hybrid(tables: Tables, exact_nodes: int) -> list[Candidate]:
    roles = _staging.best(tables, exact_nodes)
    return [] if roles is None else [Candidate("hybrid", roles)]


@pytest.mark.parametrize(
    ("search", "count", "layers"),
    [
        (_search.best_runs, 6, 6),
        (_search.best_runs, 7, 20),
        (_search.best_group, 9, 6),
        (hybrid, 5, 4),
        (hybrid, 6, 8),
    ],
)
def test_heuristics_are_within_5_percent_in_the_median_and_15_at_the_95th_percentile(
    search: Callable[[Tables, int], Sequence[Candidate]], count: int, layers: int
) -> None:
    gaps = []
    for seed in range(24):
        model, nodes = instance(seed, count, layers)
        tables = Tables(model, nodes, REQUEST)
        lost = regret(search(tables, 0), search(tables, count), model, nodes)
        if lost is not None:
            assert lost >= -EXACT
            gaps.append(lost)
    assert len(gaps) > 12
    assert statistics.median(gaps) <= 0.05
    assert sorted(gaps)[int(0.95 * len(gaps))] <= 0.15


def test_a_node_that_saves_or_was_never_measured_has_no_part() -> None:
    nodes = [dataclasses.replace(node, memory_budget=None) for node in nodes_of(3, 5, "rooms")]
    nodes[1] = dataclasses.replace(nodes[1], refuses="its battery is low")
    nodes[2] = dataclasses.replace(nodes[2], speeds=())
    for search in (LAYERS, TENSOR, HYBRID):
        [candidate] = search(MODEL, nodes, REQUEST)
        assert {role.node_id for role in candidate.roles} <= {"n0", "n3", "n4"}


def test_a_guest_has_a_part_where_the_job_allows_it() -> None:
    nodes = nodes_of(1, 2, "rooms")
    nodes[1] = dataclasses.replace(nodes[1], zone="guest", memory_budget=None)
    assert LAYERS(MODEL, nodes, REQUEST) == []
    assert LAYERS(MODEL, nodes, dataclasses.replace(REQUEST, allow_guest=True))


def test_the_first_stage_is_one_that_the_submitter_reaches() -> None:
    """The two fastest have no measured link to it, and the plan's price needs one."""
    nodes = [dataclasses.replace(node, memory_budget=None) for node in nodes_of(5, 4, "alike")]
    lost = {"n2", "n3"}
    for index in (0, 2, 3):
        others = {"n0"} if index else lost
        links = tuple(
            dataclasses.replace(link, rtt_ms=None, latency_s=None) if link.node_id in others else link
            for link in nodes[index].links
        )
        nodes[index] = dataclasses.replace(nodes[index], links=links)
    for search, every in ((LAYERS, all_runs), (HYBRID, all_stages)):
        assert regret(search(MODEL, nodes, REQUEST), [*every(MODEL, nodes)], MODEL, nodes) == pytest.approx(
            0, abs=EXACT
        )


@pytest.mark.parametrize("count", [20, 64])
def test_many_nodes_get_a_plan_that_the_rules_allow(count: int) -> None:
    """None of them holds the whole model, or the best run of layers would be on one."""
    nodes = [
        dataclasses.replace(node, memory_budget=node.memory_budget or 700 * MIB)
        for node in nodes_of(count, count)
    ]
    model = dataclasses.replace(MODEL, layers=60, layer_bytes=(40 * MIB,) * 60)
    by_id = {node.node_id: node for node in nodes}
    for search in (LAYERS, HYBRID):
        [found] = search(model, nodes, REQUEST)
        finished = planning.finish(found, model, by_id, REQUEST)
        assert finished.refused_because is None
        assert finished.predicted.tpot_ms is not None
    for each in TENSOR(model, nodes, REQUEST):
        assert planning.finish(each, model, by_id, REQUEST).refused_because is None


@pytest.mark.parametrize(
    ("throughput", "n", "start"),
    [([3, 3, 1, 1, 2, 0, 0, 4], 3, 4), ([5, 5, 5, 5], 2, 0), ([2, 1, 1, 2, 1, 1], 2, 1), ([1, 0], 2, 0)],
)
def test_the_best_span_covers_the_weakest_blocks(throughput: list[float], n: int, start: int) -> None:
    assert _staging.best_span(throughput, n) == start


def test_a_node_that_a_policy_gives_nothing_stops_no_search() -> None:
    nodes = [dataclasses.replace(node, memory_budget=None) for node in nodes_of(1, 4, "rooms")]
    nodes[0] = dataclasses.replace(nodes[0], weight=0.0)
    for search in (LAYERS, HYBRID):
        assert search(MODEL, nodes, REQUEST)
    [group] = TENSOR(MODEL, nodes, REQUEST)
    assert "n0" not in {role.node_id for role in group.roles}


@pytest.mark.parametrize("count", [4, 14])
def test_what_is_found_at_once_is_reported_before_the_best(count: int) -> None:
    """Who cannot wait has a plan of each strategy by layers or slices, and what follows is never slower."""
    nodes = [dataclasses.replace(node, memory_budget=None) for node in nodes_of(2, count, "rooms")]
    names = ("layers", "tensor", "hybrid")
    params = {
        "searches": {name: f"edged_plugins._search:{name}" for name in names},
        "model": wire.to_map(MODEL),
        "nodes": [wire.to_map(node) for node in nodes],
        "request": wire.to_map(REQUEST),
    }
    reports: list[dict[str, Any]] = []
    answer = worker.search(params, lambda event: reports.append(event["found"]))
    by_id = {node.node_id: node for node in nodes}

    def time(rows: list[dict[str, Any]]) -> float:
        found = [planning.finish(wire.read_body(Candidate, row), MODEL, by_id, REQUEST) for row in rows]
        return min(each.predicted.tpot_ms or math.inf for each in found)

    assert [list(report) for report in reports] == [[name] for name in names] * 2
    for name in names:
        first, last = (report[name] for report in reports if name in report)
        assert last == answer["found"][name]
        if first:
            assert time(last) <= time(first) * (1 + EXACT)
    assert reports[0]["layers"]
    assert reports[1]["tensor"]
