"""The strategy "tensor": every node runs all layers, each with some of the heads and columns.

All nodes work at once on every token, and meet in two all-reduces a layer: what fast links are for.
Attention is cut between whole groups of query heads that share a KV head, the feed-forward and the
output head between whole quantisation blocks. Shares are the requested ones, else measured speeds.

It does not know prices or memory: the core prices a candidate, fills in what each role needs and
refuses one that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

NAME = "tensor"


@hookimpl
def edged_strategies(settings: Mapping[str, Any]) -> Sequence[Strategy]:
    return [Strategy(NAME, propose)]


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
    heads = _cutting.ranges(_head_counts(model, weights, forgiving), model.head_unit, model.heads)
    ffn = _spread("columns of the feed-forward", model.ffn, model.ffn_unit, weights)
    vocab = _spread("rows of the output head", model.vocab, model.vocab_unit, weights)
    return Candidate(
        NAME,
        tuple(
            Role(
                rank=rank,
                node_id=node.node_id,
                stage=0,
                layers=(0, model.layers),
                heads=heads[rank],
                ffn=ffn[rank],
                vocab=vocab[rank],
                share=(heads[rank][1] - heads[rank][0]) / model.heads,
            )
            for rank, node in enumerate(nodes)
        ),
    )


def _head_counts(model: ModelDescription, weights: Sequence[float], forgiving: bool) -> list[int]:
    """Head groups of each rank. `forgiving`: a rank whose weight comes to none gets one all the same,
    which is right where somebody named the nodes and nobody the shares; else it is refused."""
    groups = _units("query heads", model.heads, model.head_unit, len(weights))
    counts = _cutting.apportion(groups, weights)
    if forgiving:
        return _cutting.apportion_all(groups, weights)
    if 0 in counts:
        rank = counts.index(0)
        raise PolicyViolation(
            f"expected shares of at least one group of {model.head_unit} of the {model.heads} query heads; "
            f"rank {rank}'s comes to {weights[rank] / sum(weights) * model.heads:.2g} heads",
            remedy=f"give rank {rank} a larger share, or leave it out",
        )
    return counts


def _spread(what: str, total: int, unit: int, weights: Sequence[float]) -> list[tuple[int, int]]:
    counts = _cutting.apportion_all(_units(what, total, unit, len(weights)), weights)
    return _cutting.ranges(counts, unit, total)


def _units(what: str, total: int, unit: int, ranks: int) -> int:
    units = math.ceil(total / unit)
    if units < ranks:
        raise PolicyViolation(
            f"expected at most {units} nodes, since this model's {total} {what} go {unit} at a time; "
            f"{ranks} came",
            remedy=f"name at most {units} nodes, or use --strategy layers",
        )
    return units
