"""The strategies "tensor" and "hybrid": nodes that run the same layers, each with some of the heads and
columns; all of them one such group, or stages of groups.

The nodes of a group work at once on every token, and meet in two all-reduces a layer: what fast links
are for. A group takes at most as many nodes as the model has groups of KV heads; more nodes, or links
too slow for one large group, make stages: each has a run of the layers and is a group of its own.
Parts go by the requested shares, else by measured speeds and no more to a node than its budget holds.

It does not know prices: the core prices a candidate, fills in what each role needs and refuses one
that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edged import Candidate, ModelDescription, NodeView, PlanRequest, PolicyViolation, Strategy, hookimpl

from . import _cutting, _hybrid
from ._tensor_group import Group

NAME = "tensor"


@hookimpl
def edged_strategies(settings: Mapping[str, Any]) -> Sequence[Strategy]:
    return [
        Strategy(NAME, propose, search="edged_plugins._search:tensor"),
        Strategy(_hybrid.NAME, _hybrid.propose, search="edged_plugins._search:hybrid"),
    ]


def propose(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[Candidate]:
    """One candidate for each group that can be cut; PolicyViolation where none of the wanted can."""
    candidates, refusal = [], None
    for group in _cutting.groups(NAME, nodes, request):
        try:
            candidates.append(_candidate(model, group, request))
        except PolicyViolation as error:
            refusal = refusal or error
    if refusal and not candidates and _cutting.is_asked_for(NAME, request):
        raise refusal
    return candidates


def _candidate(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> Candidate:
    weights = _cutting.weights_of(model, nodes, request)
    forgiving = request.nodes is not None and request.shares is None
    group = Group(model, nodes, weights, request, (0, model.layers), forgiving=forgiving)
    return Candidate(NAME, group.roles())
