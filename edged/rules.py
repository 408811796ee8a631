"""The rules that every plan keeps, whoever made it. Pure.

Each has a name, and says why a plan breaks it, or nothing. Those of form need the plan and the model alone
and come first: what breaks one is neither sized nor priced. The others ask who may take part, and whether it
fits. A plan whose tokens are computed outside the group has rules of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .sizes import stages_of
from .types import Candidate, ModelDescription, NodeView, PlanRequest, Range, Role

Q8_0_BLOCK = 32  # elements that share a scale; a block lies within one head
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """What a rule judges. `nodes`: the submitter first."""

    candidate: Candidate
    model: ModelDescription
    nodes: Mapping[str, NodeView]
    request: PlanRequest

    @property
    def roles(self) -> Sequence[Role]:
        return self.candidate.roles

    @property
    def submitter(self) -> str:
        return next(iter(self.nodes))

    def node(self, role: Role) -> NodeView:
        return self.nodes[role.node_id]


Rule = Callable[[Case], str | None]


def refused(
    candidate: Candidate, model: ModelDescription, nodes: Mapping[str, NodeView], request: PlanRequest
) -> Candidate:
    """The candidate, with the first rule that it breaks and the reason, or as it was."""
    form, participation = _rules_of(candidate)
    return _refused(candidate, Case(candidate, model, nodes, request), form | participation)


def malformed(
    candidate: Candidate, model: ModelDescription, nodes: Mapping[str, NodeView], request: PlanRequest
) -> Candidate:
    """The same by the rules of form alone, which need no sizes."""
    return _refused(candidate, Case(candidate, model, nodes, request), _rules_of(candidate)[0])


def _rules_of(candidate: Candidate) -> tuple[dict[str, Rule], dict[str, Rule]]:
    return (FORM, PARTICIPATION) if candidate.stated is None else (FORM_OUTSIDE, PARTICIPATION_OUTSIDE)


def _refused(candidate: Candidate, case: Case, rules: Mapping[str, Rule]) -> Candidate:
    for name, rule in rules.items():
        reason = rule(case)
        if reason is not None:
            return dataclasses.replace(candidate, refused_because=reason, broken_rule=name)
    return candidate


# --- form -----------------------------------------------------------------------------------------


def _ranks(case: Case) -> str | None:
    roles = case.roles
    if [role.rank for role in roles] != list(range(len(roles))) or not roles:
        return "its ranks are not 0, 1, 2, ..."
    if [rank[0].stage for rank in stages_of(roles)] != list(range(len(stages_of(roles)))):
        return "its stages are not 0, 1, 2, ..."
    return None


def _nodes(case: Case) -> str | None:
    """Known ones, each once, and those that were asked for."""
    ids = tuple(role.node_id for role in case.roles)
    if case.request.nodes and ids != case.request.nodes:
        return "it is not on the nodes that were asked for, in their order"
    if len(set(ids)) != len(ids):
        return "a node has more than one role"
    unknown = next((node_id for node_id in ids if node_id not in case.nodes), None)
    return None if unknown is None else f"node {unknown[:8]} is not known"


def _coverage(case: Case) -> str | None:
    """Each layer in one stage, in order; within a stage every head, column and row in one rank."""
    stages, model = stages_of(case.roles), case.model
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
    if not _tiles([role.vocab for role in stages[-1]], model.vocab, model.vocab_unit):
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


def _shares(case: Case) -> str | None:
    if all(math.isfinite(role.share) and 0 < role.share <= 1 for role in case.roles):
        return None
    return "expected shares above 0 and at most 1; others came"


def _outside(case: Case) -> str | None:
    """A submitter that saves its battery may ask all the same: it does not compute."""
    role = case.roles[0]
    if len(case.roles) != 1 or role.node_id != case.submitter:
        return "what is computed outside has one role, on the node that the job was submitted to"
    if any(part != (0, 0) for part in (role.layers, role.heads, role.ffn, role.vocab)):
        return "its role holds a part of the model, which is computed outside"
    return None


def _cache(case: Case) -> str | None:
    model, request = case.model, case.request
    if request.numerics == "exact" or request.cache_type != "q8_0" or model.head_dim % Q8_0_BLOCK == 0:
        return None
    return (
        f"a KV cache in q8_0 needs heads of a multiple of {Q8_0_BLOCK} elements, and this model's have "
        f"{model.head_dim}; set jobs.cache_type to f16"
    )


# --- who takes part, and with what ----------------------------------------------------------------


def _of_each_node(judge: Callable[[Case, Role, NodeView], str | None]) -> Rule:
    """The first node's reason, with its name."""

    def rule(case: Case) -> str | None:
        for role in case.roles:
            if reason := judge(case, role, case.node(role)):
                return f"{case.node(role).name}: {reason}"
        return None

    return rule


def unwilling(node: NodeView, request: PlanRequest, *, is_submitter: bool) -> str | None:
    """Why a node may have no role at all in a plan for this request, or None: what searches leave out."""
    return next((reason for rule in WILLING.values() if (reason := rule(node, request, is_submitter))), None)


def _online(node: NodeView, request: PlanRequest, is_submitter: bool) -> str | None:
    return None if node.online else "it is offline"


def _saving(node: NodeView, request: PlanRequest, is_submitter: bool) -> str | None:
    """Battery, heat, owner; whoever names a node on that node itself means it."""
    is_meant = is_submitter and request.nodes
    return f"it takes no new roles: {node.refuses}" if node.refuses and not is_meant else None


def _privacy(node: NodeView, request: PlanRequest, is_submitter: bool) -> str | None:
    if not is_submitter and request.private:
        return "this job is private, and its prompt would leave the node"
    return None


def _zone(node: NodeView, request: PlanRequest, is_submitter: bool) -> str | None:
    if node.zone == "guest" and not request.allow_guest:
        return "it is a guest, and this job uses own nodes only"
    return None


def _rights(node: NodeView, request: PlanRequest, is_submitter: bool) -> str | None:
    return None if is_submitter or "serve" in node.rights else "it has no right to serve"


WILLING = {"online": _online, "saving": _saving, "privacy": _privacy, "zone": _zone, "rights": _rights}


def _is_willing(judge: Callable[[NodeView, PlanRequest, bool], str | None]) -> Rule:
    return _of_each_node(lambda case, role, node: judge(node, case.request, node.node_id == case.submitter))


def _outside_privacy(case: Case, role: Role, node: NodeView) -> str | None:
    return _privacy(node, case.request, is_submitter=False)


def _memory(case: Case, role: Role, node: NodeView) -> str | None:
    if node.memory_budget is None or role.memory_bytes <= node.memory_budget:
        return None
    needed, given = role.memory_bytes / MIB, node.memory_budget / MIB
    return f"its part needs {needed:.0f} MiB and the budget is {given:.0f} MiB"


def _engine(case: Case, role: Role, node: NodeView) -> str | None:
    engine = case.candidate.engine
    if not engine or engine in node.engines:
        return None
    return f"it has no engine {engine!r}; loaded: {', '.join(node.engines) or 'none'}"


def _bound(case: Case) -> str | None:
    """A job that somebody bound to nodes may move among nodes, and no further."""
    return None if case.request.may_leave else "this job was bound to nodes, and would leave them all"


def _numerics(case: Case) -> str | None:
    if case.request.numerics == "fast":
        return None
    return f"nobody can check the {case.request.numerics} numerics of what is computed outside"


def _adapter(case: Case, role: Role, node: NodeView) -> str | None:
    engine = case.candidate.engine
    if case.request.adapter is None or not engine or engine in node.adapters:
        return None
    return f"its engine {engine!r} applies no adapters"


def _outside_adapter(case: Case) -> str | None:
    """Nobody sends an endpoint the adapter, and what it computes without it is another model's."""
    return None if case.request.adapter is None else "what is computed outside knows no adapter of ours"


def _links(case: Case) -> str | None:
    for a, b in itertools.combinations(map(case.node, case.roles), 2):
        if not _are_linked(a, b):
            return f"{a.name} and {b.name} have no connection to each other"
    return None


def _are_linked(a: NodeView, b: NodeView) -> bool:
    return any(link.node_id == b.node_id for link in a.links) or any(
        link.node_id == a.node_id for link in b.links
    )


FORM: dict[str, Rule] = {
    "ranks": _ranks,
    "nodes": _nodes,
    "coverage": _coverage,
    "shares": _shares,
    "cache": _cache,
}
PARTICIPATION: dict[str, Rule] = {
    **{name: _is_willing(judge) for name, judge in WILLING.items()},
    "memory": _of_each_node(_memory),
    "engine": _of_each_node(_engine),
    "adapter": _of_each_node(_adapter),
    "links": _links,
}
FORM_OUTSIDE: dict[str, Rule] = {"ranks": _ranks, "nodes": _nodes, "outside": _outside, "shares": _shares}
PARTICIPATION_OUTSIDE: dict[str, Rule] = {
    "privacy": _of_each_node(_outside_privacy),
    "bound": _bound,
    "numerics": _numerics,
    "adapter": _outside_adapter,
    "memory": _of_each_node(_memory),
    "engine": _of_each_node(_engine),
}
