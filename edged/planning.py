"""What to do: candidates, and the choice. Pure; costs are in `pricing`, what may run is in `rules`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from . import rules, wire
from .errors import ConfigError, EdgedError, PeerError, PolicyViolation
from .pricing import INFINITE, price
from .sizes import granted
from .types import (
    Candidate,
    EngineEntry,
    ModelDescription,
    NodeView,
    PlanRequest,
    Policy,
    Predicted,
    Role,
    Strategy,
    Zone,
)

# What must be gained to go further from where work was asked for, as a share of the time there (hysteresis).
GAIN_OF_MORE = 0.95  # by more nodes: the same benchmarks, so their errors are common to both plans
GAIN_OF_ANOTHER = 0.9  # by another single node: benchmarks of two devices differ by some percent by chance


# --- candidates -----------------------------------------------------------------------------------


def whole(node: NodeView, model: ModelDescription, strategy: str) -> Candidate:
    """The whole model on one node."""
    full = ((0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab))
    return Candidate(strategy, (Role(0, node.node_id, 0, *full, share=1.0),))


def propose_local(
    model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
) -> list[Candidate]:
    return [whole(nodes[0], model, "local")]


def propose_remote(
    model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
) -> list[Candidate]:
    """Own nodes by itself; whoever names a guest by hand means it."""
    others = nodes if request.nodes else [node for node in nodes[1:] if node.zone == "own"]
    if not others:
        raise PeerError("strategy remote needs another online node; there is none", code="no-peers")
    return [whole(node, model, "remote") for node in others]


def propose_cloud(
    model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
) -> list[Candidate]:
    """Each guest. What engines do outside the group is for `consider`, which knows them."""
    return [whole(node, model, CLOUD) for node in nodes if node.zone == "guest"]


CLOUD = "cloud"
CORE_STRATEGIES = (
    Strategy("local", propose_local),
    Strategy("remote", propose_remote),
    Strategy(CLOUD, propose_cloud),
)
NEEDS_SEVERAL = ("layers", "tensor", "hybrid")


def consider(
    strategies: Mapping[str, Strategy],
    model: ModelDescription,
    nodes: Sequence[NodeView],
    request: PlanRequest,
    engines: Sequence[EngineEntry] = (),
    searched: Mapping[str, Sequence[Candidate]] | None = None,
) -> list[Candidate]:
    """Every candidate, priced and checked; `nodes` has the submitter first. `searched`: by strategy, what a
    search found beside what it proposes.

    `engines`: those that run the model, the preferred first; each candidate names the first that does
    its strategy. Empty: none is named, and none is asked. With a strategy named by hand its errors
    pass through; with `auto` they become refused candidates.
    """
    by_id = {node.node_id: node for node in nodes}
    for node_id in request.nodes or ():
        if node_id not in by_id:
            raise PeerError(
                f"expected node {node_id[:8]} to say what it can do; it did not answer",
                remedy="see `edged peers`, or leave it out",
            )
    ordered = [by_id[node_id] for node_id in request.nodes] if request.nodes else list(nodes)
    if request.strategy == "auto":
        names: Sequence[str] = _fitting(strategies, request, nodes[0].node_id, ordered[0].zone)
    elif request.strategy in strategies:
        _check_alone(request, nodes[0].node_id)
        names = (request.strategy,)
    else:
        raise ConfigError(
            f"no strategy {request.strategy!r}; loaded: auto, {', '.join(sorted(strategies))}",
            remedy="load the plugin that brings it, or use another",
        )
    found: list[Candidate] = []
    for name in names:
        try:
            # who has nobody to propose needs no engine of ours: an endpoint may have the model
            has_engine = name != CLOUD or any(node.zone == "guest" for node in ordered)
            engine = _engine_of(name, engines, request) if has_engine else ""
            proposed = [
                dataclasses.replace(_well_typed(candidate, name), engine=engine, stated=None)
                for candidate in [
                    *strategies[name].propose(model, ordered, request),
                    *(searched or {}).get(name, ()),
                ]
            ]
        except EdgedError as error:
            if request.strategy != "auto":
                raise
            proposed = [Candidate(name, (), refused_because=_with_remedy(error), broken_rule="strategy")]
        if name == CLOUD:
            proposed += _outside(engines, nodes[0], request)
            _check_cloud(proposed, request)
        windows = {entry.name: entry.window_bytes for entry in engines}
        found += [finish(c, model, by_id, request, windows.get(c.engine, 0)) for c in proposed]
    return found


def _engine_of(strategy: str, engines: Sequence[EngineEntry], request: PlanRequest) -> str:
    """The first engine that does the strategy with the numerics asked for, or PolicyViolation."""
    if not engines:
        return ""
    able = [e for e in engines if e.stated is None and (e.strategies is None or strategy in e.strategies)]
    if not able:
        said = "; ".join(f"{e.name} runs {' or '.join(e.strategies or ()) or 'none'}" for e in engines)
        raise PolicyViolation(
            f"no loaded engine runs this model by {strategy}: {said}",
            remedy=next((e.remedy for e in engines if e.remedy), "choose another --strategy"),
        )
    for engine in able:
        if request.numerics in engine.numerics:
            return engine.name
    raise PolicyViolation(
        f"no loaded engine runs this model with {request.numerics} numerics: "
        + "; ".join(f"{e.name} has {' or '.join(e.numerics)}" for e in able),
        remedy="drop --numerics",
    )


def _outside(engines: Sequence[EngineEntry], submitter: NodeView, request: PlanRequest) -> list[Candidate]:
    """A candidate for each engine that computes outside the group: this node's worker holds no part of the
    model, it only speaks with whoever computes."""
    if request.nodes not in (None, (submitter.node_id,)):
        return []
    nothing = ((0, 0),) * 4
    role = Role(0, submitter.node_id, 0, *nothing, share=1.0)
    return [
        Candidate(CLOUD, (role,), engine=e.name, stated=e.stated) for e in engines if e.stated is not None
    ]


def _check_cloud(proposed: Sequence[Candidate], request: PlanRequest) -> None:
    """By hand it needs somebody; with `auto` it is one strategy that has nothing to propose."""
    if proposed or request.strategy != CLOUD:
        return
    if request.nodes:
        raise ConfigError(
            "strategy cloud takes a guest, or this node where it knows an endpoint for the model",
            remedy="use local or remote for own nodes",
        )
    raise PeerError(
        "strategy cloud needs an online guest, or an endpoint that the profile names for this model; "
        "there is neither",
        remedy="pair one with `edged invite --zone guest`, or set [plugin.cloud]",
        code="no-peers",
    )


def _with_remedy(error: EdgedError) -> str:
    return f"{error}; {error.remedy}" if error.remedy else str(error)


def _fitting(
    strategies: Mapping[str, Strategy], request: PlanRequest, submitter: str, zone: Zone
) -> list[str]:
    """The strategies that `auto` may ask, given the nodes named by hand, the first of them in `zone`."""
    if not request.nodes:
        return list(strategies)
    if len(request.nodes) > 1 or request.shares:
        return [name for name in strategies if name in NEEDS_SEVERAL]
    if request.nodes == (submitter,):
        return ["local"]
    return [CLOUD if zone == "guest" else "remote"]


def _check_alone(request: PlanRequest, submitter: str) -> None:
    """`local` is the submitting node and `remote` one other, also where --nodes names them."""
    if request.nodes is None:
        return
    if request.strategy == "local" and request.nodes != (submitter,):
        raise ConfigError("strategy local runs on the submitting node", remedy="drop --nodes, or use remote")
    if request.strategy in ("remote", CLOUD) and len(request.nodes) != 1:
        raise ConfigError(f"strategy {request.strategy} takes one of --nodes; {len(request.nodes)} came")
    if request.strategy == "remote" and request.nodes == (submitter,):
        raise ConfigError("strategy remote runs on another node", remedy="name another, or use local")


def finish(
    candidate: Candidate,
    model: ModelDescription,
    nodes: Mapping[str, NodeView],
    request: PlanRequest,
    window_bytes: int = 0,
) -> Candidate:
    """With memory and price filled in, or with the reason why it is refused. `window_bytes`: of the
    engine that shall run it."""
    if candidate.refused_because is None:
        candidate = rules.malformed(candidate, model, nodes, request)
    if candidate.refused_because is not None:
        return candidate

    def sized_role(role: Role) -> Role:
        given = granted(role, model, request, nodes[role.node_id].memory_budget, window_bytes)
        return dataclasses.replace(role, memory_bytes=given)

    sized = dataclasses.replace(candidate, roles=tuple(map(sized_role, candidate.roles)))
    judged = rules.refused(sized, model, nodes, request)
    return dataclasses.replace(judged, predicted=sized.stated or price(sized, model, nodes, request))


def _well_typed(proposed: Candidate, strategy: str) -> Candidate:
    """What a plugin proposed under its own name, or a refused candidate where it is none."""
    try:
        candidate = wire.read_body(Candidate, wire.to_map(proposed))
    except (EdgedError, TypeError, ValueError) as error:
        return Candidate(strategy, (), refused_because=f"it is no plan: {error}", broken_rule="form")
    return dataclasses.replace(
        candidate, strategy=strategy, refused_because=candidate.refused_because or None
    )


# --- the choice -----------------------------------------------------------------------------------


def choose(candidates: Sequence[Candidate]) -> int | None:
    """Policy `latency`: the least time per token; the own node before another, and fewer nodes before more,
    unless GAIN_OF_ANOTHER or GAIN_OF_MORE is predicted.

    An unmeasured candidate loses to a measured one; among unmeasured ones the fewest nodes win.
    """
    best: int | None = None
    allowed = [index for index, c in enumerate(candidates) if c.refused_because is None]
    allowed.sort(key=lambda index: (_distance(candidates[index]), _time(candidates[index])))
    for (size, _), same in itertools.groupby(allowed, key=lambda index: _distance(candidates[index])):
        fastest = next(same)
        gain = GAIN_OF_MORE if size > 1 else GAIN_OF_ANOTHER
        if best is None or _time(candidates[fastest]) < gain * _time(candidates[best]):
            best = fastest
    return best


def _distance(candidate: Candidate) -> tuple[int, int]:
    """How far work goes from where it was asked for: number of nodes, and whether it leaves this one, or even
    the owner's devices."""
    return len(candidate.roles), {"local": 0, CLOUD: 2}.get(candidate.strategy, 1)


LATENCY, BALANCE = "latency", "battery-balance"
CORE_POLICIES = (Policy(LATENCY, lambda situation: choose(situation.candidates)),)


def _time(candidate: Candidate) -> float:
    predicted = candidate.predicted.tpot_ms
    return float("inf") if predicted is None else predicted


def refusal(candidates: Sequence[Candidate]) -> PolicyViolation:
    """The error of a request that no candidate meets."""
    reasons = dict.fromkeys(f"{c.strategy}: {c.refused_because}" for c in candidates if c.refused_because)
    return PolicyViolation(
        f"no plan can run; {'; '.join(reasons) or 'nothing was proposed'}",
        remedy="free memory, add nodes, or choose another --strategy",
        code="no-plan",
    )


def explain(candidates: Sequence[Candidate], chosen: int | None, nodes: Mapping[str, NodeView]) -> list[str]:
    """Sentences for a person: what each candidate costs, why it is refused, what was chosen."""
    said = []
    for index, candidate in enumerate(candidates):
        head = _named(candidate, nodes)
        if candidate.refused_because:
            rule = f" by the rule {candidate.broken_rule!r}" if candidate.broken_rule else ""
            said.append(f"{head}: refused{rule}, {candidate.refused_because}.")
            continue
        said.append(f"{head}: {_cost(candidate.predicted)}{' (chosen)' if index == chosen else ''}.")
    if chosen is not None:
        said += _why(candidates, chosen, nodes)
    if chosen is not None and (alone := _fastest_alone(candidates)) is not None:
        mine = _time(candidates[chosen])
        if len(candidates[chosen].roles) > 1 and _time(alone) < mine:
            said.append(f"Warning: one node alone should take {_time(alone):.1f} ms per token.")
    return said


def _cost(predicted: Predicted) -> str:
    """In words, as far as it is known."""
    if predicted.tpot_ms is None:
        return "speed unknown, a device is unmeasured"
    said = f"{predicted.tpot_ms:.1f} ms per token"
    if predicted.ttft_ms is not None:
        said += f" after {predicted.ttft_ms:.0f} ms to the first"
    if predicted.joules_per_token is not None:
        said += f", {predicted.joules_per_token:.3g} J per token ({predicted.joules_source})"
    return said


def _named(candidate: Candidate, nodes: Mapping[str, NodeView]) -> str:
    """Its strategy, and the nodes' names as far as they are known."""
    if candidate.stated is not None:
        return f"{candidate.strategy} by the endpoint in the profile"
    names = ", ".join(nodes[role.node_id].name for role in candidate.roles if role.node_id in nodes)
    return f"{candidate.strategy}{f' on {names}' if names else ''}"


def _why(candidates: Sequence[Candidate], chosen: int, nodes: Mapping[str, NodeView]) -> list[str]:
    """What the choice gains over the next best, or gives up against a faster one."""
    mine = _time(candidates[chosen])
    others = [c for i, c in enumerate(candidates) if i != chosen and c.refused_because is None]
    if mine == INFINITE or not others:
        return []
    best = min(others, key=_time)
    name = _named(best, nodes)
    if _time(best) == INFINITE:
        return [f"Nothing is known of {name}, which is why it was not chosen."]
    gain = 100 * (_time(best) / mine - 1)
    if gain >= 0:
        return [f"The next best, {name}, takes {gain:.0f} % more time per token."]
    loss = 100 * (1 - _time(best) / mine)
    if len(best.roles) > len(candidates[chosen].roles):
        few = "too little for more nodes: each is one more that can be lost"
        return [f"{name} would take {loss:.0f} % less time per token, {few}."]
    return [f"{name} would take {loss:.0f} % less time per token; the policy prefers another."]


def _fastest_alone(candidates: Sequence[Candidate]) -> Candidate | None:
    alone = [c for c in candidates if len(c.roles) == 1 and c.refused_because is None]
    return min(alone, key=_time, default=None)
