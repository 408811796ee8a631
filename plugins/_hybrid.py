"""The strategy "hybrid": stages of tensor groups.

Nodes keep their order: the first ones are the first stage. A stage's layers go by the sum of its
members' weights, and the members divide heads, columns and rows as a tensor group does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from edged import Candidate, ModelDescription, NodeView, PlanRequest, PolicyViolation, Role, memory_of

from . import _cutting, _fitting
from ._tensor_group import Group, groups_max

NAME = "hybrid"
NODES_MIN = 3  # two nodes are one group, or two stages of one
NODES_OF_PAIRS = 4  # from here on two groups are worth a look, also where one could take all

TRIALS = 5  # heads, columns and rows are cut in units, so a stage may hold a layer less than its bytes say


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

    speeds = [sum(weights[start:end]) for start, end in members]
    if request.shares is not None:
        return Candidate(NAME, tuple(roles(_cutting.apportion_all(model.layers, speeds))))
    counts = _cutting.balance(model.layers, speeds)
    assert counts is not None  # there is a layer for every stage
    by_speed = roles(counts)
    if _fitting.fits(by_speed, nodes, model, request):
        return Candidate(NAME, tuple(by_speed))
    caps = [_held(model, nodes[start:end], request, is_last=end == len(nodes)) for start, end in members]
    for _ in range(TRIALS):
        counts = _cutting.balance(model.layers, speeds, caps)
        if counts is None:
            break
        capped = roles(counts)
        fitting = [_fitting.fits(capped[a:b], nodes[a:b], model, request) for a, b in members]
        if all(fitting):
            return Candidate(NAME, tuple(capped))
        caps = [count - (not fits) for count, fits in zip(counts, fitting, strict=True)]
    return Candidate(NAME, tuple(by_speed))


def _held(model: ModelDescription, members: Sequence[NodeView], request: PlanRequest, is_last: bool) -> int:
    """The most layers that a stage's members could hold if they were cut to the byte."""
    budgets = [member.memory_budget for member in members]
    if None in budgets:
        return model.layers

    def need(layers: int, head: int) -> int:
        parts = ((0, layers), (0, model.heads), (0, model.ffn), (0, head))
        return memory_of(Role(0, members[0].node_id, 0, *parts, share=1.0), model, request)

    worker, bare = need(0, 0), need(0, model.vocab if is_last else 0)
    layer = (need(model.layers, 0) - worker) / model.layers
    room = sum(budget - worker for budget in budgets if budget is not None) - (bare - worker)
    return max(0, min(model.layers, math.floor(room / layer)))
