"""The best plans by layers and by tensor slices, searched for among all sets and orders of nodes.

Up to EXACT_NODES nodes the search is exact by the core's price: for layers a dynamic programme over sets of
nodes (`_placing`), for tensor groups every set, the most promising first, until no other can win. With more
nodes layers are placed by a recurrence, a greedy path and an integer programme, and tensor groups are sought
among the nodes with the best links.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edged import (
    Candidate,
    ModelDescription,
    NodeView,
    PlanRequest,
    PolicyViolation,
    Role,
    hop_s,
    link_cost,
    memory_of,
    price,
    rank_times,
    return_s,
)

from . import _placing, _ring
from ._tensor_group import Group, groups_max

EXACT_NODES = 12
TENSOR_NODES = 12  # of many, those with the best links to the fastest
GROUPS_TRIED = 100  # of many nodes
FAR_S = 1e6  # of a link that is not there: never taken where another is


def layers(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[Candidate]:
    """The best plan on at least two nodes; none where memory or links allow none."""
    able = _able(model, nodes, request)
    if len(able) < 2:
        return []
    chain = _chain(model, able, nodes[0], request)
    if len(able) <= EXACT_NODES:
        found = [_placing.fastest(chain, least=2)]
    else:
        found = [_placing.by_recurrence(chain), _placing.greedy(chain), *_by_ring(chain)]
    placements = {placement.runs: placement for placement in found if placement and len(placement.runs) > 1}
    return [_candidate(model, able, placement) for placement in placements.values()]


def _able(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[NodeView]:
    """Those that are measured, and may have a role at all."""
    role = Role(0, "", 0, (0, 1), (0, model.heads), (0, model.ffn), (0, 0), 1.0)
    return [node for node in nodes if not node.refuses and rank_times(role, model, node, request) is not None]


def _chain(
    model: ModelDescription, nodes: Sequence[NodeView], submitter: NodeView, request: PlanRequest
) -> _placing.Chain:
    """The core's price and memory as what each layer, hop and return adds."""
    by_id = {node.node_id: node for node in (submitter, *nodes)}
    size, count = len(nodes), model.layers
    compute, memory = np.zeros((size, count)), np.zeros((size, count))
    hop, back = np.full((size, size), FAR_S), np.full((size, size), FAR_S)
    fixed, base = np.zeros(size), np.zeros(size)
    for d, node in enumerate(nodes):
        fixed[d] = _seconds(_run(model, node, 0, 0), model, node, request)
        base[d] = memory_of(_run(model, node, 0, 0), model, request)
        for i in range(count):
            run = _run(model, node, i, i + 1)
            compute[d, i] = _seconds(run, model, node, request) - fixed[d]
            memory[d, i] = memory_of(run, model, request) - base[d]
    for a, b in itertools.product(range(size), repeat=2):
        link = link_cost(by_id, nodes[a].node_id, nodes[b].node_id)
        if link is not None:
            hop[a, b] = (0.0 if a == b else hop_s(link, model, 1, 1)) + fixed[b]
            back[a, b] = (0.0 if a == b else return_s(link)) + fixed[b]
    linked = np.array([[link_cost(by_id, a.node_id, b.node_id) is not None for b in nodes] for a in nodes])
    room = np.array([np.inf if n.memory_budget is None else n.memory_budget for n in nodes], float)
    return _placing.Chain(compute, memory, hop, back, room, base, None, linked)


def _run(model: ModelDescription, node: NodeView, start: int, end: int) -> Role:
    """A run of layers as a role; the one with the last layer has the output head."""
    vocab = (0, model.vocab) if end == model.layers and end > start else (0, 0)
    return Role(0, node.node_id, 0, (start, end), (0, model.heads), (0, model.ffn), vocab, 1.0)


def _seconds(role: Role, model: ModelDescription, node: NodeView, request: PlanRequest) -> float:
    times = rank_times(role, model, node, request)
    assert times is not None  # it is able
    return times[0]


def _candidate(
    model: ModelDescription, nodes: Sequence[NodeView], placement: _placing.Placement
) -> Candidate:
    roles = []
    for rank, (device, (start, end)) in enumerate(placement.runs):
        role = _run(model, nodes[device], start, end)
        share = (end - start) / model.layers
        roles.append(dataclasses.replace(role, rank=rank, stage=rank, share=share))
    return Candidate("layers", tuple(roles))


def _by_ring(chain: _placing.Chain) -> list[_placing.Placement]:
    """The integer programme's counts, on an order by greedy hops: it knows no order itself."""
    inner = np.where(np.eye(chain.devices, dtype=bool), np.inf, chain.hop)
    devices = [
        _ring.Device(
            float(chain.compute[d].mean()),
            0.0,
            float(inner[:, d].min()),
            float("inf"),
            int(max(0.0, chain.room[d] - chain.base[d]) // chain.memory[d].max())
            if np.isfinite(chain.room[d])
            else chain.layers,
        )
        for d in range(chain.devices)
    ]
    ring = _ring.solve(devices, chain.layers)
    if ring is None:
        return []
    used = [d for d, count in enumerate(ring.layers) if count]
    order, left = used[:1], used[1:]
    while left:
        following = min(left, key=lambda d: chain.hop[order[-1], d])
        order.append(following)
        left.remove(following)
    found = _placing.fill(chain, order)
    if found is None or any(not chain.partners[a] >> b & 1 for a, b in itertools.permutations(used, 2)):
        return []
    return [found]


# --- tensor ---------------------------------------------------------------------------------------


def tensor(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> list[Candidate]:
    """The best tensor group of at least two nodes; none where none can be."""
    able = _able(model, nodes, request)
    by_id = {node.node_id: node for node in (nodes[0], *able)}
    if len(able) > TENSOR_NODES:
        able = _well_linked(able, model, by_id)
    best: tuple[float, Candidate] | None = None
    promising = sorted(_bounded(model, able, by_id, request), key=lambda row: row[0])
    for bound, members in promising[: None if len(nodes) <= EXACT_NODES else GROUPS_TRIED]:
        if best is not None and bound >= best[0]:
            break
        candidate = _group(model, members, request)
        if candidate is None:
            continue
        time = price(candidate, model, by_id, request).tpot_ms
        if time is not None and (best is None or time < best[0]):
            best = (time, candidate)
    return [] if best is None else [best[1]]


def _group(model: ModelDescription, members: Sequence[NodeView], request: PlanRequest) -> Candidate | None:
    try:
        roles = Group(model, members, weights_of(model, members, request), request, (0, model.layers)).roles()
    except PolicyViolation:
        return None
    fits = all(
        node.memory_budget is None or memory_of(role, model, request) <= node.memory_budget
        for role, node in zip(roles, members, strict=True)
    )
    return Candidate("tensor", roles) if fits else None


def weights_of(model: ModelDescription, members: Sequence[NodeView], request: PlanRequest) -> list[float]:
    """Whole models a second of each, as far as the policy lets it."""
    return [
        node.weight / _seconds(_run(model, node, 0, model.layers), model, node, request) for node in members
    ]


def _bounded(
    model: ModelDescription, nodes: Sequence[NodeView], by_id: Mapping[str, NodeView], request: PlanRequest
) -> Iterator[tuple[float, tuple[NodeView, ...]]]:
    """(ms that a group takes at least, its nodes): as if weights could be cut anywhere."""
    if not nodes:
        return
    whole = [_seconds(_run(model, node, 0, model.layers), model, node, request) for node in nodes]
    speed = dict(zip((node.node_id for node in nodes), whole, strict=True))
    worker = memory_of(_run(model, nodes[0], 0, 0), model, request)
    needed = memory_of(_run(model, nodes[0], 0, model.layers), model, request) - worker
    room = {
        node.node_id: _placing.INFINITE if node.memory_budget is None else node.memory_budget - worker
        for node in nodes
    }
    for count in range(2, min(len(nodes), groups_max(model)) + 1):
        for members in itertools.combinations(nodes, count):
            if sum(room[node.node_id] for node in members) < needed:
                continue
            links = [link_cost(by_id, a.node_id, b.node_id) for a, b in itertools.combinations(members, 2)]
            if None in links:
                continue
            latency = max(link.latency_s for link in links if link)
            compute = 1 / sum(1 / speed[node.node_id] for node in members)
            yield 1000 * (compute + model.reductions * model.layers * latency), members


def _well_linked(
    nodes: Sequence[NodeView], model: ModelDescription, by_id: Mapping[str, NodeView]
) -> list[NodeView]:
    """The best linked ones to the first of them, and to those taken before."""
    taken, left = list(nodes[:1]), list(nodes[1:])
    while left and len(taken) < TENSOR_NODES:

        def worst(node: NodeView) -> float:
            links = [link_cost(by_id, node.node_id, other.node_id) for other in taken]
            return max(FAR_S if link is None else link.latency_s for link in links)

        nearest = min(left, key=worst)
        taken.append(nearest)
        left.remove(nearest)
    return taken
