"""The strategy "hybrid": stages of tensor groups."""

import pytest
from edged_plugins import tensor_parallel
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_rig import assert_covers, model, named, view, views

from edged import ConfigError, EngineError, PeerError, PlanRequest, PolicyViolation, memory_of

MIB = 1 << 20


def propose(*arguments):
    _, hybrid = tensor_parallel.edged_strategies(settings={})
    assert hybrid.name == "hybrid"
    return hybrid.propose(*arguments)


def stages_of(candidate):
    """Ranks of each stage, in order."""
    count = candidate.roles[-1].stage + 1
    return [[role for role in candidate.roles if role.stage == stage] for stage in range(count)]


def sizes(candidates):
    return [[len(roles) for roles in stages_of(candidate)] for candidate in candidates]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [[2, 1]]),
        (4, [[2, 2]]),
        (5, [[3, 2]]),
        (6, [[3, 3], [2, 2, 2]]),
        (7, [[3, 2, 2]]),
        (8, [[3, 3, 2], [2, 2, 2, 2]]),
    ],
)
def test_stages_are_as_wide_as_kv_heads_allow_down_to_pairs(count, expected):
    nodes = views(count)
    assert sizes(propose(model(), nodes, named(nodes, strategy="hybrid"))) == expected


def test_edged_proposes_it_from_four_nodes_on_and_for_three_that_no_group_takes():
    assert sizes(propose(model(), views(3), PlanRequest())) == []
    assert sizes(propose(model(), views(5), PlanRequest())) == [[2, 2], [3, 2]]
    two_groups = model(heads=6, kv_heads=2)
    assert sizes(propose(two_groups, views(3), PlanRequest())) == [[2, 1]]


@settings(max_examples=200)
@given(st.data())
def test_every_stage_covers_its_layers_and_the_last_one_the_head(data):
    count = data.draw(st.integers(3, 8))
    shares = data.draw(st.none() | st.lists(st.floats(0.5, 2), min_size=count, max_size=count).map(tuple))
    shape = model(layers=data.draw(st.integers(4, 40)), heads=36, kv_heads=12)
    nodes = views(count)
    for candidate in propose(shape, nodes, named(nodes, strategy="hybrid", shares=shares)):
        assert [role.rank for role in candidate.roles] == list(range(count))
        assert [role.node_id for role in candidate.roles] == [node.node_id for node in nodes]
        stages = stages_of(candidate)
        assert_covers([roles[0].layers for roles in stages], shape.layers)
        for stage, roles in enumerate(stages):
            assert {role.layers for role in roles} == {roles[0].layers}
            assert_covers([role.heads for role in roles], shape.heads, shape.head_unit)
            assert_covers([role.ffn for role in roles], shape.ffn, shape.ffn_unit)
            if stage == len(stages) - 1:
                assert_covers([role.vocab for role in roles], shape.vocab)
            else:
                assert {role.vocab for role in roles} == {(0, 0)}


def test_stages_take_layers_by_the_sum_of_their_members_speeds():
    nodes = [view(number, ("q4_1", speed)) for number, speed in enumerate((2e9, 1e9, 5e8, 5e8))]
    [candidate] = propose(model(layers=8), nodes, named(nodes, strategy="hybrid"))
    first, second = stages_of(candidate)
    assert [roles[0].layers for roles in (first, second)] == [(0, 6), (6, 8)]
    assert [role.heads for role in first] == [(0, 6), (6, 9)]
    assert [role.ffn[1] - role.ffn[0] for role in second] == [768, 768]


def test_requested_shares_are_members_within_a_stage_and_their_sum_its_layers():
    nodes = views(4)
    request = named(nodes, strategy="hybrid", shares=(2.0, 1.0, 1.0, 2.0))
    [candidate] = propose(model(layers=6), nodes, request)
    assert [role.layers for role in candidate.roles] == [(0, 3), (0, 3), (3, 6), (3, 6)]
    assert [role.heads for role in candidate.roles] == [(0, 6), (6, 9), (0, 3), (3, 9)]


def test_a_stage_gets_no_more_layers_than_its_members_hold():
    shape = model(heads=8, kv_heads=8, head_unit=1, layer_bytes=(20 * MIB,) * 30)
    speed = ("q4_1", 1e9)
    nodes = [view(0, speed, budget=146 * MIB), *(view(number, speed) for number in (1, 2, 3))]
    request = named(nodes, strategy="hybrid", context_tokens=1)
    [candidate] = propose(shape, nodes, request)
    assert memory_of(candidate.roles[0], shape, request) <= 146 * MIB
    assert_covers([role.layers for role in candidate.roles[::2]], 30)


@pytest.mark.parametrize(
    ("count", "changes", "error", "says"),
    [
        (2, {}, ConfigError, "at least three nodes for hybrid; 2 came"),
        (4, {"layers": 1}, PolicyViolation, "for at most 1 layers; 4 came"),
        (8, {"layers": 2}, PolicyViolation, "stages of at most 3, for at most 2 layers; 8 came"),
    ],
)
def test_nodes_that_make_no_stages_are_refused(count, changes, error, says):
    nodes = views(count)
    with pytest.raises(error, match=says) as refusal:
        propose(model(**changes), nodes, named(nodes, strategy="hybrid"))
    assert refusal.value.remedy
    assert not isinstance(refusal.value, EngineError)


def test_too_few_nodes_online_say_so_when_it_is_asked_for():
    with pytest.raises(PeerError, match="at least three nodes online for hybrid; 2 came"):
        propose(model(), views(2), PlanRequest(strategy="hybrid"))


def test_two_named_nodes_are_no_error_where_edged_chooses():
    nodes = views(2)
    assert propose(model(), nodes, named(nodes)) == []
    assert propose(model(), views(5), PlanRequest(shares=(2.0, 1.0))) == []
