"""Which sets of nodes are worth a look as a tensor group, and what each takes at least.

Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from edged import LinkCost, sums_s

from ._tables import Tables
from ._tensor_group import groups_max

GROUPS_IMPROVED = 8  # of each number of members
ROOM_MAX = 1e15  # bytes: more than any, where a budget is unknown


def all_groups(tables: Tables) -> Iterator[np.ndarray]:
    """(groups, members) for each number of members."""
    for count in range(2, min(tables.size, groups_max(tables.model)) + 1):
        yield np.array([*itertools.combinations(range(tables.size), count)])


def promising_groups(tables: Tables) -> Iterator[np.ndarray]:
    """As `all_groups`, those around each node: grown by whom it gains most from, and by who has most room;
    and the best of them with one node in another's place."""
    grown: dict[int, list[np.ndarray]] = {}
    for is_by_room in (False, True):
        groups = np.arange(tables.size)[:, None]
        while len(groups) and groups.shape[1] < min(tables.size, groups_max(tables.model)):
            groups = _grown(tables, groups, is_by_room)
            grown.setdefault(groups.shape[1], []).append(np.sort(groups))
    for each in grown.values():
        found = np.unique(np.concatenate(each), axis=0)
        if len(found):
            yield found
            best = found[np.argsort(least_s(tables, found), kind="stable")[:GROUPS_IMPROVED]]
            yield _exchanged(tables.size, best)


def _grown(tables: Tables, groups: np.ndarray, is_by_room: bool) -> np.ndarray:
    """(groups, members + 1) with one more node each; without those that no node is linked to."""
    everyone = np.arange(tables.size)
    wider = np.concatenate(
        [np.repeat(groups, tables.size, axis=0), np.tile(everyone, len(groups))[:, None]], axis=1
    )
    cost = least_s(tables, wider, has_room=False)
    cost[(wider[:, :-1] == wider[:, -1:]).any(axis=1)] = np.inf
    cost = cost.reshape(len(groups), tables.size)
    if is_by_room:
        cost = np.where(np.isfinite(cost), -np.minimum(tables.room, ROOM_MAX), np.inf)
    may = np.isfinite(cost.min(axis=1))
    return np.concatenate([groups, cost.argmin(axis=1)[:, None]], axis=1)[may]


def _exchanged(size: int, groups: np.ndarray) -> np.ndarray:
    made = {
        tuple(sorted([*group[:place], other, *group[place + 1 :]]))
        for group in groups.tolist()
        for place in range(len(group))
        for other in set(range(size)) - set(group)
    }
    return np.array(sorted(made - set(map(tuple, groups.tolist())))).reshape(-1, groups.shape[1])


def least_s(tables: Tables, groups: np.ndarray, has_room: bool = True) -> np.ndarray:
    """(groups,) seconds of a token that each of (groups, members) takes at least: as if weights could be cut
    anywhere. Infinite where links, or, if `has_room` asks, the sum of the budgets, allow none."""
    if not len(groups):
        return np.zeros(0)
    model, kinds = tables.model, tables.kind_of
    parts = tables.seconds[:, kinds].sum(axis=1)
    kept, cut = tables.token_s + parts[:, 0], _cheapest(np.stack([parts[:, 1], parts[:, 2], tables.head_s]))
    compute = (1 + (kept / cut)[groups].sum(axis=1)) / (1 / cut)[groups].sum(axis=1)
    latency, bytes_s, burst = (
        np.zeros(len(groups)),
        np.full(len(groups), np.inf),
        np.full(len(groups), np.inf),
    )
    for a, b in itertools.combinations(groups.T, 2):
        np.maximum(latency, tables.latency[a, b], out=latency)
        np.minimum(bytes_s, tables.bytes_s[a, b], out=bytes_s)
        np.minimum(burst, tables.burst_bytes[a, b], out=burst)
    found = np.full(len(groups), np.inf)
    may = np.isfinite(latency) & (bytes_s > 0)
    if has_room:
        needed = tables.bytes[kinds].sum(axis=0)
        room = (tables.room - tables.worker_bytes - needed[0])[groups].sum(axis=1)
        may &= room * (1 + 1e-9) >= needed[1] + needed[2] + tables.head_bytes - model.layers
    links = LinkCost(
        latency[may], np.where(burst > 0, np.inf, bytes_s)[may]
    )  # of arrays; bursts may hide bytes
    each = sums_s(links, model, tables.request, groups.shape[1], 1)
    found[may] = compute[may] + model.layers * np.minimum.reduce(each)
    return found


def _cheapest(parts: np.ndarray) -> np.ndarray:
    """(nodes,) seconds of all that is cut, given (parts, nodes), as if it consisted of the part in which each
    node is the cheapest against the first: nodes attend and read at ratios of their own."""
    share = parts[:, :1] / parts[:, :1].sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(np.where(share > 0, parts / share, np.inf).min(axis=0), 1e-15)
