"""The strategy "layers": each node runs a run of whole layers and hands the hidden states on.

One message a token and link, of a few kilobytes: what slow links bear best. The last rank computes
the output head. Layers go by the requested shares, else by each node's measured decode speed and no
more to a node than its memory budget holds.

It does not know prices: the core prices a candidate, fills in what each role needs and refuses one
that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from edged import (
    Candidate,
    ModelDescription,
    NodeView,
    PlanRequest,
    PolicyViolation,
    Role,
    Strategy,
    hookimpl,
)

from . import _cutting, _fitting

NAME = "layers"


@hookimpl
def edged_strategies(settings: Mapping[str, Any]) -> Sequence[Strategy]:
    return [Strategy(NAME, propose, search="edged_plugins._search:layers")]


def propose(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[Candidate]:
    """One candidate for each group that has a layer for every node."""
    groups = _cutting.groups(NAME, nodes, request)
    fitting = [group for group in groups if len(group) <= model.layers]
    if groups and not fitting and _cutting.is_asked_for(NAME, request):
        raise PolicyViolation(
            f"expected at most one node for each of {model.layers} layers; {len(groups[0])} came",
            remedy="name fewer nodes",
        )
    return [_candidate(model, group, request) for group in fitting]


def _candidate(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> Candidate:
    counts = _counts(model, nodes, request)
    layers = list(pairwise([0, *accumulate(counts)]))
    return Candidate(
        NAME, tuple(_role(model, nodes, rank, layers[rank], counts[rank]) for rank in range(len(nodes)))
    )


def _role(
    model: ModelDescription, nodes: Sequence[NodeView], rank: int, layers: tuple[int, int], count: int
) -> Role:
    return Role(
        rank=rank,
        node_id=nodes[rank].node_id,
        stage=rank,
        layers=layers,
        heads=(0, model.heads),
        ffn=(0, model.ffn),
        vocab=(0, model.vocab) if rank == len(nodes) - 1 else (0, 0),
        share=count / model.layers,
    )


def _counts(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[int]:
    """Layers of each rank; where no division fits the budgets, the one that the core's refusal names."""
    weights = _cutting.weights_of(model, nodes, request)
    if request.shares is not None:
        return _cutting.apportion_all(model.layers, weights)

    def held(rank: int) -> int:
        def role(count: int) -> Role:
            return _role(model, nodes, rank, _fitting.heaviest_run(model, count), count)

        return _fitting.largest(model.layers, role, nodes[rank], model, request)

    caps = [held(rank) for rank in range(len(nodes))]
    counts = _cutting.balance(model.layers, weights, caps) or _cutting.balance(model.layers, weights)
    assert counts is not None  # there is a layer for every node
    return counts
