"""What to do: candidates, the rules every plan must keep, the choice. Pure; the price is in `pricing`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from .errors import ConfigError, EdgedError, PeerError, PolicyViolation
from .pricing import INFINITE, price, stages_of
from .sizes import granted
from .types import (
    Candidate,
    EngineEntry,
    ModelDescription,
    NodeView,
    PlanRequest,
    Policy,
    Range,
    Role,
    Strategy,
)

Q8_0_BLOCK = 32  # elements that share a scale; a block lies within one head
GAIN_MIN = 0.9  # more nodes must predict at most this share of the time of fewer (hysteresis)


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
    others = nodes if request.nodes else nodes[1:]
    if not others:
        raise PeerError("strategy remote needs another online node; there is none", code="no-peers")
    return [whole(node, model, "remote") for node in others]


CORE_STRATEGIES = (Strategy("local", propose_local), Strategy("remote", propose_remote))
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
        names: Sequence[str] = _fitting(strategies, request, nodes[0].node_id)
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
            engine = _engine_of(name, engines, request)
            proposed = [
                dataclasses.replace(candidate, engine=engine)
                for candidate in [
                    *strategies[name].propose(model, ordered, request),
                    *(searched or {}).get(name, ()),
                ]
            ]
        except EdgedError as error:
            if request.strategy != "auto":
                raise
            proposed = [Candidate(name, (), refused_because=_with_remedy(error))]
        windows = {entry.name: entry.window_bytes for entry in engines}
        found += [finish(c, model, by_id, request, windows.get(c.engine, 0)) for c in proposed]
    return found


def _engine_of(strategy: str, engines: Sequence[EngineEntry], request: PlanRequest) -> str:
    """The first engine that does the strategy with the numerics asked for, or PolicyViolation."""
    if not engines:
        return ""
    able = [e for e in engines if e.strategies is None or strategy in e.strategies]
    if not able:
        said = "; ".join(f"{e.name} runs {' or '.join(e.strategies or ())}" for e in engines)
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


def _with_remedy(error: EdgedError) -> str:
    return f"{error}; {error.remedy}" if error.remedy else str(error)


def _fitting(strategies: Mapping[str, Strategy], request: PlanRequest, submitter: str) -> list[str]:
    """The strategies that `auto` may ask, given the nodes named by hand."""
    if not request.nodes:
        return list(strategies)
    if len(request.nodes) > 1 or request.shares:
        return [name for name in strategies if name in NEEDS_SEVERAL]
    return ["local"] if request.nodes == (submitter,) else ["remote"]


def _check_alone(request: PlanRequest, submitter: str) -> None:
    """`local` is the submitting node and `remote` one other, also where --nodes names them."""
    if request.nodes is None:
        return
    if request.strategy == "local" and request.nodes != (submitter,):
        raise ConfigError("strategy local runs on the submitting node", remedy="drop --nodes, or use remote")
    if request.strategy == "remote" and len(request.nodes) != 1:
        raise ConfigError(f"strategy remote takes one of --nodes; {len(request.nodes)} came")
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
    if candidate.refused_because:
        return candidate

    def sized_role(role: Role) -> Role:
        node = nodes.get(role.node_id)
        given = granted(role, model, request, node.memory_budget if node else None, window_bytes)
        return dataclasses.replace(role, memory_bytes=given)

    roles = tuple(map(sized_role, candidate.roles))
    sized = dataclasses.replace(candidate, roles=roles)
    reason = validate(sized, model, nodes, request)
    return dataclasses.replace(sized, predicted=price(sized, model, nodes, request), refused_because=reason)


# --- the rules ------------------------------------------------------------------------------------


def validate(
    candidate: Candidate, model: ModelDescription, nodes: Mapping[str, NodeView], request: PlanRequest
) -> str | None:
    """Why this plan may not run, or None. Applied to every plan, whoever made it."""
    roles = candidate.roles
    if [role.rank for role in roles] != list(range(len(roles))) or not roles:
        return "its ranks are not 0, 1, 2, ..."
    if request.nodes and tuple(role.node_id for role in roles) != request.nodes:
        return "it is not on the nodes that were asked for, in their order"
    if len({role.node_id for role in roles}) != len(roles):
        return "a node has more than one role"
    reason = _coverage(stages_of(roles), model) or _cache_refusal(model, request)
    if reason:
        return reason
    for role in roles:
        node = nodes.get(role.node_id)
        if node is None:
            return f"node {role.node_id[:8]} is not known"
        if reason := _refusal(node, role, request, is_submitter=node is next(iter(nodes.values()))):
            return f"{node.name}: {reason}"
        if candidate.engine and candidate.engine not in node.engines:
            known = ", ".join(node.engines) or "none"
            return f"{node.name}: it has no engine {candidate.engine!r}; loaded: {known}"
    for a, b in itertools.combinations(roles, 2):
        if not _are_linked(nodes[a.node_id], nodes[b.node_id]):
            return f"{nodes[a.node_id].name} and {nodes[b.node_id].name} have no connection to each other"
    return None


def _cache_refusal(model: ModelDescription, request: PlanRequest) -> str | None:
    if request.numerics == "exact" or request.cache_type != "q8_0" or model.head_dim % Q8_0_BLOCK == 0:
        return None
    return (
        f"a KV cache in q8_0 needs heads of a multiple of {Q8_0_BLOCK} elements, and this model's have "
        f"{model.head_dim}; set jobs.cache_type to f16"
    )


def _refusal(node: NodeView, role: Role, request: PlanRequest, *, is_submitter: bool) -> str | None:
    if reason := unwilling(node, request, is_submitter=is_submitter):
        return reason
    if node.memory_budget is not None and role.memory_bytes > node.memory_budget:
        needed, given = role.memory_bytes / 2**20, node.memory_budget / 2**20
        return f"its part needs {needed:.0f} MiB and the budget is {given:.0f} MiB"
    return None


def unwilling(node: NodeView, request: PlanRequest, *, is_submitter: bool) -> str | None:
    """Why a node may have no role at all in a plan for this request, or None."""
    if not node.online:
        return "it is offline"
    if node.refuses and not (is_submitter and request.nodes):  # whoever names it here means it
        return f"it takes no new roles: {node.refuses}"
    if node.zone == "guest" and not request.allow_guest:
        return "it is a guest, and this job uses own nodes only"
    if not is_submitter and "serve" not in node.rights:
        return "it has no right to serve"
    if not is_submitter and request.private:
        return "this job is private, and its prompt would leave the node"
    return None


def _are_linked(a: NodeView, b: NodeView) -> bool:
    return any(link.node_id == b.node_id for link in a.links) or any(
        link.node_id == a.node_id for link in b.links
    )


def _coverage(stages: Sequence[Sequence[Role]], model: ModelDescription) -> str | None:
    """Each layer in one stage, in order; within a stage every head, column and row in one rank."""
    if [roles[0].stage for roles in stages] != list(range(len(stages))):
        return "its stages are not 0, 1, 2, ..."
    if not _tiles([roles[0].layers for roles in stages], model.layers, 1):
        return f"its stages do not cover the layers 0 to {model.layers} in order"
    for roles in stages:
        if len({role.layers for role in roles}) != 1:
            return "ranks of one stage have different layers"
        for what, ranges, size, unit in (
            ("heads", [role.heads for role in roles], model.heads, model.head_unit),
            ("feed-forward columns", [role.ffn for role in roles], model.ffn, model.ffn_unit),
        ):
            if not _tiles(ranges, size, unit):
                return f"a stage does not cut its {size} {what} into whole units of {unit}"
    last = [role.vocab for role in stages[-1]]
    if not _tiles(last, model.vocab, model.vocab_unit):
        return f"the last stage does not cut the vocabulary into whole units of {model.vocab_unit}"
    if any(role.vocab != (0, 0) for roles in stages[:-1] for role in roles):
        return "a stage before the last has a part of the output head"
    return None


def _tiles(ranges: Sequence[Range], size: int, unit: int) -> bool:
    """Do the ranges, none empty, cover 0 to size in order, cut at multiples of unit?"""
    edges = [0, *(end for _, end in ranges)]
    return (
        edges[-1] == size
        and all(range_[0] == edge for range_, edge in zip(ranges, edges[:-1], strict=True))
        and all(a < b for a, b in itertools.pairwise(edges))
        and all(edge % unit == 0 for edge in edges[:-1])
    )


# --- the choice -----------------------------------------------------------------------------------


def choose(candidates: Sequence[Candidate]) -> int | None:
    """Policy `latency`: the least time per token; the own node before another, and fewer nodes, unless the
    others gain over a tenth.

    An unmeasured candidate loses to a measured one; among unmeasured ones the fewest nodes win.
    """
    best: int | None = None
    allowed = [index for index, c in enumerate(candidates) if c.refused_because is None]
    allowed.sort(key=lambda index: (_distance(candidates[index]), _time(candidates[index])))
    for _, same_size in itertools.groupby(allowed, key=lambda index: _distance(candidates[index])):
        fastest = next(same_size)
        if best is None or _time(candidates[fastest]) < GAIN_MIN * _time(candidates[best]):
            best = fastest
    return best


def _distance(candidate: Candidate) -> tuple[int, bool]:
    """How far work goes from where it was asked for: number of nodes, and whether it leaves this one."""
    return len(candidate.roles), candidate.strategy != "local"


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
            said.append(f"{head}: refused, {candidate.refused_because}.")
            continue
        time = candidate.predicted.tpot_ms
        cost = f"{time:.1f} ms per token" if time is not None else "speed unknown, a device is unmeasured"
        said.append(f"{head}: {cost}{' (chosen)' if index == chosen else ''}.")
    if chosen is not None:
        said += _why(candidates, chosen, nodes)
    if chosen is not None and (alone := _fastest_alone(candidates)) is not None:
        mine = _time(candidates[chosen])
        if len(candidates[chosen].roles) > 1 and _time(alone) < mine:
            said.append(f"Warning: one node alone should take {_time(alone):.1f} ms per token.")
    return said


def _named(candidate: Candidate, nodes: Mapping[str, NodeView]) -> str:
    """Its strategy, and the nodes' names as far as they are known."""
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
