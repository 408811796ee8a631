"""What a node's memory budget holds of a model, as the core counts it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from edged import ModelDescription, NodeView, PlanRequest, Role, memory_of


def fits(
    roles: Sequence[Role], nodes: Sequence[NodeView], model: ModelDescription, request: PlanRequest
) -> bool:
    """Does every node, of the rank at its place, hold its role? Yes where a budget is unknown."""
    return all(
        node.memory_budget is None or memory_of(role, model, request) <= node.memory_budget
        for role, node in zip(roles, nodes, strict=True)
    )


def largest(
    units: int,
    role: Callable[[int], Role],
    node: NodeView,
    model: ModelDescription,
    request: PlanRequest,
) -> int:
    """The most of `units` whose role the node's budget holds; 0 where not even one's."""
    budget = node.memory_budget
    if budget is None:
        return units
    return bisect_right(range(1, units + 1), budget, key=lambda count: memory_of(role(count), model, request))


def heaviest_run(model: ModelDescription, count: int) -> tuple[int, int]:
    """The `count` consecutive layers with the most bytes: what fits for them fits anywhere."""
    starts = range(model.layers - count + 1)
    start = max(starts, key=lambda start: sum(model.layer_bytes[start : start + count]))
    return start, start + count
