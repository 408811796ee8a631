"""The best plans by layers, by tensor slices and by both, searched for among all sets and orders of nodes.

Up to EXACT_NODES nodes the search is exact by the core's price: for layers a dynamic programme over sets of
nodes (`_placing`), for tensor groups every set, the most promising first, until no other can win. With more
nodes layers are placed by a recurrence, a greedy path, the programme as a beam and an integer programme, and
tensor groups are sought around each node. Stages of groups are `_staging`'s.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from edged import (
    Candidate,
    ModelDescription,
    NodeView,
    PlanRequest,
    PolicyViolation,
    memory_of,
    price,
    rank_times,
)

from . import _paths, _placing, _ring, _staging
from ._grouping import all_groups, least_s, promising_groups
from ._tables import Tables, run_role, weight_of
from ._tensor_group import Group

EXACT_NODES = 12
KNOWN_FROM = 9  # nodes from which a placement to begin with saves the exact search more than it costs
WIDTH = 48  # states of the beam
WIDTH_LOST = 500  # where nothing was found: little room and few links
TENSOR_NODES = 12
FAR_S = 1e6  # of a link that is not there, for the integer programme
GROUPS_TRIED = 200  # of many nodes


def layers(
    model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
) -> Iterator[list[Candidate]]:
    """At once what a recurrence finds, then the best plan on at least two nodes; none where memory or links
    allow none."""
    tables = Tables(model, nodes, request)
    yield first_runs(tables)
    yield best_runs(tables)


def tensor(
    model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
) -> Iterator[list[Candidate]]:
    """The best tensor group of at least two nodes; none where none can be."""
    tables = Tables(model, nodes, request)
    yield best_group(tables, groups_tried=1)
    yield best_group(tables)


def hybrid(
    model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
) -> Iterator[list[Candidate]]:
    """The best plan of at least two stages, one of them at least a tensor group; none where none can be."""
    yield []
    roles = _staging.best(Tables(model, nodes, request))
    yield [] if roles is None else [Candidate("hybrid", roles)]


# --- layers ---------------------------------------------------------------------------------------


def first_runs(tables: Tables) -> list[Candidate]:
    """What takes milliseconds: the dynamic programme over layers and last nodes, or where it stays on one
    node a greedy path."""
    if tables.size < 2:
        return []
    chain = chain_of(tables)
    found = _paths.by_recurrence(chain)
    if found is None or len(found.runs) < 2:
        found = _paths.greedy(chain, least=2)
    return [] if found is None else [_candidate(tables, found)]


def best_runs(tables: Tables, exact_nodes: int = EXACT_NODES) -> list[Candidate]:
    """As `layers`, by heuristics from so many nodes on."""
    if tables.size < 2:
        return []
    chain = chain_of(tables)
    found = _exact(chain) if tables.size <= exact_nodes else _near(chain)
    return [] if found is None or not np.isfinite(found.seconds) else [_candidate(tables, found)]


def _exact(chain: _placing.Chain) -> _placing.Placement | None:
    known = _paths.greedy(chain, least=2) if chain.devices >= KNOWN_FROM else None
    better = _placing.fastest(chain, least=2, known=known.seconds if known else _placing.INFINITE)
    return better or known


def _near(chain: _placing.Chain) -> _placing.Placement | None:
    begun = [_paths.by_recurrence(chain), *by_ring(chain), _paths.greedy(chain, least=2)]
    found = [placement for placement in begun if placement and len(placement.runs) > 1]
    best = min(found, key=lambda placement: placement.seconds, default=None)
    known = best.seconds if best else _placing.INFINITE
    better = _placing.fastest_near(chain, WIDTH, least=2, known=known) or best
    better = better or _placing.fastest_near(chain, WIDTH_LOST, least=2)
    return better and _paths.improve(chain, better, least=2)


def chain_of(tables: Tables) -> _placing.Chain:
    """The core's price and memory as what each layer, hop and return adds."""
    compute = tables.seconds.sum(axis=2)[:, tables.kind_of]
    compute[:, -1] += tables.head_s
    memory = tables.bytes.sum(axis=1)[tables.kind_of]
    memory[-1] += tables.head_bytes
    base = np.full(tables.size, float(tables.worker_bytes))
    memory = np.broadcast_to(memory, compute.shape)
    hop, back = tables.hop + tables.token_s, tables.back + tables.token_s
    return _placing.Chain(compute, memory, hop, back, tables.room, base, None, tables.linked)


def _candidate(tables: Tables, placement: _placing.Placement) -> Candidate:
    roles = []
    for rank, (device, (start, end)) in enumerate(placement.runs):
        role = run_role(tables.model, tables.nodes[device], start, end)
        share = (end - start) / tables.model.layers
        roles.append(dataclasses.replace(role, rank=rank, stage=rank, share=share))
    return Candidate("layers", tuple(roles))


def by_ring(chain: _placing.Chain) -> list[_placing.Placement]:
    """The integer programme's counts, on an order by greedy hops: it knows no order itself."""
    inner = np.where(np.eye(chain.devices, dtype=bool), FAR_S, np.minimum(chain.hop, FAR_S))
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
    found = _paths.fill(chain, order)
    return [] if found is None or not chain.together[np.ix_(used, used)].all() else [found]


# --- tensor ---------------------------------------------------------------------------------------


def best_group(
    tables: Tables, exact_nodes: int = TENSOR_NODES, groups_tried: int | None = None
) -> list[Candidate]:
    """As `tensor`, by heuristics from so many nodes on; `groups_tried`: no more than the most promising."""
    if tables.size < 2:
        return []
    model, request = tables.model, tables.request
    is_small = tables.size <= exact_nodes
    tried = groups_tried or (None if is_small else GROUPS_TRIED)
    groups = [*(all_groups(tables) if is_small else promising_groups(tables))]
    bounds = np.concatenate([least_s(tables, each) for each in groups]) if groups else np.zeros(0)
    members = [row for each in groups for row in each.tolist()]
    promising = np.argsort(bounds, kind="stable")[:tried].tolist()
    best: tuple[float, Candidate] | None = None
    for index in promising:
        if not bounds[index] < (np.inf if best is None else best[0]):
            break
        candidate = _group(tables, sorted(members[index], key=lambda member: not tables.is_reached[member]))
        if candidate is None:
            continue
        time = price(candidate, model, tables.by_id, request).tpot_ms
        if time is not None and (best is None or time / 1000 < best[0]):
            best = (time / 1000, candidate)
    return [] if best is None else [best[1]]


def _group(tables: Tables, members: Sequence[int]) -> Candidate | None:
    model, request = tables.model, tables.request
    nodes = [tables.nodes[member] for member in members]
    weights = tables.weights[list(members)].tolist()
    try:
        roles = Group(model, nodes, weights, request, (0, model.layers)).roles()
    except PolicyViolation:
        return None
    fits = all(
        node.memory_budget is None or memory_of(role, model, request) <= node.memory_budget
        for role, node in zip(roles, nodes, strict=True)
    )
    return Candidate("tensor", roles) if fits else None


def weights_of(model: ModelDescription, members: Sequence[NodeView], request: PlanRequest) -> list[float]:
    """Whole models a second of each, as far as the policy lets it."""
    weights = []
    for node in members:
        times = rank_times(run_role(model, node, 0, model.layers), model, node, request)
        assert times is not None  # it is able
        weights.append(weight_of(node, times[0]))
    return weights
