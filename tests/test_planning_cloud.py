"""The strategy `cloud`: guests, and engines that compute outside; when each is refused and chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from edged_plugins import energy
from test_planning import BILLION, STRATEGIES, group

from edged import planning, rules, sizes
from edged.correcting import Corrections
from edged.errors import ConfigError, PeerError, PolicyViolation
from edged.types import (
    AdapterFile,
    Candidate,
    EngineEntry,
    NodeView,
    PlanRequest,
    Predicted,
    Role,
    Situation,
    Strategy,
)

STATED = Predicted(tpot_ms=20.0, ttft_ms=300.0, bytes_per_token=0)
OUTSIDE = EngineEntry(
    "outside", "", "", "", "", strategies=("cloud",), numerics=("fast",), models=("m",), stated=STATED
)
HERE = EngineEntry("here", "", "", "", "", adapters=True)
LORA = AdapterFile("a" * 64, 6 << 20)
NOTHING = ((0, 0),) * 4


def nodes_of(*speeds: float, guests: str = "") -> list[NodeView]:
    """Connected nodes a, b, c with both engines; those in `guests` are guests."""
    found = group(0.2, *speeds)
    engines = ("here", "outside")
    return [
        dataclasses.replace(each, engines=engines, zone="guest" if each.node_id in guests else "own")
        for each in found
    ]


def considered(members: list[NodeView], /, *engines: EngineEntry, **asked: Any) -> dict[str, list[Candidate]]:
    """Candidates by strategy."""
    found: dict[str, list[Candidate]] = {}
    for candidate in planning.consider(STRATEGIES, BILLION, members, PlanRequest(**asked), engines):
        found.setdefault(candidate.strategy, []).append(candidate)
    return found


def on(candidates: list[Candidate]) -> list[str]:
    return [role.node_id for candidate in candidates for role in candidate.roles]


# --- guests ---------------------------------------------------------------------------------------


def test_remote_takes_own_nodes_and_cloud_the_guests() -> None:
    found = considered(nodes_of(5e9, 5e9, 5e9, guests="c"), HERE)
    assert (on(found["remote"]), on(found["cloud"])) == (["b"], ["c"])
    assert found["cloud"][0].engine == "here"
    assert found["cloud"][0].predicted.tpot_ms == pytest.approx(found["remote"][0].predicted.tpot_ms)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "C: it is a guest, and this job uses own nodes only"),
        ({"allow_guest": True}, None),
        ({"allow_guest": True, "private": True}, "C: this job is private, and its prompt would leave"),
    ],
)
@pytest.mark.parametrize("strategy", ["auto", "cloud"])
def test_a_guest_needs_to_be_allowed_and_gets_no_private_job(
    strategy: str, asked: dict[str, Any], reason: str | None
) -> None:
    [found] = considered(nodes_of(5e9, 5e9, 5e9, guests="c"), HERE, strategy=strategy, **asked)["cloud"]
    assert (found.refused_because or "").startswith(reason or "")
    assert (found.refused_because is None) == (reason is None)


def test_a_guest_named_by_hand_is_one_for_remote_too() -> None:
    nodes = nodes_of(5e9, 5e9, guests="b")
    assert on(considered(nodes, HERE, strategy="remote", nodes=("b",))["remote"]) == ["b"]
    assert set(considered(nodes, HERE, nodes=("b",))) == {"cloud"}


# --- outside --------------------------------------------------------------------------------------


def test_an_endpoint_is_priced_as_it_is_stated_and_holds_a_worker_alone() -> None:
    [found] = considered(nodes_of(5e9), HERE, OUTSIDE)["cloud"]
    assert (found.refused_because, found.engine, found.predicted) == (None, "outside", STATED)
    assert found.roles == (Role(0, "a", 0, *NOTHING, share=1.0, memory_bytes=sizes.WORKER_BYTES),)
    assert not sizes.is_windowed(found, BILLION, PlanRequest())


def test_jobs_correct_what_was_stated() -> None:
    [found] = considered(nodes_of(5e9), OUTSIDE, strategy="cloud")["cloud"]
    known = Corrections()
    known.learn("m", found, 30.0)
    [corrected] = known.corrected("m", [found])
    assert (corrected.predicted.tpot_ms, corrected.predicted.ttft_ms) == (30.0, 300.0)


@pytest.mark.parametrize(
    ("asked", "change", "reason"),
    [
        ({"private": True}, {}, "A: this job is private, and its prompt would leave the node"),
        ({"private": True, "allow_guest": True}, {}, "A: this job is private"),
        ({"numerics": "exact"}, {}, "nobody can check the exact numerics"),
        ({"may_leave": False}, {}, "this job was bound to nodes"),
        ({"adapter": LORA}, {}, "what is computed outside knows no adapter"),
        ({}, {"engines": ("here",)}, "A: it has no engine 'outside'"),
        ({}, {"memory_budget": 50 << 20}, "A: its part needs 96 MiB and the budget is 50 MiB"),
        ({}, {"refuses": "the battery is at 3 %"}, None),  # it does not compute
        ({}, {"memory_budget": 100 << 20}, None),
        ({"nodes": ("a",)}, {}, None),
    ],
)
def test_when_an_endpoint_is_not_asked(
    asked: dict[str, Any], change: dict[str, Any], reason: str | None
) -> None:
    [submitter] = nodes_of(5e9)
    nodes = [dataclasses.replace(submitter, **change)]
    [found] = considered(nodes, HERE, OUTSIDE, strategy="cloud", **asked)["cloud"]
    assert (found.refused_because or "").startswith(reason or "")
    assert (found.refused_because is None) == (reason is None)


def test_no_policy_may_choose_what_is_refused_for_a_private_job() -> None:
    nodes = [dataclasses.replace(each, speeds=()) for each in nodes_of(5e9)]
    by_id = {each.node_id: each for each in nodes}
    request = PlanRequest(private=True)
    candidates = planning.consider(STRATEGIES, BILLION, nodes, request, [HERE, OUTSIDE])
    loaded = (*planning.CORE_POLICIES, *energy.edged_policies({}))
    for policy in (each for each in loaded if not each.refused_because):
        chosen = policy.choose(Situation(candidates, by_id, request, 0.99, 0.0))
        assert chosen is not None, policy.name
        assert candidates[chosen].strategy == "local", policy.name


@pytest.mark.parametrize(
    "roles",
    [
        (Role(0, "b", 0, *NOTHING, share=1.0),),
        (Role(0, "a", 0, *NOTHING, share=1.0), Role(1, "b", 0, *NOTHING, share=1.0)),
        planning.whole(NodeView("a", "A"), BILLION, "cloud").roles,
    ],
)
def test_what_is_computed_outside_has_one_empty_role_on_the_submitter(roles: tuple[Role, ...]) -> None:
    nodes = {each.node_id: each for each in nodes_of(5e9, 5e9)}
    plan = Candidate("cloud", roles, engine="outside", stated=STATED)
    assert rules.refused(plan, BILLION, nodes, PlanRequest()).broken_rule == "outside"


def test_a_strategy_cannot_say_itself_that_nothing_is_computed_here() -> None:
    rash = Candidate("rash", (Role(0, "a", 0, *NOTHING, share=1.0),), stated=Predicted(tpot_ms=0.1))
    strategies = {"rash": Strategy("rash", lambda *_: [rash])}
    [found] = planning.consider(strategies, BILLION, nodes_of(5e9), PlanRequest("rash"), [HERE])
    assert "do not cover the layers" in (found.refused_because or "")


def test_an_engine_that_computes_outside_does_no_other_strategy() -> None:
    any_strategy = dataclasses.replace(OUTSIDE, strategies=None)
    with pytest.raises(PolicyViolation, match="no loaded engine runs this model by local"):
        considered(nodes_of(5e9), any_strategy, strategy="local")


# --- the choice -----------------------------------------------------------------------------------


def test_without_guests_and_endpoints_auto_says_nothing_of_it() -> None:
    assert "cloud" not in considered(nodes_of(5e9, 5e9), HERE)


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({}, PeerError, "needs an online guest, or an endpoint"),
        ({"nodes": ("b",)}, ConfigError, "takes a guest, or this node"),
        ({"nodes": ("a",)}, ConfigError, "takes a guest, or this node"),
        ({"nodes": ("a", "b")}, ConfigError, "cloud takes one of --nodes; 2 came"),
    ],
)
def test_by_hand_it_needs_somebody(asked: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        considered(nodes_of(5e9, 5e9), HERE, strategy="cloud", **asked)


@pytest.mark.parametrize(("part", "expected"), [(0.95, "local"), (0.85, "cloud")])
def test_auto_asks_an_endpoint_where_it_saves_a_tenth(part: float, expected: str) -> None:
    [local] = considered(nodes_of(5e9), HERE, strategy="local")["local"]
    assert local.predicted.tpot_ms is not None
    stated = Predicted(tpot_ms=part * local.predicted.tpot_ms)
    engines = [HERE, dataclasses.replace(OUTSIDE, stated=stated)]
    candidates = planning.consider(STRATEGIES, BILLION, nodes_of(5e9), PlanRequest(), engines)
    chosen = planning.choose(candidates)
    assert chosen is not None
    assert candidates[chosen].strategy == expected
    said = planning.explain(candidates, chosen, {each.node_id: each for each in nodes_of(5e9)})
    assert any(line.startswith("cloud by the endpoint in the profile: ") for line in said)


def test_an_own_node_is_preferred_to_an_endpoint_that_is_as_fast() -> None:
    nodes = nodes_of(1e9, 50e9)
    [remote] = considered(nodes, HERE, strategy="remote")["remote"]
    engines = [HERE, dataclasses.replace(OUTSIDE, stated=remote.predicted)]
    candidates = planning.consider(STRATEGIES, BILLION, nodes, PlanRequest(), engines)
    chosen = planning.choose(candidates)
    assert chosen is not None
    assert candidates[chosen].strategy == "remote"


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_s_bytes_count_by_the_layers_of_a_role_and_twice_in_exact_numerics() -> None:
    whole = planning.whole(nodes_of(5e9)[0], BILLION, "local").roles[0]
    half = dataclasses.replace(whole, layers=(0, BILLION.layers // 2))
    for role, numerics, part in ((whole, "fast", 1), (half, "fast", 0.5), (whole, "exact", 2)):
        without, with_it = (
            sizes.memory_of(role, BILLION, PlanRequest(numerics=numerics, adapter=adapter))
            for adapter in (None, LORA)
        )
        assert with_it - without == part * LORA.bytes


def test_a_node_that_does_not_say_it_applies_adapters_runs_no_job_with_one() -> None:
    """One of an earlier version does not read that field of an offer, and would run the bare model."""
    able, old = (dataclasses.replace(n, adapters=("here",) * (n.node_id == "a")) for n in nodes_of(5e9, 5e9))
    found = considered([able, old], HERE, adapter=LORA)
    assert found["local"][0].refused_because is None
    assert found["remote"][0].refused_because == "B: its engine 'here' applies no adapters"
    assert found["remote"][0].broken_rule == "adapter"
    assert all(c.refused_because for name in ("layers", "tensor") for c in found[name])
    assert considered([able, old], HERE)["remote"][0].refused_because is None


def test_an_engine_that_applies_none_makes_room_for_one_that_does() -> None:
    bare = EngineEntry("bare", "", "", "", "")
    [node] = (dataclasses.replace(n, engines=("bare", "here"), adapters=("here",)) for n in nodes_of(5e9))
    [found] = considered([node], bare, HERE, strategy="local", adapter=LORA)["local"]
    assert (found.engine, found.refused_because) == ("here", None)
    with pytest.raises(PolicyViolation, match="with an adapter by local: bare applies none") as caught:
        considered([node], bare, strategy="local", adapter=LORA)
    assert "drop --adapter" in caught.value.remedy
