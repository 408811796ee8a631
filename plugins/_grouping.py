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


def all_groups(tables: Tables) -> Iterator[np.ndarray]:
    """(groups, members) for each number of members."""
    for count in range(2, min(tables.size, groups_max(tables.model)) + 1):
        yield np.array([*itertools.combinations(range(tables.size), count)])


def promising_groups(tables: Tables) -> Iterator[np.ndarray]:
    """As `all_groups`, those around each node: grown by whom it gains most from; and the best of them with
    one node in another's place."""
    everyone = np.arange(tables.size)
    groups = everyone[:, None]
    grown = []
    for _ in range(2, min(tables.size, groups_max(tables.model)) + 1):
        wider = np.concatenate(
            [np.repeat(groups, tables.size, axis=0), np.tile(everyone, len(groups))[:, None]], axis=1
        )
        bounds = least_s(tables, wider, has_room=False)
        bounds[(wider[:, :-1] == wider[:, -1:]).any(axis=1)] = np.inf
        bounds = bounds.reshape(len(groups), tables.size)
        may = np.isfinite(bounds.min(axis=1))
        groups = np.concatenate([groups, bounds.argmin(axis=1)[:, None]], axis=1)[may]
        grown.append(np.unique(np.sort(groups), axis=0))
    for each in grown:
        if len(each):
            yield each
            best = each[np.argsort(least_s(tables, each), kind="stable")[:GROUPS_IMPROVED]]
            yield _exchanged(tables.size, best)


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
    kept, cut = tables.token_s + parts[:, 0], parts[:, 1] + parts[:, 2] + tables.head_s
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
