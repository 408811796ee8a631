"""The strategy "hybrid": stages of tensor groups.

Nodes keep their order: the first ones are the first stage. A stage's layers go by the sum of its
members' weights, and the members divide heads, columns and rows as a tensor group does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from edged import Candidate, ModelDescription, NodeView, PlanRequest, PolicyViolation, Role

from . import _cutting, _fitting
from ._tensor_group import Group, groups_max

NAME = "hybrid"
NODES_MIN = 3  # two nodes are one group, or two stages of one
NODES_OF_PAIRS = 4  # from here on two groups are worth a look, also where one could take all


def propose(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[Candidate]:
    """A candidate for each number of stages, of each group of nodes; the core's price decides.

    PolicyViolation where the wanted nodes make no stages of this model.
    """
    candidates: list[Candidate] = []
    refusal: PolicyViolation | None = None
    asked = _cutting.is_asked_for(NAME, request)
    if request.strategy != NAME and len(request.nodes or request.shares or nodes) < NODES_MIN:
        return []
    for group in _cutting.groups(NAME, nodes, request, NODES_MIN):
        if not asked and len(group) <= min(groups_max(model), NODES_OF_PAIRS - 1):
            continue  # one tensor group takes them all
        for stages in _stage_counts(model, len(group)):
            try:
                candidates.append(_candidate(model, group, stages, request))
            except PolicyViolation as error:
                refusal = refusal or error
    if not candidates and request.strategy == NAME:
        raise refusal or PolicyViolation(
            f"expected nodes that make stages of at most {groups_max(model)}, for at most {model.layers} "
            f"layers; {len(nodes)} came",
            remedy="name fewer nodes",
        )
    return candidates


def _stage_counts(model: ModelDescription, nodes: int) -> range:
    """From stages as wide as KV heads allow to stages of two; narrower ones are the strategy layers."""
    fewest = max(2, math.ceil(nodes / groups_max(model)))
    most = max(2, nodes // 2, fewest)
    return range(fewest, min(most, model.layers) + 1)


def _candidate(
    model: ModelDescription, nodes: Sequence[NodeView], stages: int, request: PlanRequest
) -> Candidate:
    weights = _cutting.weights_of(model, nodes, request)
    sizes = _cutting.apportion(len(nodes), [1] * stages)
    members = list(pairwise([0, *accumulate(sizes)]))

    def group(stage: int, layers: tuple[int, int]) -> Group:
        start, end = members[stage]
        return Group(
            model,
            nodes[start:end],
            weights[start:end],
            request,
            layers,
            stage=stage,
            first_rank=start,
            has_head=stage == stages - 1,
            forgiving=request.shares is None and (request.nodes is not None or request.strategy == NAME),
        )

    def roles(counts: Sequence[int]) -> list[Role]:
        layers = pairwise([0, *accumulate(counts)])
        return [role for stage, run in enumerate(layers) for role in group(stage, run).roles()]

    def held(stage: int) -> int:
        """The most layers that the stage's members hold together."""

        def is_too_much(count: int) -> bool:
            trial = group(stage, _fitting.heaviest_run(model, count))
            return not _fitting.fits(trial.roles(), trial.nodes, model, request)

        return bisect_left(range(1, model.layers + 1), True, key=is_too_much)

    speeds = [sum(weights[start:end]) for start, end in members]
    if request.shares is not None:
        return Candidate(NAME, tuple(roles(_cutting.apportion_all(model.layers, speeds))))
    counts = _cutting.balance(model.layers, speeds)
    assert counts is not None  # there is a layer for every stage
    by_speed = roles(counts)
    if not _fitting.fits(by_speed, nodes, model, request):
        capped = _cutting.balance(model.layers, speeds, [held(stage) for stage in range(stages)])
        by_speed = roles(capped) if capped is not None else by_speed
    return Candidate(NAME, tuple(by_speed))
