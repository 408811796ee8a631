"""The strategy "layers": each node runs a run of whole layers and hands the hidden states on.

One message a token and link, of a few kilobytes: what slow links bear best. The last rank computes
the output head. Layers go by the requested shares, else by each node's measured decode speed.

It does not know prices or memory: the core prices a candidate, fills in what each role needs and
refuses one that does not fit.
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

from . import _cutting

NAME = "layers"


@hookimpl
def edged_strategies(settings: Mapping[str, Any]) -> Sequence[Strategy]:
    return [Strategy(NAME, propose)]


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
    counts = _cutting.apportion_all(model.layers, _cutting.weights_of(model, nodes, request))
    layers = list(pairwise([0, *accumulate(counts)]))
    last = len(nodes) - 1
    return Candidate(
        NAME,
        tuple(
            Role(
                rank=rank,
                node_id=node.node_id,
                stage=rank,
                layers=layers[rank],
                heads=(0, model.heads),
                ffn=(0, model.ffn),
                vocab=(0, model.vocab) if rank == last else (0, 0),
                share=counts[rank] / model.layers,
            )
            for rank, node in enumerate(nodes)
        ),
    )
