"""Stages of tensor groups, searched for: which nodes are one group, in which order, with which layers.

Up to EXACT_NODES nodes every group with every leader (its first rank, whose links the hops take) is a stop of
the dynamic programme, so the search is exact, given that a group divides a layer as `_tensor_group` does.
With more nodes the programme is a beam over a pool of groups: each node with those it gains most from. Then
groups near those of the best path come into the pool, for a few rounds: merged, split and exchanged, as
HexGen changes its groups (arXiv:2311.11514), and joined by nodes without a part where the path is weakest
(Petals' best span, arXiv:2312.08361).
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from edged import Role

from ._grouping import least_s, promising_groups
from ._pool import Members, Pool, Steps
from ._tables import Tables
from ._tensor_group import groups_max

EXACT_NODES = 5
EVERY_NODES = 6  # up to which every group is one to begin with
GROUPS = 40  # to begin with
AROUND = 2  # groups around each node
SINGLES = 24  # nodes that may be a stage alone
LEADERS_NODES = 8  # up to which every leader is tried
WIDTH = 24  # states of the beam
LOOKS = 12  # paths that have a run whose division was not known, for one pool
ROUNDS = 3  # of changing the best path's groups
CHANGES = 160  # groups near those of a path
JOINING = 16  # nodes without a part that are tried in every group
SMALLER_S = 1e-9  # of latency, which a node more in a group weighs
EXACT_SECONDS = 1.0  # of the exact search, after which the best so far counts
SECONDS = 0.5  # after which the best path so far counts


def best(tables: Tables, exact_nodes: int = EXACT_NODES) -> tuple[Role, ...] | None:
    """The roles of the best plan of at least two stages, at least one of several nodes; None where there is
    none. By heuristics from so many nodes on."""
    if tables.size < 3:
        return None
    if tables.size > exact_nodes:
        return _near(tables)
    pool = Pool(tables, until=time.monotonic() + EXACT_SECONDS)
    pool.add(group for members in _subsets(tables) for group in _led(members))
    return pool.roles(pool.solve(None, None))


def _subsets(tables: Tables) -> Iterator[Members]:
    """Every set of nodes that can be a stage among others."""
    for count in range(1, _most(tables) + 1):
        yield from itertools.combinations(range(tables.size), count)


def _most(tables: Tables) -> int:
    """Nodes of a stage among others."""
    return min(tables.size - 1, groups_max(tables.model))


def _led(members: Sequence[int]) -> Iterator[Members]:
    """With each as the leader."""
    for leader in members:
        yield (leader, *(member for member in members if member != leader))


# --- many nodes -----------------------------------------------------------------------------------


def _near(tables: Tables) -> tuple[Role, ...] | None:
    pool = Pool(tables, until=time.monotonic() + SECONDS)
    stages = [led for members in _promising(tables) for led in _led_well(tables, members)]
    singles = [(int(node),) for node in np.argsort(-tables.weights, kind="stable")[:SINGLES]]
    pool.add([*stages, *singles])
    found = pool.solve(WIDTH, LOOKS)
    for _ in range(ROUNDS):
        if found is None or pool.is_late:
            break
        path = [members for members, _ in found[1]]
        changed = _first_by_time(tables, _changed(tables, found[1]), CHANGES)
        among = [*path, *(led for members in changed for led in _led_well(tables, members)), *singles]
        pool.add(among)
        better = pool.solve(WIDTH, LOOKS, among)
        if better is None or better[0] >= found[0] * (1 - 1e-9):
            break
        found = better
    return pool.roles(found)


def _first_by_time(tables: Tables, groups: Iterable[Members], count: int) -> list[Members]:
    """Those that would run the whole model soonest, if it could be cut anywhere; and all single nodes."""
    different = dict.fromkeys(members for members in groups if len(members) <= _most(tables))
    timed: list[tuple[float, Members]] = []
    for size, same in itertools.groupby(sorted(different, key=len), key=len):
        rows = [*same]
        if size > 1:
            timed += zip(least_s(tables, np.array(rows), has_room=False).tolist(), rows, strict=True)
    return [members for _, members in sorted(timed)[:count]] + [each for each in different if len(each) == 1]


def _promising(tables: Tables) -> list[Members]:
    """Groups that would run the model soonest, some around each node; those that leave each of these the
    others; and nodes joined by their best links, more and more of them."""
    if tables.size <= EVERY_NODES:
        return [members for members in _subsets(tables) if len(members) > 1]
    groups = [each for each in promising_groups(tables) if len(each) and each.shape[1] <= _most(tables)]
    members = [tuple(row) for each in groups for row in each.tolist()]
    ordered = _first_by_time(tables, members, len(members))
    of_nodes = [
        each
        for node in range(tables.size)
        for each in itertools.islice((each for each in ordered if node in each), AROUND)
    ]
    first = list(dict.fromkeys([*ordered[: GROUPS // 2], *of_nodes]))[:GROUPS]
    others = [tuple(node for node in range(tables.size) if node not in each) for each in first]
    return list(dict.fromkeys([*first, *_joined_by_links(tables), *others]))


def _joined_by_links(tables: Tables) -> Iterator[Members]:
    """Two groups after two made one, over the least latency between any of both; of equal ones the smallest.
    What is one group at some time leaves the others whole groups too."""
    groups: dict[int, Members] = {node: (node,) for node in range(tables.size)}
    apart, sizes = tables.latency.copy(), np.ones(tables.size)
    np.fill_diagonal(apart, np.inf)
    while True:
        together = sizes[:, None] + sizes
        cost = np.where(together <= _most(tables), apart + SMALLER_S * together, np.inf)
        one, two = (int(index) for index in np.unravel_index(int(cost.argmin()), cost.shape))
        if not np.isfinite(cost[one, two]):
            return
        groups[one] = tuple(sorted(groups[one] + groups.pop(two)))
        sizes[one] += sizes[two]
        apart[one] = apart[:, one] = np.maximum(apart[one], apart[two])
        apart[two] = apart[:, two] = apart[one, one] = np.inf
        yield groups[one]


def _led_well(tables: Tables, members: Members) -> list[Members]:
    """With those as leaders that are the nearest to others: in the mean, and to the nearest."""
    if not 0 < len(members) <= _most(tables):
        return []
    if len(members) == 1:
        return [members]
    if tables.size <= LEADERS_NODES:
        return [*_led(members)]
    others = np.setdiff1d(np.arange(tables.size), members)
    hops = tables.hop[np.ix_(members, others)]
    reached = tables.is_reached[list(members)]
    if reached.any():
        hops[~reached] += hops.max()  # it can be no first stage
    leaders = {members[int(np.median(hops, axis=1).argmin())], members[int(hops.min(axis=1).argmin())]}
    ordered = sorted(members)
    return [(leader, *(member for member in ordered if member != leader)) for leader in sorted(leaders)]


def _changed(tables: Tables, path: Steps) -> Iterator[Members]:
    """Groups near those of a path: two of them merged, one split, a node left out, exchanged for one of
    another stage or for one that has no part, or joined by one where the path is slowest."""
    stages = [set(members) for members, _ in path]
    unused = [node for node in range(tables.size) if not any(node in stage for stage in stages)]
    near = sorted(unused, key=lambda node: -float(tables.weights[node]))[:JOINING]
    for node in unused:
        yield tuple(sorted(stages[_joined(tables, path, node)] | {node}))
    for stage in stages:
        others = [node for other in stages if other is not stage for node in other]
        for node in stage:
            left = stage - {node}
            yield (node,)
            yield tuple(sorted(left))
            for other in (*others, *near):
                yield tuple(sorted(left | {other}))
        for other in (*others, *near):
            yield tuple(sorted(stage | {other}))
        ranked = sorted(stage, key=lambda node: float(tables.weights[node]))
        yield tuple(sorted(ranked[::2]))
        yield tuple(sorted(ranked[1::2]))
    for one, two in itertools.combinations(stages, 2):
        yield tuple(sorted(one | two))


def _joined(tables: Tables, path: Steps, node: int) -> int:
    """The stage with most of the layers that a new node would serve best: as many as it holds."""
    pace = tables.weights
    throughput = [
        float(pace[list(members)].sum()) * tables.model.layers / (end - start)
        for members, (start, end) in path
        for _ in range(start, end)
    ]
    layer_bytes = float(tables.bytes.sum(axis=1)[tables.kind_of].mean())
    held = (float(tables.room[node]) - tables.worker_bytes) / layer_bytes
    count = int(min(max(1.0, held), len(throughput)))
    start = best_span(throughput, count)
    shared = [min(end, start + count) - max(begin, start) for _, (begin, end) in path]
    return shared.index(max(shared))


def best_span(throughput: Sequence[float], n: int) -> int:
    """Where a node that holds `n` blocks joins those whose `throughput` is given for each block: the span
    whose blocks, weakest first, are the weakest; of equal ones the first.

    Source: Petals, `block_selection.py` (arXiv:2312.08361).
    """
    assert 1 <= n <= len(throughput)
    return min(
        range(len(throughput) - n + 1), key=lambda start: (sorted(throughput[start : start + n]), start)
    )
