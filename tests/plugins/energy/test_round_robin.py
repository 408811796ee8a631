"""Turns by expected time: the worked example, and nodes that come, go or are unknown."""

from __future__ import annotations

import dataclasses

import pytest
from edged_plugins import energy
from edged_plugins.energy._round_robin import NODES, Turns

from edged import Candidate, NodeView, PlanRequest, Predicted, Role, Situation

TIMES = {"a": 1.0, "b": 2.0, "c": 4.0}


def candidate(*nodes, tpot_ms=None, refused=None):
    roles = tuple(Role(rank, node, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0) for rank, node in enumerate(nodes))
    return Candidate("local", roles, Predicted(tpot_ms=tpot_ms), refused_because=refused)


def situation(*candidates):
    nodes = {role.node_id: NodeView(role.node_id, role.node_id) for one in candidates for role in one.roles}
    return Situation(candidates, nodes, PlanRequest(), 0.5, 0.0)


def fresh():
    return next(policy for policy in energy.edged_policies({}) if policy.name == "round-robin")


def test_turns_are_in_proportion_to_speed():
    policy = fresh()
    asked = situation(*(candidate(name, tpot_ms=1000 * time) for name, time in TIMES.items()))
    order = [policy.choose(asked) for _ in range(14)]
    assert order == [0, 1, 2, 0, 0, 1, 0, 0, 1, 2, 0, 0, 1, 0]
    assert [order.count(index) for index in range(3)] == [8, 4, 2]
    assert not policy.is_steady


def test_a_new_node_is_owed_nothing_of_the_time_before_it():
    turns = Turns()
    for _ in range(700):
        turns.choose(TIMES)
    order = [turns.choose(TIMES | {"new": 1.0}) for _ in range(110)]
    assert order[:8].count("new") <= 4
    assert order.count("new") == pytest.approx(order.count("a"), abs=2)


def test_a_node_that_was_away_comes_back_as_a_new_one():
    turns = Turns()
    turns.choose(TIMES)
    for _ in range(100):
        turns.choose({"b": 2.0, "c": 4.0})
    assert set(turns.given) == {"b", "c"}
    order = [turns.choose(TIMES) for _ in range(14)]
    assert 7 <= order.count("a") <= 9


@pytest.mark.parametrize(("first", "second", "most"), [("b", "passing", 3), ("passing", "b", NODES + 2)])
def test_the_table_of_turns_is_bounded(first, second, most):
    """Also where somebody new comes each time and, being first, always gets the turn."""
    turns = Turns()
    for number in range(2 * NODES):
        names = [name if name == "b" else f"{name} {number}" for name in (first, second)]
        turns.choose(dict.fromkeys(names, 1.0))
        assert len(turns.given) <= most


@pytest.mark.parametrize(
    ("candidates", "order"),
    [
        ([candidate("a", tpot_ms=1.0, refused="full"), candidate("b", tpot_ms=9.0)], [1, 1]),
        ([candidate("a", "b", tpot_ms=1.0), candidate("a", tpot_ms=5.0)], [1, 1]),
        ([candidate("a", "b", tpot_ms=3.0), candidate("b", "a", tpot_ms=2.0)], [1, 1]),
        ([candidate("a", tpot_ms=5.0), candidate("a", tpot_ms=2.0), candidate("b", tpot_ms=2.0)], [1, 2, 1]),
        ([candidate("a"), candidate("b", tpot_ms=2.0)], [0, 1, 0, 1]),
        ([candidate("a"), candidate("b")], [0, 1, 0, 1]),
        ([candidate("a", refused="full")], [None]),
        ([], [None]),
    ],
    ids=[
        "refused",
        "alone before together",
        "only together",
        "two plans of a node",
        "unknown",
        "all unknown",
        "none",
        "empty",
    ],
)
def test_turns_are_among_plans_of_one_node_that_nothing_refuses(candidates, order):
    policy = fresh()
    assert [policy.choose(situation(*candidates)) for _ in order] == order


@pytest.mark.parametrize("name", ["uniform", "bandit", "round-robin"])
def test_nobody_outside_gets_a_job_that_a_node_of_the_group_can_do(name):
    policy = next(policy for policy in energy.edged_policies({}) if policy.name == name)
    here = candidate("a", tpot_ms=50.0)
    outside = dataclasses.replace(
        candidate("a", tpot_ms=5.0), strategy="cloud", stated=Predicted(tpot_ms=5.0)
    )
    assert [policy.choose(situation(here, outside)) for _ in range(10)] == [0] * 10
    refused = dataclasses.replace(here, refused_because="too hot")
    assert policy.choose(situation(refused, outside)) == 1
