"""Planning: the rules against brute force, the price against sums on paper, the choice against its words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from edged_plugins import layer_parallel, tensor_parallel
from hypothesis import given, settings
from hypothesis import strategies as st

from edged import planning, pricing, rules, sizes
from edged.errors import ConfigError, PeerError, PolicyViolation
from edged.planning import CORE_STRATEGIES
from edged.sizes import WORKER_BYTES
from edged.types import (
    Candidate,
    DeviceState,
    EngineEntry,
    EngineSpeed,
    LinkCost,
    LinkState,
    LinkTraffic,
    ModelDescription,
    NodeView,
    PlanRequest,
    Predicted,
    Range,
    Role,
    Strategy,
    TensorEntry,
)

settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")

MODEL = ModelDescription(
    architecture="llama", parameters=2200, layers=4, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=16,
    vocab=32, context_tokens=4096, weight_type="Q4_K_M", head_unit=2, ffn_unit=4, vocab_unit=8,
    layer_bytes=(1000, 1000, 1000, 1000), embedding_bytes=400, head_bytes=400,
)  # fmt: skip
STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        *CORE_STRATEGIES,
        *layer_parallel.edged_strategies({}),
        *tensor_parallel.edged_strategies({}),
    )
}


def role(rank: int, node_id: str, stage: int = 0, **parts: Any) -> Role:
    """The whole model, but for `parts`."""
    whole = {"layers": (0, 4), "heads": (0, 4), "ffn": (0, 16), "vocab": (0, 32), "share": 1.0}
    return Role(rank, node_id, stage, **(whole | parts))


def node(node_id: str, rtt_ms: Mapping[str, float | None] | None = None, **changes: Any) -> NodeView:
    """A measured node: 1000 bytes of weights and a thousand operations a millisecond."""
    links = tuple(LinkState(other, rtt) for other, rtt in (rtt_ms or {}).items())
    speeds = (EngineSpeed("shard", "Q4_K", 1e6, 1e6),)
    known = {"name": node_id.upper(), "links": links, "speeds": speeds, "engines": ("shard",)}
    return NodeView(node_id, **(known | changes))  # type: ignore[arg-type]


def by_id(*nodes: NodeView) -> dict[str, NodeView]:
    return {found.node_id: found for found in nodes}


PAIR = by_id(node("a", {"b": 4.0}), node("b"))
TENSOR = Candidate(
    "tensor",
    (
        role(0, "a", heads=(0, 2), ffn=(0, 4), vocab=(0, 8)),
        role(1, "b", heads=(2, 4), ffn=(4, 16), vocab=(8, 32)),
    ),
)
LAYERS = Candidate(
    "layers", (role(0, "a", layers=(0, 3), vocab=(0, 0)), role(1, "b", stage=1, layers=(3, 4)))
)
LOCAL = Candidate("local", (role(0, "a"),))
SHORT = PlanRequest(prompt_tokens=1)  # so that the KV cache is next to nothing
EXACT = dataclasses.replace(SHORT, numerics="exact")


def sum_ms(ping_ms: float) -> float:
    """Of one all-reduce over a link that was only pinged, and is slow enough to sleep through."""
    return ping_ms / 2 + 1000 * (pricing.REDUCE_S + pricing.SLEPT_REDUCE_S)


def judged(
    plan: Candidate, model: ModelDescription, nodes: dict[str, NodeView], request: PlanRequest
) -> tuple[str | None, str | None]:
    """The rule that a plan breaks, and the reason."""
    found = rules.refused(plan, model, nodes, request)
    return found.broken_rule, found.refused_because


# --- coverage: brute force ------------------------------------------------------------------------


def covers(roles: Sequence[Role], model: ModelDescription) -> bool:
    """The rule by its meaning: each part of the model is computed by exactly one rank, in its place."""
    stages: dict[int, list[Role]] = {}
    for part in roles:
        stages.setdefault(part.stage, []).append(part)
    if sorted(stages) != list(range(len(stages))):
        return False
    for ranges, size, unit in (
        *(([p.heads for p in ranks], model.heads, model.head_unit) for ranks in stages.values()),
        *(([p.ffn for p in ranks], model.ffn, model.ffn_unit) for ranks in stages.values()),
        ([stages[s][0].layers for s in sorted(stages)], model.layers, 1),
        ([p.vocab for p in stages[max(stages)]], model.vocab, model.vocab_unit),
    ):
        owners = [[i for i, (start, end) in enumerate(ranges) if start <= x < end] for x in range(size)]
        if any(len(owner) != 1 for owner in owners):
            return False
        order = [owner[0] for owner in owners]
        if order != sorted(order) or set(order) != set(range(len(ranges))):
            return False  # a rank without work, or out of order
        if any(start < 0 or end > size for start, end in ranges):
            return False
        if any(start % unit for start, _ in ranges):
            return False
    same_layers = all(len({p.layers for p in ranks}) == 1 for ranks in stages.values())
    is_headless = all(p.vocab == (0, 0) for p in roles if p.stage != max(stages))
    return same_layers and is_headless


def cut(data: st.DataObject, size: int, unit: int, parts: int) -> list[Range]:
    units = math.ceil(size / unit)
    edges = data.draw(
        st.lists(st.integers(1, units - 1), min_size=parts - 1, max_size=parts - 1, unique=True)
    )
    ends = [*(edge * unit for edge in sorted(edges)), size]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def sound_plan(data: st.DataObject) -> list[Role]:
    """Any plan that covers MODEL: one to four stages of one or two ranks."""
    stages = cut(data, MODEL.layers, 1, data.draw(st.integers(1, 4)))
    roles: list[Role] = []
    for stage, layers in enumerate(stages):
        ranks = data.draw(st.integers(1, 2))
        heads = cut(data, MODEL.heads, MODEL.head_unit, ranks)
        ffn = cut(data, MODEL.ffn, MODEL.ffn_unit, ranks)
        vocab = cut(data, MODEL.vocab, MODEL.vocab_unit, ranks)
        for h, f, v in zip(heads, ffn, vocab, strict=True):
            last = v if stage == len(stages) - 1 else (0, 0)
            number = len(roles)
            roles.append(
                role(number, str(number), stage, layers=layers, heads=h, ffn=f, vocab=last, share=1 / ranks)
            )
    return roles


RANGES = st.tuples(st.integers(-1, 33), st.integers(-1, 33))


@settings(max_examples=300)
@given(data=st.data())
def test_a_plan_is_allowed_exactly_when_each_part_of_the_model_has_one_rank(data: st.DataObject) -> None:
    roles = sound_plan(data)
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(roles) - 1))
        what = data.draw(st.sampled_from(["layers", "heads", "ffn", "vocab", "stage", "drop", "nudge"]))
        if what == "drop" and len(roles) > 1:
            del roles[at]
            roles = [dataclasses.replace(r, rank=i) for i, r in enumerate(roles)]
        elif what == "stage":
            roles[at] = dataclasses.replace(roles[at], stage=data.draw(st.integers(-1, 4)))
        elif what == "nudge":
            field = data.draw(st.sampled_from(["layers", "heads", "ffn", "vocab"]))
            start, end = getattr(roles[at], field)
            by = data.draw(st.tuples(st.integers(-1, 1), st.integers(-1, 1)))
            roles[at] = dataclasses.replace(roles[at], **{field: (start + by[0], end + by[1])})
        elif what != "drop":
            roles[at] = dataclasses.replace(roles[at], **{what: data.draw(RANGES)})
    links = {str(number): 1.0 for number in range(8)}
    nodes = by_id(*(node(str(number), links) for number in range(8)))
    reason = judged(Candidate("any", tuple(roles)), MODEL, nodes, PlanRequest())[1]
    assert (reason is None) == covers(roles, MODEL), reason


def test_the_last_unit_may_be_shorter() -> None:
    model = dataclasses.replace(MODEL, vocab=30)
    short = [dataclasses.replace(r, vocab=v) for r, v in zip(TENSOR.roles, [(0, 24), (24, 30)], strict=True)]
    assert judged(Candidate("tensor", tuple(short)), model, PAIR, PlanRequest()) == (None, None)


# --- who may take part ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "nodes", "request_", "rule", "reason"),
    [
        (TENSOR, PAIR, {}, None, None),
        (LAYERS, PAIR, {}, None, None),
        (LOCAL, PAIR, {}, None, None),
        (LOCAL, PAIR, {"private": True}, None, None),
        (Candidate("none", ()), PAIR, {}, "ranks", "its ranks are not 0, 1, 2, ..."),
        (Candidate("x", (role(1, "a"),)), PAIR, {}, "ranks", "its ranks are not 0, 1, 2, ..."),
        (Candidate("x", TENSOR.roles[::-1]), PAIR, {}, "ranks", "its ranks are not 0, 1, 2, ..."),
        (Candidate("x", (role(0, "a"), role(1, "a"))), PAIR, {}, "nodes", "a node has more than one role"),
        (TENSOR, by_id(node("a")), {}, "nodes", "node b is not known"),
        (TENSOR, by_id(node("a"), node("b")), {}, "links", "A and B have no connection to each other"),
        (TENSOR, by_id(node("a"), node("b", {"a": None})), {}, None, None),  # unmeasured, but there
        (TENSOR, PAIR | by_id(node("b", online=False)), {}, "online", "B: it is offline"),
        (
            TENSOR,
            PAIR | by_id(node("b", zone="guest")),
            {},
            "zone",
            "B: it is a guest, and this job uses own nodes only",
        ),
        (TENSOR, PAIR | by_id(node("b", zone="guest")), {"allow_guest": True}, None, None),
        (
            TENSOR,
            PAIR | by_id(node("b", rights=("submit", "train"))),
            {},
            "rights",
            "B: it has no right to serve",
        ),
        (LOCAL, PAIR | by_id(node("a", rights=())), {}, None, None),  # my own work on my own node
        (
            TENSOR,
            PAIR,
            {"private": True},
            "privacy",
            "B: this job is private, and its prompt would leave the node",
        ),
    ],
)
def test_who_may_take_part(
    plan: Candidate,
    nodes: dict[str, NodeView],
    request_: dict[str, Any],
    rule: str | None,
    reason: str | None,
) -> None:
    assert judged(plan, MODEL, nodes, PlanRequest(**request_)) == (rule, reason)


@pytest.mark.parametrize(
    ("head_dim", "cache_type", "numerics", "is_refused"),
    [
        (80, "q8_0", "fast", True),
        (96, "q8_0", "fast", False),
        (80, "f16", "fast", False),
        (80, "q8_0", "exact", False),  # whose cache is F32 whatever the profile says
    ],
)
def test_a_cache_of_blocks_that_heads_do_not_fill_is_refused_before_anything_is_fetched(
    head_dim: int, cache_type: Any, numerics: Any, is_refused: bool
) -> None:
    model = dataclasses.replace(MODEL, head_dim=head_dim)
    request = PlanRequest(cache_type=cache_type, numerics=numerics)
    rule, refused = judged(LOCAL, model, by_id(node("a")), request)
    assert rule == ("cache" if is_refused else None)
    if refused:
        assert "multiple of 32 elements, and this model's have 80; set jobs.cache_type to f16" in refused


@pytest.mark.parametrize(("budget", "is_refused"), [(None, False), (0, True), (-1, True), (1, False)])
def test_a_part_that_does_not_fit_is_refused_with_both_sizes(budget: int | None, is_refused: bool) -> None:
    """`budget`: None, nothing, or that many bytes above (or below) what the part needs."""
    needed = sizes.memory_of(LOCAL.roles[0], MODEL, PlanRequest())
    given_ = {0: 0, -1: needed - 1, 1: needed}.get(budget) if budget is not None else None
    nodes = by_id(node("a", memory_budget=given_))
    refused = planning.finish(LOCAL, MODEL, nodes, PlanRequest()).refused_because
    assert (refused is not None) == is_refused
    if refused:
        assert refused.startswith("A: its part needs 96 MiB and the budget is ")


# --- memory and price: sums on paper --------------------------------------------------------------


def test_memory_is_weights_cache_and_worker() -> None:
    """Half the heads (of 192 attention parameters a layer), a quarter of the columns (of 384): a third
    of two layers of 1000 bytes. The cache: keys and values, two layers, 100 tokens, one KV head of 2."""
    part = role(0, "a", layers=(0, 2), heads=(0, 2), ffn=(0, 4), vocab=(0, 0))
    assert sizes.weight_bytes_of(part, MODEL) == 667
    cache = 2 * 2 * 100 * 1 * 2
    fast = sizes.memory_of(part, MODEL, PlanRequest(context_tokens=100))
    assert fast == 667 + 2 * cache + WORKER_BYTES
    exact = sizes.memory_of(part, MODEL, PlanRequest(context_tokens=100, numerics="exact"))
    stored = 4 * 1000 + 400  # head and embedding are one tensor
    assert exact == round(667 * 4 * 2200 / stored) + 4 * cache + WORKER_BYTES


def test_a_description_that_says_what_is_cut_is_believed() -> None:
    """Half of 300 bytes cut by heads, a quarter of 600 by columns, 100 that every rank holds; and one sum
    a layer halves the waiting and the traffic."""
    told = dataclasses.replace(MODEL, layer_cuts=((300, 600, 100),) * 4, reductions=1)
    part = role(0, "a", layers=(0, 2), heads=(0, 2), ffn=(0, 4), vocab=(0, 0))
    assert sizes.weight_bytes_of(part, told) == 2 * (150 + 150 + 100)
    halves = (role(0, "a", heads=(0, 2), ffn=(0, 8), vocab=(0, 16)), role(1, "b", heads=(2, 4), ffn=(8, 16)))
    nodes = {"a": node("a", {"b": 1.0}), "b": node("b", {"a": 1.0})}
    one, two = (
        planning.price(Candidate("tensor", halves), model, nodes, SHORT)
        for model in (told, dataclasses.replace(told, reductions=2))
    )
    assert one.tpot_ms is not None
    assert two.tpot_ms == pytest.approx(one.tpot_ms + 4 * sum_ms(1.0), rel=1e-2)
    assert two.bytes_per_token == 2 * one.bytes_per_token


def test_the_output_head_counts_by_its_rows() -> None:
    part = role(0, "a", layers=(0, 1), vocab=(8, 32))
    assert sizes.weight_bytes_of(part, MODEL) == 1000 + 300
    assert sizes.weight_bytes_of(role(0, "a"), MODEL) == 4400


def test_the_price_of_one_node_is_its_bytes_over_its_speed() -> None:
    """4400 bytes at 1000 a millisecond; 2 operations a parameter, 10 tokens, 1000 a millisecond."""
    price = planning.price(LOCAL, MODEL, PAIR, PlanRequest(prompt_tokens=10))
    assert price.tpot_ms == pytest.approx(4.4 + 2 * 2 * 4 * 2 * 2 * 10 / 1000)  # and ten rows of the cache
    assert price.ttft_ms == pytest.approx(2 * 2200 * 10 / 1000)
    assert price.bytes_per_token == 0


def test_the_price_of_a_tensor_group_is_its_slowest_rank_and_two_exchanges_a_layer() -> None:
    """Rank 1: half of attention, three quarters of the rest: (96 + 288) / 576 of 4000, and 300 of 400."""
    price = planning.price(TENSOR, MODEL, PAIR, SHORT)
    slowest = 4000 * 384 / 576 + 300
    assert price.tpot_ms == pytest.approx(slowest / 1000 + 2 * 4 * sum_ms(4.0), rel=1e-2)
    assert price.bytes_per_token == 2 * 4 * 2 * 8 * 4  # all-reduces, both ways, a hidden state in F32


def test_the_price_of_stages_is_their_sum_and_half_a_round_trip_a_hop() -> None:
    price = planning.price(LAYERS, MODEL, PAIR, SHORT)
    assert price.tpot_ms == pytest.approx(
        3.0 + 1.4 + 2 * (4.0 / 2 + 1000 * (pricing.HOP_S + pricing.SLEPT_HOP_S)), rel=0.02
    )
    assert price.bytes_per_token == 8 * 4


def test_a_remote_node_costs_the_way_there_and_back_once() -> None:
    """It draws its tokens itself."""
    here, there = (
        planning.price(Candidate(name, (role(0, node_id),)), MODEL, PAIR, PlanRequest())
        for name, node_id in (("local", "a"), ("remote", "b"))
    )
    assert there.tpot_ms == here.tpot_ms
    assert there.ttft_ms == pytest.approx(here.ttft_ms + 4.0)


@pytest.mark.parametrize(
    "nodes",
    [
        PAIR | by_id(node("b", speeds=())),
        PAIR | by_id(node("b", speeds=(EngineSpeed("shard", "Q8_0", 1e6, 1e6),))),
        by_id(node("a", {"b": None}), node("b")),
    ],
    ids=["no speed", "another type's speed", "no round trip"],
)
def test_what_was_not_measured_has_no_price(nodes: dict[str, NodeView]) -> None:
    price = planning.price(TENSOR, MODEL, nodes, PlanRequest())
    assert price == Predicted(bytes_per_token=512, bytes_per_link=(LinkTraffic(("a", "b"), 512),))


def test_a_device_takes_longer_by_what_it_sustains_of_its_benchmark() -> None:
    speeds = (EngineSpeed("shard", "Q4_K", 1e6, 1e6, 1e-3, 2e-3),)
    hot = tuple(dataclasses.replace(speed, sustained=0.5) for speed in speeds)
    nodes = node("a", speeds=speeds), node("a", speeds=hot)
    cool, slow = (pricing.rank_times(LOCAL.roles[0], MODEL, each, PlanRequest()) for each in nodes)
    assert cool is not None
    assert slow == pytest.approx([2 * seconds for seconds in cool])


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_token_attends_to_those_before_it_with_this_ranks_query_heads(tokens: int) -> None:
    (plain,) = node("a").speeds
    attending = dataclasses.replace(plain, attend_s=1e-6)
    part = TENSOR.roles[1]
    asked = PlanRequest(prompt_tokens=tokens)
    weights_s, beside_s = pricing.token_parts(part, MODEL, attending, asked, tokens)
    assert weights_s == pricing.token_parts(part, MODEL, plain, asked, tokens)[0]
    assert beside_s == pytest.approx(MODEL.layers * 2 * MODEL.head_dim * tokens * 1e-6)


@pytest.mark.parametrize("sustained", [0.0, -0.5, 1.5, float("nan")])
def test_a_part_of_a_benchmark_that_cannot_be_counts_as_unmeasured(sustained: float) -> None:
    speeds = (EngineSpeed("shard", "Q4_K", 1e6, 1e6, sustained=sustained),)
    assert pricing.speed_of(node("a", speeds=speeds), "Q4_K") is None


@pytest.mark.parametrize(
    ("weight_type", "found"), [("Q4_K", 2.0), ("Q4_K_M", 2.0), ("Q4_K_S", 3.0), ("Q8_0", None), ("Q4", None)]
)
def test_a_mixed_type_counts_as_its_main_one(weight_type: str, found: float | None) -> None:
    speeds = (EngineSpeed("e", "Q4_K_S", 3.0, 1.0), EngineSpeed("e", "Q4_K", 2.0, 1.0))
    speed = pricing.speed_of(node("a", speeds=speeds), weight_type)
    assert (speed.decode_bytes_s if speed else None) == found


def bucket_time(link: LinkCost, size: float, idle_s: float, periods: int = 200) -> float:
    """Seconds of a message on a link that fills a bucket all the time, once it is steady: by simulation."""
    filled, waited = 0.0, 0.0
    for _ in range(periods):
        filled = min(link.burst_bytes, filled + idle_s * link.bytes_s)
        waited = max(0.0, size - filled) / link.bytes_s
        filled = max(0.0, filled - size)
    return link.latency_s + waited


@given(st.floats(0, 1e4), st.floats(1, 1e4), st.floats(0, 0.05), st.sampled_from([0.0, 1e-3]))
def test_a_bucket_lets_through_at_once_what_came_in_between(
    burst: float, size: float, idle_s: float, latency_s: float
) -> None:
    """While a message waits the bucket gains nothing: all that comes is sent at once."""
    link = LinkCost(latency_s, 1e6, burst)
    assert link.time_s(size, idle_s) == pytest.approx(bucket_time(link, size, idle_s), abs=1e-9)
    assert LinkCost(latency_s, 1e6).time_s(size, idle_s) == pytest.approx(latency_s + size / 1e6)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"latency_s": -1.0},
        {"latency_s": math.nan},
        {"bandwidth_bytes_s": -1.0},
        {"burst_bytes": math.nan},
    ],
    ids=str,
)
def test_a_link_that_cannot_be_counts_as_unmeasured(nonsense: dict[str, float]) -> None:
    link = dataclasses.replace(LinkState("b", 4.0, 1e6, True, 1e-4), **nonsense)
    found = pricing.link_cost(by_id(NodeView("a", "A", links=(link,)), node("b")), "a", "b")
    assert found == LinkCost(2e-3, pricing.PING_BYTES_S)


@pytest.mark.parametrize(
    ("a_says", "b_says", "rtt"), [(3.0, None, 3.0), (None, 5.0, 5.0), (3.0, 5.0, 3.0), (None, None, None)]
)
def test_a_link_that_was_only_pinged_takes_half_a_ping(
    a_says: float | None, b_says: float | None, rtt: float | None
) -> None:
    nodes = by_id(node("a", {"b": a_says}), node("b", {"a": b_says}))
    found = pricing.link_cost(nodes, "a", "b")
    assert (found and found.latency_s) == (rtt and pytest.approx(rtt / 2000))
    assert pricing.link_cost(nodes, "a", "a") == LinkCost(0.0, math.inf)


def test_a_measured_link_counts_before_its_pings_and_the_worse_end_counts() -> None:
    a = dataclasses.replace(node("a"), links=(LinkState("b", 9.0, 2e6, True, 1e-4),))
    b = dataclasses.replace(node("b"), links=(LinkState("a", 9.0, 1e6, True, 5e-5),))
    assert pricing.link_cost(by_id(a, b), "a", "b") == LinkCost(1e-4, 1e6)
    assert pricing.link_cost(by_id(a, node("b", {"a": 1.0})), "b", "a") == LinkCost(1e-4, 2e6)


# --- the choice -----------------------------------------------------------------------------------


def offer(size: int, tpot_ms: float | None, refused: str | None = None) -> Candidate:
    roles = tuple(role(rank, str(rank)) for rank in range(size))
    return Candidate("any", roles, Predicted(tpot_ms=tpot_ms), refused)


@pytest.mark.parametrize(
    ("offers", "chosen"),
    [
        ([], None),
        ([offer(1, 10, "no"), offer(2, 5, "no")], None),
        ([offer(1, 100), offer(2, 96)], 0),  # too little for another node
        ([offer(1, 100), offer(2, 94)], 1),
        ([offer(2, 94), offer(1, 100)], 0),
        ([offer(1, 100), offer(2, 86), offer(3, 85)], 1),  # the third node gains one in a hundred
        ([offer(1, 100), offer(2, 96), offer(3, 94)], 2),
        ([offer(1, 100), offer(1, 99)], 1),
        ([offer(1, 100), offer(1, 100)], 0),
        ([offer(1, 100, "no"), offer(2, 99)], 1),
        ([offer(1, None), offer(2, 500)], 1),  # the measured one
        ([offer(3, None), offer(2, None)], 1),  # the fewest
        ([offer(1, 100), offer(2, None)], 0),
    ],
)
def test_the_choice(offers: list[Candidate], chosen: int | None) -> None:
    assert planning.choose(offers) == chosen


TIMES = st.none() | st.integers(1, 200).map(float)


@settings(max_examples=300)
@given(st.lists(st.builds(offer, st.integers(1, 4), TIMES, st.none() | st.just("no")), max_size=7))
def test_the_choice_is_the_largest_group_that_is_worth_its_nodes(offers: list[Candidate]) -> None:
    """Worth them: a twentieth faster than the fastest smaller group that is. Then by time, then by order."""

    def time(candidate: Candidate) -> float:
        return math.inf if candidate.predicted.tpot_ms is None else candidate.predicted.tpot_ms

    allowed = [c for c in offers if c.refused_because is None]

    def is_worth(candidate: Candidate) -> bool:
        smaller = [c for c in allowed if len(c.roles) < len(candidate.roles) and is_worth(c)]
        return not smaller or time(candidate) < planning.GAIN_OF_MORE * min(map(time, smaller))

    worth = [c for c in allowed if is_worth(c)]
    chosen = planning.choose(offers)
    if not worth:
        assert chosen is None
        return
    size = max(len(c.roles) for c in worth)
    fastest = min(time(c) for c in worth if len(c.roles) == size)
    expected = next(
        i for i, c in enumerate(offers) if c in worth and len(c.roles) == size and time(c) == fastest
    )
    assert chosen is not None
    assert offers[chosen] == offers[expected]


# --- all of it ------------------------------------------------------------------------------------

BILLION = ModelDescription(
    architecture="llama", parameters=10**9, layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64,
    ffn=8192, vocab=128_000, context_tokens=8192, weight_type="Q4_K", head_unit=4, ffn_unit=256,
    vocab_unit=1, layer_bytes=(40_000_000,) * 16, embedding_bytes=100_000_000, head_bytes=100_000_000,
)  # fmt: skip


def group(rtt_ms: float, *bytes_s: float) -> list[NodeView]:
    names = "abcd"[: len(bytes_s)]
    links = dict.fromkeys(names, rtt_ms)
    return [
        node(
            name,
            {other: rtt for other, rtt in links.items() if other != name},
            speeds=(EngineSpeed("shard", "Q4_K", speed, 100 * speed),),
        )
        for name, speed in zip(names, bytes_s, strict=True)
    ]


@pytest.mark.parametrize(
    ("rtt_ms", "speeds", "strategy", "nodes"),
    [
        (100.0, (10e9, 5e9), "local", "a"),  # 32 all-reduces of 100 ms
        (0.2, (10e9, 5e9), "tensor", "ab"),
        (0.2, (10e9, 5e9, 5e9), "tensor", "abc"),
        (0.2, (10e9, 0.2e9), "local", "a"),  # one group of heads is more than the slow one can carry
        (0.2, (1e9, 50e9), "remote", "b"),
        (20.0, (1e9, 50e9), "remote", "b"),
    ],
    ids=[
        "slow link",
        "fast link, uneven",
        "three",
        "a node too slow to help",
        "near and strong",
        "far, strong",
    ],
)
def test_auto_picks_what_the_links_and_devices_allow(
    rtt_ms: float, speeds: tuple[float, ...], strategy: str, nodes: str
) -> None:
    candidates = planning.consider(STRATEGIES, BILLION, group(rtt_ms, *speeds), PlanRequest())
    chosen = planning.choose(candidates)
    assert chosen is not None
    assert candidates[chosen].strategy == strategy
    assert "".join(sorted(r.node_id for r in candidates[chosen].roles)) == nodes


def test_auto_picks_the_fastest_candidate_there_is_but_for_hysteresis() -> None:
    """Brute force over what was proposed, priced apart."""
    nodes = group(0.5, 8e9, 6e9, 4e9)
    candidates = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest())
    times = [planning.price(c, BILLION, by_id(*nodes), PlanRequest()).tpot_ms for c in candidates]
    chosen = planning.choose(candidates)
    assert chosen is not None
    assert times[chosen] is not None
    assert all(time is None or times[chosen] * planning.GAIN_OF_ANOTHER <= time for time in times)


def test_layers_win_where_memory_forbids_everything_else() -> None:
    nodes = [dataclasses.replace(found, memory_budget=600 << 20) for found in group(50.0, 5e9, 5e9)]
    candidates = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest(context_tokens=512))
    chosen = planning.choose(candidates)
    assert chosen is not None
    assert candidates[chosen].strategy == "layers"
    refused = {c.strategy: c.refused_because for c in candidates if c.refused_because}
    assert refused["local"].startswith("A: its part needs ")
    assert refused["remote"].startswith("B: its part needs ")


def test_named_nodes_are_taken_in_their_order() -> None:
    nodes = group(0.2, 5e9, 5e9, 5e9)
    found = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest("layers", nodes=("c", "a")))
    assert [[r.node_id for r in c.roles] for c in found] == [["c", "a"]]
    assert found[0].refused_because is None


@pytest.mark.parametrize(
    ("asked", "strategies"),
    [
        ({}, {"local", "remote", "layers", "tensor"}),
        ({"nodes": ("a",)}, {"local"}),
        ({"nodes": ("b",)}, {"remote"}),
        ({"nodes": ("a", "b")}, {"layers", "tensor"}),
        ({"nodes": ("a", "b"), "shares": (2.0, 1.0)}, {"layers", "tensor"}),
    ],
)
def test_auto_asks_the_strategies_that_fit_the_named_nodes(
    asked: dict[str, Any], strategies: set[str]
) -> None:
    found = planning.consider(STRATEGIES, BILLION, group(0.2, 5e9, 5e9), PlanRequest(**asked))
    assert {c.strategy for c in found} == strategies


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"strategy": "tenser"}, ConfigError, "no strategy 'tenser'; loaded: auto, cloud, hybrid, layers"),
        ({"strategy": "local", "nodes": ("b",)}, ConfigError, "local runs on the submitting node"),
        ({"strategy": "remote", "nodes": ("a", "b")}, ConfigError, "remote takes one of --nodes; 2 came"),
        ({"strategy": "remote", "nodes": ("a",)}, ConfigError, "remote runs on another node"),
        ({"strategy": "layers", "nodes": ("a",)}, ConfigError, "at least two nodes"),
    ],
)
def test_a_strategy_named_by_hand_says_why_it_cannot(
    asked: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        planning.consider(STRATEGIES, BILLION, group(0.2, 5e9, 5e9), PlanRequest(**asked))


def test_remote_alone_needs_another_node() -> None:
    with pytest.raises(PeerError) as caught:
        planning.consider(STRATEGIES, BILLION, group(0.2, 5e9), PlanRequest("remote"))
    assert caught.value.code == "no-peers"


def test_with_auto_a_strategy_that_cannot_is_a_refused_candidate() -> None:
    def cannot(*arguments: Any) -> list[Candidate]:
        raise PolicyViolation("expected a moon", remedy="wait")

    strategies = {"lunar": Strategy("lunar", cannot), **STRATEGIES}
    found = planning.consider(strategies, BILLION, group(0.2, 5e9), PlanRequest())
    assert [c.refused_because for c in found if c.strategy == "lunar"] == ["expected a moon; wait"]
    assert planning.choose(found) is not None


def test_what_a_strategy_proposes_is_checked_whoever_it_is() -> None:
    """A plugin's plan that leaves out a layer does not run."""
    part = role(0, "a", layers=(0, 3))
    strategies = {"rash": Strategy("rash", lambda *_: [Candidate("rash", (part,))])}
    [found] = planning.consider(strategies, MODEL, [node("a")], PlanRequest("rash"))
    assert found.broken_rule == "coverage"
    assert found.refused_because == "its stages do not cover the layers 0 to 4 in order"


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        (role(0, "a", layers=(0, 10**9)), "coverage"),
        (role(0, "a", layers=(-4, 4)), "coverage"),
        (role(0, "a", share=math.nan), "shares"),
        (role(0, "a", share=0.0), "shares"),
        (role(0, "nobody"), "nodes"),
        (role(7, "a"), "ranks"),
        (role(0, "a", stage=3), "ranks"),
        (role(0, "a", heads=("0", "4")), "form"),
        (role(0, "a", layers=(0,)), "form"),
        (role(0, "a", share=None), "form"),
        ("no role at all", "form"),
    ],
)
def test_a_plugin_s_nonsense_is_a_plan_refused_by_name(made: Any, rule: str) -> None:
    strategies = {"rash": Strategy("rash", lambda *_: [Candidate("rash", (made,))])}
    [found] = planning.consider(strategies, MODEL, [node("a")], PlanRequest("rash"))
    assert (found.broken_rule, found.predicted) == (rule, Predicted())
    assert found.refused_because


@pytest.mark.parametrize("made", [None, {}, "a plan", Candidate("x", ({},), refused_because="no")])  # type: ignore[arg-type]
def test_what_is_no_candidate_at_all_is_refused_and_the_others_stand(made: Any) -> None:
    strategies = {"rash": Strategy("rash", lambda *_: [made]), **STRATEGIES}
    found = planning.consider(strategies, MODEL, [node("a")], PlanRequest())
    assert [(c.strategy, c.broken_rule) for c in found if c.strategy == "rash"] == [("rash", "form")]
    assert planning.choose(found) is not None


def test_a_plugin_proposes_under_its_own_name_alone() -> None:
    strategies = {"rash": Strategy("rash", lambda *_: [dataclasses.replace(LOCAL, refused_because="")])}
    [found] = planning.consider(strategies, MODEL, [node("a")], PlanRequest("rash"))
    assert (found.strategy, found.refused_because) == ("rash", None)


@pytest.mark.parametrize("field", ["layer_s", "token_s", "attend_s"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_fixed_cost_that_cannot_be_counts_as_unmeasured(field: str, value: float) -> None:
    speed = dataclasses.replace(EngineSpeed("e", "Q4_0", 1e9, 1e9), **{field: value})
    assert pricing.speed_of(node("a", speeds=(speed,)), "Q4_0") is None


def test_bytes_by_link_add_up_to_those_of_a_token() -> None:
    """A stage of one, then a group of two: each of the two gets the row, and exchanges with the other."""
    stages = [
        role(0, "a", layers=(0, 1), vocab=(0, 0)),
        role(1, "b", stage=1, layers=(1, 4), heads=(0, 2), ffn=(0, 8), vocab=(0, 16)),
        role(2, "c", stage=1, layers=(1, 4), heads=(2, 4), ffn=(8, 16), vocab=(16, 32)),
    ]
    nodes = by_id(*(node(name, {"a": 1.0, "b": 1.0, "c": 1.0}) for name in "abc"))
    price = planning.price(Candidate("hybrid", tuple(stages)), MODEL, nodes, PlanRequest())
    row = 4 * MODEL.hidden
    assert {link.nodes: link.bytes for link in price.bytes_per_link} == {
        ("a", "b"): row,
        ("a", "c"): row,
        ("b", "c"): 2 * 2 * 3 * row,
    }
    assert price.bytes_per_token == sum(link.bytes for link in price.bytes_per_link)


WHOLE = EngineEntry(
    "whole", "", "", "", "", strategies=("local", "remote"), numerics=("fast",), remedy="load pieces"
)
PIECES = EngineEntry("pieces", "", "", "", "", strategies=("layers",), takes=("whole",))
ANY = EngineEntry("any", "", "", "", "")


def with_engines(nodes: list[NodeView], *names: str) -> list[NodeView]:
    return [dataclasses.replace(found, engines=names) for found in nodes]


def test_each_strategy_gets_the_first_engine_that_does_it() -> None:
    nodes = with_engines(group(0.2, 5e9, 5e9), "whole", "pieces", "any")
    found = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest(), (WHOLE, PIECES, ANY))
    engines = {c.strategy: c.engine for c in found}
    expected = {"local": "whole", "remote": "whole", "layers": "pieces"}
    assert engines == dict.fromkeys(engines, "any") | expected
    exact = PlanRequest("local", numerics="exact")
    [local] = planning.consider(STRATEGIES, BILLION, nodes, exact, (WHOLE, ANY))
    assert local.engine == "any"


def test_what_no_engine_does_is_refused_with_what_helps() -> None:
    nodes = with_engines(group(0.2, 5e9, 5e9), "whole")
    with pytest.raises(PolicyViolation, match="by layers: whole runs local or remote") as caught:
        planning.consider(STRATEGIES, BILLION, nodes, PlanRequest("layers"), [WHOLE])
    assert caught.value.remedy == "load pieces"
    with pytest.raises(PolicyViolation, match="exact numerics: whole has fast"):
        planning.consider(STRATEGIES, BILLION, nodes, PlanRequest("local", numerics="exact"), [WHOLE])
    found = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest(), [WHOLE])
    refused = {c.strategy: c.refused_because for c in found if c.refused_because}
    assert (
        refused["tensor"]
        == "no loaded engine runs this model by tensor: whole runs local or remote; load pieces"
    )
    assert {c.strategy for c in found if not c.refused_because} == {"local", "remote"}


def test_an_engine_that_only_trains_is_in_no_plan_to_generate() -> None:
    trains = EngineEntry("trains", "", "", "", "", strategies=(), takes=("whole",), remedy="add another file")
    nodes = with_engines(group(0.2, 5e9, 5e9), "trains", "whole")
    found = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest(), (trains, WHOLE))
    assert {c.engine for c in found if not c.refused_because} == {"whole"}
    with pytest.raises(PolicyViolation, match="by local: trains runs none") as caught:
        planning.consider(STRATEGIES, BILLION, nodes, PlanRequest("local"), [trains])
    assert caught.value.remedy == "add another file"


def test_a_node_without_the_engine_gets_no_role() -> None:
    near, far = group(0.2, 5e9, 5e9)
    nodes = [*with_engines([near], "any"), *with_engines([far], "whole")]
    [local, remote] = [
        planning.consider(STRATEGIES, BILLION, nodes, PlanRequest(name), [ANY])[0]
        for name in ("local", "remote")
    ]
    assert local.refused_because is None
    assert remote.refused_because == "B: it has no engine 'any'; loaded: whole"


def test_no_plan_says_every_reason_once() -> None:
    error = planning.refusal([offer(1, None, "too hot"), offer(1, None, "too hot"), offer(2, None, "asleep")])
    assert str(error) == "no plan can run; any: too hot; any: asleep"
    assert error.code == "no-plan"
    assert str(planning.refusal([])) == "no plan can run; nothing was proposed"


def test_the_explanation_warns_where_one_node_alone_is_faster() -> None:
    nodes = group(100.0, 10e9, 5e9)
    found = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest())
    tensor = next(i for i, c in enumerate(found) if c.strategy == "tensor")
    said = planning.explain(found, tensor, by_id(*nodes))
    [alone] = [c for c in found if c.strategy == "local"]
    assert re.search(r"ms per token after \d+ ms to the first \(chosen\)\.$", said[tensor])
    assert said[-1] == f"Warning: one node alone should take {alone.predicted.tpot_ms:.1f} ms per token."
    local = found.index(alone)
    assert not any("Warning" in line for line in planning.explain(found, local, by_id(*nodes)))


def test_the_explanation_names_nodes_reasons_and_what_is_unmeasured() -> None:
    plain = dataclasses.replace(LOCAL, predicted=Predicted())
    said = planning.explain(
        [plain, dataclasses.replace(TENSOR, refused_because="too hot", broken_rule="saving")], None, PAIR
    )
    assert said == [
        "local on A: speed unknown, a device is unmeasured.",
        "tensor on A, B: refused by the rule 'saving', too hot.",
    ]


def test_a_node_without_any_sensor_is_planned_for_like_another() -> None:
    found = planning.consider(STRATEGIES, MODEL, [NodeView("a", "A", device=DeviceState())], PlanRequest())
    assert [c.strategy for c in found if c.refused_because is None] == ["local"]


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan")])
def test_a_speed_that_cannot_be_counts_as_unmeasured(speed: float) -> None:
    node = NodeView("n", "n", speeds=(EngineSpeed("shard", "Q4_0", speed, 1e9),))
    assert pricing.speed_of(node, "Q4_0") is None


@pytest.mark.parametrize(
    "changed",
    [{"layers": (-1, 2)}, {"layers": (0, 10**6)}, {"heads": (2, 1)}, {"memory_bytes": -1}],
    ids=str,
)
def test_a_role_outside_its_model_is_told_apart(changed: dict[str, object]) -> None:
    model = MODEL
    sound = planning.whole(NodeView("n", "n"), model, "local").roles[0]
    assert sizes.is_within(sound, model)
    assert not sizes.is_within(dataclasses.replace(sound, **changed), model)  # type: ignore[arg-type] - a table's values


@pytest.mark.parametrize(
    "changed",
    [
        *({name: 0} for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")),
        {"kv_heads": -2},
        {"parameters": 0},
        {"context_tokens": 0},
        {"head_bytes": -1},
        {"layer_bytes": (1000, 1000, 1000, -1000)},
        {"layer_bytes": (1000,)},
        {"layer_bytes": (0, 0, 0, 0), "head_bytes": 0, "embedding_bytes": 0},
        {"layer_cuts": ((1000, 0, 0),)},
        {"tensors": (TensorEntry("a", "F32", (1,), 0, -4),)},
    ],
    ids=str,
)
def test_no_role_is_within_a_model_with_figures_that_none_has(changed: dict[str, Any]) -> None:
    sound = planning.whole(NodeView("n", "n"), MODEL, "local").roles[0]
    assert not sizes.is_within(sound, dataclasses.replace(MODEL, **changed))


def test_a_node_named_by_hand_that_did_not_answer_is_named() -> None:
    for strategy in ("auto", "layers"):
        request = PlanRequest(strategy, nodes=("a", "silent"))
        with pytest.raises(PeerError, match="expected node silent to say what it can do; it did not answer"):
            planning.consider(STRATEGIES, BILLION, group(0.2, 5e9), request)


# --- windows over weights ---------------------------------------------------------------------------

BIG = dataclasses.replace(
    MODEL,
    parameters=2_200_000_000,
    layer_bytes=(250 << 20,) * 4,
    head_bytes=100 << 20,
    embedding_bytes=100 << 20,
)
WINDOWED = EngineEntry("shard", "", "", "", "", window_bytes=16 << 20)
NO_WINDOW = EngineEntry("plain", "", "", "", "")
ENTIRE, HALF = role(0, "a"), role(0, "a", layers=(0, 2), vocab=(0, 0))
ASKED = PlanRequest(strategy="local", context_tokens=512)


@given(budget=st.integers(0, 2 << 30), part=st.sampled_from([ENTIRE, HALF]), exact=st.booleans())
def test_a_role_is_planned_with_what_it_needs_or_what_the_budget_has(
    budget: int, part: Role, exact: bool
) -> None:
    request = dataclasses.replace(ASKED, numerics="exact" if exact else "fast")
    full = sizes.memory_of(part, BIG, request)
    least = sizes.least_memory_of(part, BIG, request, WINDOWED.window_bytes)
    given_ = sizes.granted(part, BIG, request, budget, WINDOWED.window_bytes)
    assert (given_ <= budget) == (least <= budget or full <= budget)
    assert least <= given_ <= full
    assert given_ in (full, least, budget - budget // 16)
    planned = dataclasses.replace(part, memory_bytes=given_)
    room = sizes.weights_room(planned, BIG, request)
    if given_ == full:
        assert room == 0
    else:  # the parts make the whole
        cache_and_worker = full - sizes.held_bytes_of(part, BIG, request)
        assert room + cache_and_worker == given_
        assert room >= WINDOWED.window_bytes


def test_without_a_budget_or_an_engine_that_has_windows_all_must_fit() -> None:
    full = sizes.memory_of(ENTIRE, BIG, ASKED)
    assert sizes.granted(ENTIRE, BIG, ASKED, None, 16 << 20) == full
    assert sizes.granted(ENTIRE, BIG, ASKED, full - 1, 0) == full
    assert sizes.least_memory_of(ENTIRE, BIG, ASKED, 0) == full


@given(
    budget=st.none() | st.integers(0, 2 << 30),
    planned=st.integers(0, 2 << 30),
    part=st.sampled_from([ENTIRE, HALF]),
)
def test_a_role_is_admitted_with_what_was_planned_or_what_the_budget_still_has(
    budget: int | None, planned: int, part: Role
) -> None:
    full = sizes.memory_of(part, BIG, ASKED)
    least = sizes.least_memory_of(part, BIG, ASKED, WINDOWED.window_bytes)
    asked = dataclasses.replace(part, memory_bytes=planned)
    given_ = sizes.admitted(asked, BIG, ASKED, budget, WINDOWED.window_bytes)
    assert least <= given_ <= full
    assert (budget is None or given_ <= budget) == (budget is None or least <= budget)
    if planned and budget is not None and least <= planned <= full and least <= budget:
        assert given_ == min(planned, budget)
    assert sizes.admitted(asked, BIG, ASKED, budget, 0) == full  # without a window all must fit


def test_vectors_stay_in_memory_beside_the_window() -> None:
    vectors = (TensorEntry("a", "F32", (256,), 0, 1024), TensorEntry("b", "F32", (256, 2), 0, 2048))
    model = dataclasses.replace(BIG, tensors=vectors)
    least = sizes.least_memory_of(ENTIRE, BIG, ASKED, 16 << 20)
    assert sizes.least_memory_of(ENTIRE, model, ASKED, 16 << 20) == least + 1024


def considered(engine: EngineEntry, budget: int, speed: float = 1e6) -> Candidate:
    speeds = (EngineSpeed("shard", "Q4_K", speed, 1e6),)
    views = [node("a", memory_budget=budget, engines=("shard", "plain"), speeds=speeds)]
    [candidate] = planning.consider(STRATEGIES, BIG, views, ASKED, [engine])
    return candidate


def test_what_does_not_fit_is_priced_with_reading_it_again_and_refused_below_the_least() -> None:
    full = sizes.memory_of(ENTIRE, BIG, ASKED)
    least = sizes.least_memory_of(ENTIRE, BIG, ASKED, WINDOWED.window_bytes)
    fitting = considered(WINDOWED, full)
    assert fitting.predicted.tpot_ms is not None
    windowed = considered(WINDOWED, full // 2)
    assert windowed.refused_because is None
    [part] = windowed.roles
    assert part.memory_bytes <= full // 2
    dropped = full - part.memory_bytes  # bytes: what the budget is short of
    mapping_s = dropped / pricing.MAPPED_BYTES_S
    kept_up = fitting.predicted.tpot_ms + 1000 * mapping_s  # the disk does, with a device so slow
    assert windowed.predicted.tpot_ms == pytest.approx(kept_up)
    for speed in (1e8, 1e12):
        quick = [considered(WINDOWED, budget, speed).predicted.tpot_ms for budget in (full, full // 2)]
        assert quick[0] is not None
        assert quick[1] is not None
        read_s, compute_s = dropped / pricing.DISK_BYTES_S, sizes.weight_bytes_of(part, BIG) / speed
        waited_s = (quick[1] - quick[0]) / 1000 - mapping_s
        assert max(0.0, read_s - compute_s) - 1e-6 <= waited_s <= read_s + 1e-6
    assert waited_s == pytest.approx(read_s, rel=1e-3)
    for engine, needed, budget in ((WINDOWED, least, least - 1), (NO_WINDOW, full, full // 2)):
        refused = considered(engine, budget)
        words = f"A: its part needs {needed / 2**20:.0f} MiB and the budget is {budget / 2**20:.0f} MiB"
        assert refused.refused_because == words


def test_two_nodes_that_hold_a_model_win_over_one_that_reads_it_again() -> None:
    full = sizes.memory_of(ENTIRE, BIG, ASKED)
    views = [
        node("a", {"b": 1.0}, memory_budget=full * 2 // 3),
        node("b", {"a": 1.0}, memory_budget=full * 2 // 3),
    ]
    request = dataclasses.replace(ASKED, strategy="auto")
    candidates = planning.consider(STRATEGIES, BIG, views, request, [WINDOWED])
    chosen = planning.choose(candidates)
    assert chosen is not None
    assert len(candidates[chosen].roles) == 2
    alone = [c for c in candidates if len(c.roles) == 1]
    assert alone
    assert all(c.refused_because is None for c in alone)


# --- the price of links and of fixed work ---------------------------------------------------------


def linked(latency_s: float, bytes_s: float) -> dict[str, NodeView]:
    link = LinkState("b", 1.0, bytes_s, True, latency_s)
    return by_id(dataclasses.replace(node("a"), links=(link,)), node("b"))


def test_fixed_work_of_layers_and_tokens_counts() -> None:
    quick, slow = (
        by_id(node("a", speeds=(EngineSpeed("shard", "Q4_K", 1e6, 1e6, *fixed),)))
        for fixed in ((), (1e-3, 5e-3))
    )
    before, after = (planning.price(LOCAL, MODEL, nodes, SHORT).tpot_ms for nodes in (quick, slow))
    assert before is not None
    assert after == pytest.approx(before + 4 * 1 + 5)


def test_a_narrow_link_costs_its_bytes_and_a_narrower_codec_less() -> None:
    """At 1000 bytes a second 8 elements take 32 ms in F32 and 8.5 ms in blocks; exact numerics take F32."""
    fast, exact = (
        planning.price(TENSOR, MODEL, linked(0.0, 1e3), dataclasses.replace(SHORT, numerics=numerics)).tpot_ms
        for numerics in ("fast", "exact")
    )
    assert fast is not None
    assert exact is not None
    assert exact - fast == pytest.approx(8 * (32 - 8.5), rel=0.02)


@given(st.floats(1e-5, 0.1), st.floats(1e4, 1e9), st.floats(1.0, 4.0))
def test_a_worse_link_never_makes_a_plan_cheaper(latency_s: float, bytes_s: float, worse: float) -> None:
    """In exact numerics: a narrower codec is taken where it saves a twentieth, and not before."""
    for candidate in (TENSOR, LAYERS):
        good = planning.price(candidate, MODEL, linked(latency_s, bytes_s), EXACT).tpot_ms
        for links in (linked(latency_s * worse, bytes_s), linked(latency_s, bytes_s / worse)):
            found = planning.price(candidate, MODEL, links, EXACT).tpot_ms
            assert good is not None
            assert found is not None
            assert found >= good * (1 - 1e-6)
