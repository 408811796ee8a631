"""Placements of a chain of layers on more devices than the exact search takes: heuristics.

By EdgeShard's recurrence, by greedy steps, and by small changes to an order of devices while one helps. The
beam of the exact search's own programme is `_placing.fastest_near`.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ._placing import INFINITE, Chain, Placement, latency, runs_of

IMPROVED = 2  # greedy paths that are worth improving
ENTRIES_MAX = 3_000_000  # of tables, for the orders near one: about 0.05 s


def by_recurrence(chain: Chain) -> Placement | None:
    """EdgeShard's recurrence over (layer, device): O(L M^2), for many devices; not always the optimum.

    Each device remembers one path to it, on which no device comes twice.
    """
    size = chain.devices
    bits, strangers = chain.bits, ~chain.partners
    room = chain.room * (1 + 1e-12)
    alone = np.eye(size, dtype=bool)
    run = chain.base + chain.memory[:, 0]
    seconds = np.where(run <= room, chain.compute[:, 0], INFINITE)
    if chain.first is not None:
        seconds[np.arange(size) != chain.first] = INFINITE
    used, came = bits.copy(), []
    for layer in range(1, chain.layers):
        may_come = ((used[:, None] & bits) == 0) & ((used[:, None] & strangers) == 0)
        memory = chain.memory[:, layer] + np.where(alone, run[:, None], chain.base)
        may = (may_come | alone) & (memory <= room)
        reached = np.where(may, seconds[:, None] + np.where(alone, 0.0, chain.hop), INFINITE)
        last = reached.argmin(axis=0)
        run = memory[last, np.arange(size)]
        seconds = reached.min(axis=0) + chain.compute[:, layer]
        used = used[last] | bits
        came.append(last)
    ended: list[tuple[float, list[int]]] = []
    for device in np.flatnonzero(np.isfinite(seconds)).tolist():
        path = [device]
        for last in reversed(came):
            path.append(int(last[path[-1]]))
        ended.append((float(seconds[device] + chain.back[device, path[-1]]), path[::-1]))
    if not ended:
        return None
    total, path = min(ended, key=lambda option: option[0])
    return Placement(runs_of(path), total)


def greedy(chain: Chain, least: int = 1) -> Placement | None:
    """A path of at least `least` devices by greedy steps, from the best starts, improved while that helps.

    After the idea of Ren, "Task Scheduling for Decentralized LLM Serving" (UCB/EECS-2024-111), whose text
    was not at hand: from each device on to the one that adds the least time for each layer it can hold.
    """
    starts = range(chain.devices) if chain.first is None else (chain.first,)
    found = [filled for start in starts if (filled := fill(chain, _greedy_order(chain, start)))]
    found.sort(key=lambda placement: placement.seconds)
    improved = [improve(chain, each, least) for each in found[:IMPROVED]]
    long = [each for each in improved if len(each.runs) >= least]
    return min(long, key=lambda placement: placement.seconds, default=None)


def _greedy_order(chain: Chain, start: int) -> list[int]:
    """Devices that hold all layers; empty where these steps do not come to that."""
    order, placed = [start], int(chain.reach[start, 0])
    spent = chain.stops.spent
    if not placed or spent is None:
        return []
    everyone = np.arange(chain.devices)
    may = chain.together[start].copy()
    may[start] = False
    while placed < chain.layers:
        ends = chain.reach[:, placed]
        gained = ends - placed
        time = spent[everyone, ends] - spent[:, placed] + chain.hop[order[-1]]
        each = np.where(may & (gained > 0), time / np.maximum(1, gained), INFINITE)
        device = int(each.argmin())
        if not np.isfinite(each[device]):
            return []
        order.append(device)
        placed = int(ends[device])
        may[device] = False
        may &= chain.together[device]
    return order


def fill(chain: Chain, order: Sequence[int]) -> Placement | None:
    """The best runs on these devices in this order, none left out: O(M L^2)."""
    if not order:
        return None
    run, layers = chain.run_costs, chain.layers
    table, starts = run[order[0]][0], []
    for device in order[1:]:
        whole = table[:, None] + run[device]
        starts.append(whole.argmin(axis=0))
        table = whole.min(axis=0)
    if not np.isfinite(table[layers]):
        return None
    ends = [layers]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    edges = [0, *reversed(ends)]
    runs = tuple((device, (a, b)) for device, (a, b) in zip(order, itertools.pairwise(edges), strict=True))
    return Placement(runs, latency(chain, runs))


def improve(chain: Chain, placement: Placement, least: int = 1) -> Placement:
    """The best of all orders near this one, again and again while one is better: two devices swapped, one
    moved, left out, put in, or put in another's place. Bounded in work, not in time, so that the same
    question has the same answer."""
    left = ENTRIES_MAX
    while left > 0:
        order = [device for device, _ in placement.runs]
        best = None if len(order) < least else placement
        for orders in _near(chain, order, least):
            left -= orders.size * (chain.layers + 1)
            seconds = filled_s(chain, orders)
            index = int(seconds.argmin())
            if best is None or seconds[index] < best.seconds * (1 - 1e-9):
                filled = fill(chain, orders[index].tolist())
                best = filled if filled and (best is None or filled.seconds < best.seconds) else best
        if best is None or best is placement:
            break
        placement = best
    return placement


def _near(chain: Chain, order: list[int], least: int) -> Iterator[np.ndarray]:
    """Orders near this one, those of one length together; all of them of devices that are linked."""
    size, fixed = len(order), 0 if chain.first is None else 1
    places = range(fixed, size)
    unused = [device for device in range(chain.devices) if device not in order]
    same = [_swapped(order, a, b) for a, b in itertools.combinations(places, 2)]
    same += [_moved(order, a, b) for a in places for b in places if abs(a - b) > 1]
    same += [[*order[:a], device, *order[a + 1 :]] for a in places for device in unused]
    fewer = [[*order[:a], *order[a + 1 :]] for a in places] if size > max(1, least) else []
    more = [
        [*order[:a], device, *order[a:]] for a in range(fixed, size + 1) for device in unused
    ]  # where room or a way round is worth a hop
    for orders in (same if size >= least else [], fewer, more if size < chain.layers else []):
        if not orders:
            continue
        every = np.array(orders)
        linked = every[_are_linked(chain, every)]
        if len(linked):
            yield linked


def _swapped(order: list[int], a: int, b: int) -> list[int]:
    swapped = order.copy()
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


def _moved(order: list[int], a: int, b: int) -> list[int]:
    left = [*order[:a], *order[a + 1 :]]
    return [*left[:b], order[a], *left[b:]]


def _are_linked(chain: Chain, orders: np.ndarray) -> np.ndarray:
    """(orders,) bool: may the devices of each be in one plan?"""
    members = np.bitwise_or.reduce(chain.bits[orders], axis=1)
    return np.asarray(((members[:, None] & ~chain.partners[orders]) == 0).all(axis=1))


def filled_s(chain: Chain, orders: np.ndarray) -> np.ndarray:
    """(orders,) seconds of the best runs on (orders, devices) in these orders, none left out."""
    run, spent = chain.run_costs, chain.stops.spent
    table = run[orders[:, 0], 0]
    for before, device in itertools.pairwise(orders.T):
        table = table + chain.hop[before, device][:, None]
        reached = np.full_like(table, INFINITE)
        for each in np.unique(device):
            rows = np.flatnonzero(device == each)
            if spent is None:
                reached[rows] = (table[rows][:, :, None] + run[each][None]).min(axis=1)
            else:
                reached[rows] = chain.stops.windows[each].least(table[rows] - spent[each]) + spent[each]
        table = reached
    return np.asarray(table[:, -1] + chain.back[orders[:, -1], orders[:, 0]])
