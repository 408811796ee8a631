"""The strategies "layers" and "tensor": every range, by exhaustion and by random models."""

from fractions import Fraction
from itertools import pairwise, product

import pytest
from edged_plugins import _cutting, layer_parallel, tensor_parallel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategy_rig import assert_covers, model, named, view, views

from edged import ConfigError, PeerError, PlanRequest, PolicyViolation


def propose_layers(*arguments):
    [strategy] = layer_parallel.edged_strategies(settings={})
    assert strategy.name == "layers"
    return strategy.propose(*arguments)


def propose_tensor(*arguments):
    tensor, _ = tensor_parallel.edged_strategies(settings={})
    assert tensor.name == "tensor"
    return tensor.propose(*arguments)


BOTH = pytest.mark.parametrize("propose", [propose_layers, propose_tensor])


# --- the division itself --------------------------------------------------------------------------


@pytest.mark.parametrize("units", range(1, 9))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_other_division_is_nearer_to_the_shares(units, ranks):
    for weights in product((1, 2, 3, 7), repeat=ranks):
        exact = [Fraction(units * weight, sum(weights)) for weight in weights]
        divisions = [d for d in product(range(units + 1), repeat=ranks) if sum(d) == units]

        def distance(division, exact=exact):
            return sum(abs(count - part) for count, part in zip(division, exact, strict=True))

        assert distance(_cutting.apportion(units, weights)) == min(map(distance, divisions))


@given(st.integers(1, 200), st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=8))
def test_every_count_is_within_one_of_its_exact_part(units, weights):
    counts = _cutting.apportion(units, weights)
    total = sum(map(Fraction, weights))
    assert sum(counts) == units
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - units * Fraction(weight) / total) < 1


@given(st.integers(1, 200), st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=8))
def test_at_least_one_each_changes_nothing_where_nobody_would_get_none(units, weights):
    assume(len(weights) <= units)
    plain, whole = _cutting.apportion(units, weights), _cutting.apportion_all(units, weights)
    assert sum(whole) == units
    assert min(whole) >= 1
    assert whole == plain or 0 in plain
    by_weight = [count for _, count in sorted(zip(weights, whole, strict=True))]
    assert all(a <= b + 1 for a, b in pairwise(by_weight))


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shares", "counts"),
    [
        (30, (2, 1), [20, 10]),
        (30, (1, 1, 1), [10, 10, 10]),
        (6, (100, 1, 1, 1), [3, 1, 1, 1]),
        (7, (1, 1), [4, 3]),
        (2, (1, 1), [1, 1]),
        (10, (0.5, 0.25, 0.25), [5, 3, 2]),
    ],
)
def test_layers_go_by_the_requested_shares(layers, shares, counts):
    nodes = views(len(shares))
    [candidate] = propose_layers(model(layers=layers), nodes, named(nodes, shares=shares))
    assert [end - begin for begin, end in (role.layers for role in candidate.roles)] == counts
    assert [role.share for role in candidate.roles] == [count / layers for count in counts]


@settings(max_examples=200)
@given(st.data())
def test_stages_cover_all_layers_and_only_the_last_has_the_head(data):
    layers = data.draw(st.integers(2, 80))
    shares = data.draw(st.lists(st.floats(0.01, 100), min_size=2, max_size=min(8, layers)))
    nodes = views(len(shares))
    [candidate] = propose_layers(model(layers=layers), nodes, named(nodes, shares=tuple(shares)))
    assert_covers([role.layers for role in candidate.roles], layers)
    for rank, role in enumerate(candidate.roles):
        assert (role.rank, role.stage, role.node_id) == (rank, rank, nodes[rank].node_id)
        assert (role.heads, role.ffn) == ((0, 9), (0, 1536))
        assert role.vocab == ((0, 49152) if rank == len(nodes) - 1 else (0, 0))
    assert sum(role.share for role in candidate.roles) == pytest.approx(1)


@pytest.mark.parametrize(
    ("speeds", "counts"),
    [
        ([[("q4_1", 3e9)], [("q4_1", 1e9)]], [6, 2]),
        ([[("q4_1", 3e9), ("f16", 1e9)], [("q4_1", 1e9), ("f16", 9e9)]], [6, 2]),
        ([[("q4_1", 1e9), ("q4_1", 3e9)], [("q4_1", 1e9)]], [6, 2]),
        ([[("q4_1", 3e9)], []], [4, 4]),
        ([[("q4_1", 3e9)], [("f16", 1e9)]], [4, 4]),
        ([[("q4_1", 3e9)], [("q4_1", 0.0)]], [4, 4]),
        ([[("q4_1", 3e9)], [("q4_1", -1.0)]], [4, 4]),
        ([[("q4_1", 3e9)], [("q4_1", float("nan"))]], [4, 4]),
        ([[("q4_1", 1e12)], [("q4_1", 1.0)]], [7, 1]),
    ],
    ids=[
        "by speed",
        "of the model's weight type",
        "of the best engine",
        "equal where one is unmeasured",
        "equal where one is measured for other weights",
        "equal where a speed is nothing",
        "equal where a speed is negative",
        "equal where a speed is no number",
        "at least one layer each",
    ],
)
def test_layers_go_by_measured_speed_when_nobody_gives_shares(speeds, counts):
    nodes = [view(number, *measured) for number, measured in enumerate(speeds)]
    [candidate] = propose_layers(model(layers=8), nodes, named(nodes))
    assert [end - begin for begin, end in (role.layers for role in candidate.roles)] == counts


def test_more_nodes_than_layers_are_refused():
    nodes = views(4)
    with pytest.raises(PolicyViolation, match=r"at most one node for each of 3 layers; 4 came"):
        propose_layers(model(layers=3), nodes, named(nodes))


def test_groups_with_more_nodes_than_layers_are_left_out_when_edged_chooses():
    assert [len(each.roles) for each in propose_layers(model(layers=3), views(5), PlanRequest())] == [2, 3]


# --- tensor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "heads"),
    [
        ((2, 1), [(0, 6), (6, 9)]),
        ((1, 2), [(0, 3), (3, 9)]),
        ((1, 1), [(0, 6), (6, 9)]),
        ((1, 1, 1), [(0, 3), (3, 6), (6, 9)]),
        ((2, 1, 1), [(0, 3), (3, 6), (6, 9)]),
    ],
)
def test_heads_are_cut_between_groups_and_the_share_is_what_was_given(shares, heads):
    nodes = views(len(shares))
    [candidate] = propose_tensor(model(), nodes, named(nodes, shares=shares))
    assert [role.heads for role in candidate.roles] == heads
    assert [role.share for role in candidate.roles] == [(end - begin) / 9 for begin, end in heads]


def test_columns_and_rows_follow_the_shares_more_finely_than_heads_can():
    nodes = views(2)
    [candidate] = propose_tensor(model(), nodes, named(nodes, shares=(3, 1)))
    assert [role.heads for role in candidate.roles] == [(0, 6), (6, 9)]
    assert [role.ffn for role in candidate.roles] == [(0, 1152), (1152, 1536)]
    assert [role.vocab for role in candidate.roles] == [(0, 36864), (36864, 49152)]


@settings(max_examples=300)
@given(st.data())
def test_every_dimension_is_covered_in_whole_units_near_the_shares(data):
    shares = tuple(data.draw(st.lists(st.floats(0.2, 5), min_size=2, max_size=6)))
    head_unit, ffn_unit, vocab_unit = (data.draw(st.sampled_from([1, 2, 3, 32])) for _ in range(3))
    shape = model(
        heads=head_unit * data.draw(st.integers(len(shares), 24)),
        ffn=data.draw(st.integers(ffn_unit * len(shares), 2000)),
        vocab=data.draw(st.integers(vocab_unit * len(shares), 2000)),
        head_unit=head_unit,
        ffn_unit=ffn_unit,
        vocab_unit=vocab_unit,
    )
    nodes = views(len(shares))
    try:
        [candidate] = propose_tensor(shape, nodes, named(nodes, shares=shares))
    except PolicyViolation:
        assert min(shares) / sum(shares) * shape.heads < shape.head_unit
        return
    roles = candidate.roles
    assert_covers([role.heads for role in roles], shape.heads, head_unit)
    assert_covers([role.ffn for role in roles], shape.ffn, ffn_unit)
    assert_covers([role.vocab for role in roles], shape.vocab, vocab_unit)
    for rank, role in enumerate(roles):
        given_heads = role.heads[1] - role.heads[0]
        assert (role.rank, role.stage, role.node_id) == (rank, 0, nodes[rank].node_id)
        assert role.layers == (0, 30)
        assert role.share == given_heads / shape.heads
        assert abs(given_heads - shares[rank] / sum(shares) * shape.heads) < head_unit + 1e-6


@pytest.mark.parametrize(
    ("changes", "shares", "says"),
    [
        ({}, (1, 1, 1, 1), "at most 3 nodes.* 9 query heads go 3 at a time; 4 came"),
        ({"ffn": 32}, (1, 1), "at most 1 nodes.* 32 columns of the feed-forward"),
        ({"vocab": 1}, (1, 1), "at most 1 nodes.* 1 rows of the output head"),
        ({}, (100, 1), r"at least one group of 3 of the 9 query heads; rank 1's comes to 0.089 heads"),
        ({}, (1, 1, 10), r"rank 0's comes to 0.75 heads"),
    ],
)
def test_a_model_that_cannot_be_cut_so_says_why(changes, shares, says):
    nodes = views(len(shares))
    with pytest.raises(PolicyViolation, match=says) as refusal:
        propose_tensor(model(**changes), nodes, named(nodes, shares=shares))
    assert refusal.value.remedy


def test_groups_that_cannot_be_cut_are_left_out_when_edged_chooses():
    assert [len(each.roles) for each in propose_tensor(model(), views(6), PlanRequest())] == [2, 3]
    slow = [view(0, ("q4_1", 9e9)), view(1, ("q4_1", 1e8)), view(2, ("q4_1", 9e9))]
    assert propose_tensor(model(), slow, PlanRequest()) == []


def test_the_reason_is_told_when_the_strategy_was_asked_for_and_no_group_can_be_cut():
    with pytest.raises(PolicyViolation, match="at most 1 nodes"):
        propose_tensor(model(head_unit=9), views(3), PlanRequest(strategy="tensor"))


def test_a_slow_node_that_was_named_gets_a_group_all_the_same():
    nodes = [view(0, ("q4_1", 9e9)), view(1, ("q4_1", 1e8))]
    [candidate] = propose_tensor(model(), nodes, named(nodes))
    assert [role.heads for role in candidate.roles] == [(0, 6), (6, 9)]


# --- both -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("online", "sizes"), [(0, []), (1, []), (2, [2]), (4, [2, 3, 4]), (12, range(2, 9))])
def test_without_a_request_the_first_two_to_eight_nodes_are_proposed(propose, online, sizes):
    nodes = views(online)
    candidates = propose(model(heads=36), nodes, PlanRequest())
    assert [[role.node_id for role in each.roles] for each in candidates] == [
        [node.node_id for node in nodes[:size]] for size in sizes
    ]


@BOTH
def test_requested_nodes_keep_their_order_and_are_all_used(propose):
    nodes = [view(2), view(0), view(1)]
    [candidate] = propose(model(), nodes, named(nodes))
    assert [role.node_id for role in candidate.roles] == ["node2", "node0", "node1"]


@BOTH
def test_shares_without_nodes_say_how_many_nodes_there_are(propose):
    [candidate] = propose(model(), views(5), PlanRequest(shares=(2.0, 1.0)))
    assert [role.node_id for role in candidate.roles] == ["node0", "node1"]
    assert [role.share for role in candidate.roles] == [2 / 3, 1 / 3]


@BOTH
def test_prices_and_memory_are_left_to_the_core(propose):
    [candidate] = propose(model(), views(2), PlanRequest())
    assert candidate.predicted.tpot_ms is None
    assert candidate.refused_because is None
    assert [role.memory_bytes for role in candidate.roles] == [0, 0]


@BOTH
@pytest.mark.parametrize(
    ("count", "shares", "says"),
    [
        (2, (1, 1, 1), "one share for each of 2 nodes; 3 came: 1:1:1"),
        (3, (2, 1), "one share for each of 3 nodes; 2 came: 2:1"),
        (2, (1, 0), "shares above 0; 1:0 came"),
        (2, (1, -1), "shares above 0"),
        (2, (1, float("nan")), "shares above 0"),
        (2, (1, float("inf")), "shares above 0"),
        (2, (), "one share for each of 2 nodes"),
        (1, None, "at least two nodes"),
        (1, (1,), "at least two nodes"),
        (0, None, "at least two nodes"),
    ],
)
def test_shares_and_nodes_that_do_not_fit_are_refused(propose, count, shares, says):
    nodes = views(count)
    with pytest.raises(ConfigError, match=says) as refusal:
        propose(model(), nodes, named(nodes, shares=shares))
    assert refusal.value.remedy


@BOTH
def test_more_shares_than_there_are_nodes_are_refused(propose):
    with pytest.raises(ConfigError, match="one share for each of 2 nodes; 3 came"):
        propose(model(), views(2), PlanRequest(shares=(1, 1, 1)))


@pytest.mark.parametrize(("name", "propose"), [("layers", propose_layers), ("tensor", propose_tensor)])
def test_a_node_that_is_alone_is_told_so_when_it_asks_for_the_strategy(name, propose):
    with pytest.raises(PeerError, match=f"at least two nodes online for {name}; 1 came"):
        propose(model(), views(1), PlanRequest(strategy=name))
