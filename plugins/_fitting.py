"""What a node's memory budget holds of a model, as the core counts it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from edged import ModelDescription, NodeView, PlanRequest, Role, memory_of

NEAR = 3  # units to either side


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

    def need(count: int) -> int:
        return memory_of(role(count), model, request)

    if budget is None or need(units) <= budget:
        return units
    least = need(1)
    if least > budget:
        return 0
    # Needs grow evenly but for rounding, so the answer is near; a vocabulary has 10^5 units.
    guess = 1 + (budget - least) * (units - 1) // (need(units) - least)
    low, high = max(1, guess - NEAR), min(units, guess + NEAR)
    if not need(low) <= budget < need(high):
        low, high = 1, units
    return low + bisect_right(range(low + 1, high), budget, key=need)


def heaviest_run(model: ModelDescription, count: int) -> tuple[int, int]:
    """The `count` consecutive layers with the most bytes: what fits for them fits anywhere."""
    starts = range(model.layers - count + 1)
    start = max(starts, key=lambda start: sum(model.layer_bytes[start : start + count]))
    return start, start + count
