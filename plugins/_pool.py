"""Stages of tensor groups, and the best path of those that a search is given.

Each is a stop of the dynamic programme in `_sweep`, with the seconds that the core's price has for each run
of layers, divided as `_tensor_group` does. Where its budgets do not let it divide by speed, a run is first
bounded as if it could be cut anywhere; it is looked at when a best path has it, and the programme runs again.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence

import numpy as np

from edged import PolicyViolation, Role

from . import _sweep
from ._fitting import fits
from ._tables import Tables
from ._tensor_group import Group

INFINITE = float("inf")
TINY_S = 1e-15  # of a part that costs a node nothing
Members = tuple[int, ...]  # the leader, its first rank, first
Steps = list[tuple[Members, tuple[int, int]]]  # stages and their layers, in order
Found = tuple[float, Steps]  # seconds of a token
Part = list[float]  # of heads, columns and rows, from 0 to 1
LOOKED_NEAR = 2  # layers more or less
LOST = 5  # times as many looks while there is no path


@dataclasses.dataclass
class Stage:
    """`seconds`: (runs,) of a token. `is_known`: (runs,) False where it is only a bound."""

    members: Members
    seconds: np.ndarray
    is_known: np.ndarray


class Pool:
    """Stages that paths are made of."""

    def __init__(self, tables: Tables, until: float = INFINITE) -> None:
        self.tables, self._until = tables, until
        self._stages: dict[Members, Stage | None] = {}

    def add(self, groups: Iterable[Members]) -> None:
        for members in groups:
            if members not in self._stages:
                self._stages[members] = self._stage(members)

    def _stage(self, members: Members) -> Stage | None:
        """None where the nodes are not linked, or the model cannot be cut among them."""
        tables = self.tables
        if not np.isfinite(tables.latency[np.ix_(members, members)]).all():
            return None
        if len(members) == 1:
            seconds = tables.rank_seconds(members[0], 1, 1, 1)
            fit = tables.rank_bytes(1, 1, 1) <= tables.room[members[0]] * (1 + 1e-12)
            return Stage(members, np.where(fit, seconds, INFINITE), np.ones(len(fit), bool))
        parts = self._by_speed(members)
        if parts is None:
            return None
        seconds = self._seconds(members, parts)
        needed = np.array([tables.rank_bytes(*part) for part in parts])
        fit = (needed + tables.model.layers + 1 <= tables.room[list(members), None]).all(axis=0)
        if fit.all():
            return Stage(members, seconds, fit)
        least = self._least(members)
        return Stage(members, np.where(fit, seconds, least), fit | np.isinf(least))

    def _by_speed(self, members: Members) -> list[Part] | None:
        """(heads, columns, rows) of each rank, from 0 to 1, whatever the budgets."""
        try:
            return self._parts(self._group(members, (0, self.tables.model.layers), is_free=True).roles())
        except PolicyViolation:
            return None

    def _parts(self, roles: Sequence[Role]) -> list[Part]:
        model = self.tables.model
        totals = (model.heads, model.ffn, model.vocab)
        cuts = [(role.heads, role.ffn, role.vocab) for role in roles]
        return [
            [(end - start) / total for (start, end), total in zip(cut, totals, strict=True)] for cut in cuts
        ]

    def _group(
        self, members: Members, layers: tuple[int, int], stage: int = 0, rank: int = 0, is_free: bool = False
    ) -> Group:
        tables = self.tables
        nodes = [tables.nodes[member] for member in members]
        if is_free:
            nodes = [dataclasses.replace(node, memory_budget=None) for node in nodes]
        weights = tables.weights[list(members)].tolist()
        has_head = layers[1] == tables.model.layers
        return Group(tables.model, nodes, weights, tables.request, layers, stage, rank, has_head)

    def _seconds(self, members: Members, parts: Sequence[Part], runs: slice = slice(None)) -> np.ndarray:
        tables = self.tables
        ranks = [
            tables.rank_seconds(member, *part)[runs] for member, part in zip(members, parts, strict=True)
        ]
        return tables.with_sums(np.maximum.reduce(ranks), members, runs)

    def _least(self, members: Members) -> np.ndarray:
        """(runs,) seconds that any division takes at least, as if it could be made anywhere: each rank as
        much as it is done with in time, and no more than its budget holds. Infinite where that is not all."""
        tables, ranks = self.tables, list(members)
        kept = np.array([tables.rank_seconds(member, 0, 0, 0) for member in members])
        cut = self._cheapest(members, kept)
        layers = tables.runs[:, :-1].sum(axis=1)
        bare, whole = tables.rank_bytes(0, 0, 0), tables.rank_bytes(1, 1, 1)
        room = tables.room[ranks, None] - bare + layers + 1
        may = (room.sum(axis=0) >= whole - bare) & (room > 0).all(axis=0)
        # Of a byte of memory, a part costs at most so much of the seconds that a byte of all parts does.
        cap = np.clip(room / (whole - bare) * self._densest(members[0], cut[0], whole - bare), 0, 1)
        capped = np.zeros_like(cap, bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            for _ in members:
                left = 1 - np.where(capped, cap, 0).sum(axis=0)
                compute = (left + np.where(capped, 0, kept / cut).sum(axis=0)) / np.where(
                    capped, 0, 1 / cut
                ).sum(axis=0)
                capped |= (compute - kept) / cut > cap
            compute = np.where(capped.all(axis=0), 0.0, compute)
        compute = np.maximum(compute, (kept + np.where(capped, cap * cut, 0)).max(axis=0))
        return np.where(may, compute + layers * tables.least_sums(members), INFINITE)

    def _cheapest(self, members: Members, kept: np.ndarray) -> np.ndarray:
        """(members, runs) seconds of all that is cut, on each, as if it consisted of the part in which that
        member is the cheapest against the leader: members attend and read at ratios of their own."""
        tables = self.tables
        parts = np.array([[tables.rank_seconds(m, *part) for part in np.eye(3)] for m in members])
        parts = parts - kept[:, None]
        share = parts[0] / parts[0].sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(share > 0, parts / share, INFINITE)
        return np.maximum(ratio.min(axis=1), TINY_S)

    def _densest(self, member: int, seconds: np.ndarray, bytes_: np.ndarray) -> np.ndarray:
        """(runs,) seconds for a byte of the part that has most, over seconds for a byte of all parts: at
        least 1. Of the leader, whose seconds say what part of all a part is."""
        tables = self.tables
        most = np.ones(len(tables.runs))
        for part in np.eye(3):
            time = tables.rank_seconds(member, *part) - tables.rank_seconds(member, 0, 0, 0)
            size = tables.rank_bytes(*part) - tables.rank_bytes(0, 0, 0)
            has = size > 0
            most[has] = np.maximum(most[has], time[has] / size[has] * bytes_[has] / seconds[has])
        return most

    # --- paths ---

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._until

    def solve(
        self, width: int | None, rounds: int | None, among: Iterable[Members] | None = None
    ) -> Found | None:
        """The best path of these stages, else of all. `rounds`: that look at runs which are only bounded, as
        soon as there is a path; None: until the best path has none."""
        wanted = self._stages if among is None else dict.fromkeys(among)
        stages = [stage for members in wanted if (stage := self._stages.get(members))]
        known: Found | None = None
        tries = 0
        while stages:
            stops = self._stops(stages)
            limit = INFINITE if known is None else known[0]
            found = _sweep.shortest(stops, 2, known=limit, width=width, is_grouped=True)
            if found is None:
                break
            path = [(stages[stop], layers) for stop, layers in found[1]]
            is_known = [self._look(stage, layers) for stage, layers in path]
            seconds = self._path_s(path)
            if seconds < limit:
                known = (seconds, [(stage.members, layers) for stage, layers in path])
            if all(is_known):
                break
            tries += 1
            if rounds is not None and tries >= (rounds if known else LOST * rounds):
                break
            if self.is_late:
                break
        return known

    def _look(self, stage: Stage, layers: tuple[int, int]) -> bool:
        """Was the run known? Now it is, and those near it, which may be next."""
        if stage.is_known[self.tables.run_of[layers]]:
            return True
        start, end = layers
        for by in range(-LOOKED_NEAR, LOOKED_NEAR + 1):
            for near in ((start + by, end), (start, end + by)):
                if 0 <= near[0] < near[1] <= self.tables.model.layers:
                    self._know(stage, near)
        return False

    def _know(self, stage: Stage, layers: tuple[int, int]) -> None:
        run = int(self.tables.run_of[layers])
        if stage.is_known[run]:
            return
        group = self._group(stage.members, layers)
        roles = group.roles()
        seconds = INFINITE
        if fits(roles, group.nodes, self.tables.model, self.tables.request):
            seconds = float(self._seconds(stage.members, self._parts(roles), slice(run, run + 1))[0])
        stage.seconds[run], stage.is_known[run] = seconds, True

    def _path_s(self, path: Sequence[tuple[Stage, tuple[int, int]]]) -> float:
        tables = self.tables
        total = sum(float(stage.seconds[tables.run_of[layers]]) for stage, layers in path)
        for (before, _), (after, _) in itertools.pairwise(path):
            total += self._hop(before.members, after.members)
        return total + float(tables.back[path[-1][0].members[0], path[0][0].members[0]])

    def _hop(self, before: Members, after: Members) -> float:
        a, b = before[0], after[0]
        return float(self.tables.hop[a, b] + (len(after) - 1) * self.tables.hop_rank[a, b])

    def _stops(self, stages: Sequence[Stage]) -> _sweep.Stops:
        tables = self.tables
        leaders = np.array([stage.members[0] for stage in stages])
        more = np.array([len(stage.members) - 1 for stage in stages])
        between = np.ix_(leaders, leaders)
        bits = [sum(1 << member for member in stage.members) for stage in stages]
        partners = [np.bitwise_and.reduce(tables.partners[list(stage.members)]) for stage in stages]
        return _sweep.Stops(
            np.array([tables.spread(stage.seconds) for stage in stages]),
            tables.hop[between] + more * tables.hop_rank[between],
            tables.back[between],
            np.array(bits, np.uint64),
            np.array(partners, np.uint64),
        )

    def roles(self, found: Found | None) -> tuple[Role, ...] | None:
        """The roles of a path, as the strategy cuts them."""
        if found is None:
            return None
        roles: list[Role] = []
        for stage, (members, layers) in enumerate(found[1]):
            roles += self._group(members, layers, stage, len(roles)).roles()
        return tuple(roles)
