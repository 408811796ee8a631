"""The core's price and memory as tables, for searches that ask them a million times.

A rank's seconds and bytes are sums over its layers, each of three parts: what heads, what columns of the
feed-forward, and what every rank has of it. So a few questions to the core for each node and each kind of
layer tell them all; layers of the same bytes are one kind. The core rounds to whole bytes, these do not.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from edged import (
    LinkCost,
    ModelDescription,
    NodeView,
    PlanRequest,
    Role,
    codec_of,
    hop_s,
    link_cost,
    memory_of,
    rank_times,
    return_s,
    sums_s,
    unwilling,
)

from ._cutting import WEIGHT_MIN

NODES_MAX = 64  # a set of nodes is the bits of one number; of more nodes, the fastest
PARTS = 3  # of a layer: whatever a rank has of it, all heads, all columns


class Tables:
    """Of those of `nodes` that may have a role and are measured; the first of `nodes` is the submitter.

    `seconds`: (nodes, kinds, PARTS); `token_s`, `head_s`: (nodes,) a token's fixed cost, the output head's.
    `bytes`: (kinds, PARTS); `worker_bytes`, `head_bytes`: what every role takes, the output head.
    `room`: (nodes,) bytes of each budget, infinite where unknown.
    """

    def __init__(self, model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> None:
        self.model, self.request = model, request
        self.by_id = {node.node_id: node for node in nodes}
        kinds = model.layer_cuts or model.layer_bytes
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        self.kind_of = np.array([numbers[kind] for kind in kinds])
        self._examples = [kinds.index(kind) for kind in numbers]
        self.nodes = self._able(nodes)
        size, count = len(self.nodes), len(numbers)
        self.token_s = np.array([self._seconds(node, _part((0, 0))) for node in self.nodes])
        self.head_s = np.array([self._seconds(node, _part((0, 0), vocab=model.vocab)) for node in self.nodes])
        self.head_s = self.head_s - self.token_s
        self.seconds = np.array(
            [[self._seconds(node, part) for part in self._parts()] for node in self.nodes]
        ).reshape(size, count, PARTS)
        self.seconds[:, :, 0] -= self.token_s[:, None]
        self.seconds[:, :, 1:] -= self.token_s[:, None, None] + self.seconds[:, :, :1]
        self.worker_bytes = memory_of(_part((0, 0)), model, request)
        self.head_bytes = memory_of(_part((0, 0), vocab=model.vocab), model, request) - self.worker_bytes
        self.bytes = np.array([memory_of(part, model, request) for part in self._parts()], float)
        self.bytes = self.bytes.reshape(count, PARTS) - self.worker_bytes
        self.bytes[:, 1:] -= self.bytes[:, :1]
        self.room = np.array(
            [np.inf if node.memory_budget is None else node.memory_budget for node in self.nodes], float
        )

    def _able(self, nodes: Sequence[NodeView]) -> list[NodeView]:
        whole = _part((0, self.model.layers), self.model.heads, self.model.ffn, self.model.vocab)
        found = []
        self._whole_s: dict[str, float] = {}
        for index, node in enumerate(nodes):
            times = rank_times(whole, self.model, node, self.request)
            if times is not None and not unwilling(node, self.request, is_submitter=index == 0):
                found.append((times[0], index))
                self._whole_s[node.node_id] = times[0]
        return [nodes[index] for _, index in sorted(sorted(found)[:NODES_MAX], key=lambda row: row[1])]

    def _parts(self) -> list[Role]:
        """Roles of one layer: for each kind, with nothing that is cut, with the heads, with the columns."""
        heads, ffn = self.model.heads, self.model.ffn
        cuts = ((0, 0), (heads, 0), (0, ffn))
        return [_part((i, i + 1), *cut) for i in self._examples for cut in cuts]

    def _seconds(self, node: NodeView, role: Role) -> float:
        times = rank_times(role, self.model, node, self.request)
        assert times is not None  # it is able
        return times[0]

    @property
    def size(self) -> int:
        return len(self.nodes)

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """(nodes,) whole models a second, as far as the policy lets each."""
        return np.array([weight_of(node, self._whole_s[node.node_id]) for node in self.nodes])

    # --- links ---

    @functools.cached_property
    def links(self) -> list[list[LinkCost | None]]:
        ids = [node.node_id for node in self.nodes]
        return [[link_cost(self.by_id, a, b) for b in ids] for a in ids]

    @functools.cached_property
    def linked(self) -> np.ndarray:
        """(nodes, nodes) bool: are they connected, and so may be in one plan? If that was not measured, they
        are no neighbours in it."""
        ids = [node.node_id for node in self.nodes]
        known = [{link.node_id for link in node.links} | {node.node_id} for node in self.nodes]
        found = np.array([[other in those for other in ids] for those in known], bool)
        found = found.reshape(self.size, self.size)
        return found | found.T

    @functools.cached_property
    def partners(self) -> np.ndarray:
        """(nodes,) those that each may be in a plan with, and itself, as bits."""
        bits = 1 << np.arange(self.size, dtype=np.uint64)
        return np.array((self.linked * bits).sum(axis=1), np.uint64)

    @functools.cached_property
    def latency(self) -> np.ndarray:
        """(nodes, nodes) seconds; infinite where none was measured."""
        return self._of_links(lambda link: link.latency_s, np.inf)

    @functools.cached_property
    def bytes_s(self) -> np.ndarray:
        return self._of_links(lambda link: link.bytes_s, 0.0)

    @functools.cached_property
    def burst_bytes(self) -> np.ndarray:
        return self._of_links(lambda link: link.burst_bytes, 0.0)

    @functools.cached_property
    def hop(self) -> np.ndarray:
        """(nodes, nodes) seconds to a stage of one rank; 0 to itself, infinite where no link was measured."""
        return self._of_links(lambda link: hop_s(link, self.model, 1, 1), np.inf, itself=0.0)

    @functools.cached_property
    def hop_rank(self) -> np.ndarray:
        """(nodes, nodes) seconds that each further rank of the stage adds."""
        two = self._of_links(lambda link: hop_s(link, self.model, 2, 1), np.inf, itself=0.0)
        return np.where(np.isfinite(two), two, 0.0) - np.where(np.isfinite(two), self.hop, 0.0)

    @functools.cached_property
    def back(self) -> np.ndarray:
        """(last, first) seconds; infinite where the first is one that the submitter cannot reach."""
        back = self._of_links(return_s, np.inf, itself=0.0)
        back[:, ~self.is_reached] = np.inf
        return back

    @functools.cached_property
    def is_reached(self) -> np.ndarray:
        """(nodes,) has the submitter a link to it that was measured? Who has the first part needs that."""
        submitter = next(iter(self.by_id))
        return np.array([link_cost(self.by_id, submitter, node.node_id) is not None for node in self.nodes])

    def _of_links(
        self, figure: Callable[[LinkCost], float], missing: float, itself: float | None = None
    ) -> np.ndarray:
        rows = [[missing if link is None else figure(link) for link in row] for row in self.links]
        found = np.array(rows, float).reshape(self.size, self.size)
        if itself is not None:
            np.fill_diagonal(found, itself)
        return found

    # --- runs of layers ---

    @functools.cached_property
    def runs(self) -> np.ndarray:
        """(different runs, kinds + 1): how many layers of each kind, and whether with the output head."""
        return self._runs[0]

    @functools.cached_property
    def run_of(self) -> np.ndarray:
        """(layers + 1, layers + 1) which of `runs` goes from one to another; the last row of `runs` where
        none does."""
        return self._runs[1]

    @functools.cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        edges = self.model.layers + 1
        each = np.eye(len(self._examples), dtype=int)[self.kind_of]
        before = np.concatenate([np.zeros((1, each.shape[1]), int), each.cumsum(axis=0)])
        counts = before[None, :] - before[:, None]
        is_last = np.broadcast_to(np.arange(edges) == edges - 1, (edges, edges))
        every = np.concatenate([counts, is_last[:, :, None]], axis=2)
        start, end = np.triu_indices(edges, 1)
        runs, which = np.unique(every[start, end], axis=0, return_inverse=True)
        run_of = np.full((edges, edges), len(runs))
        run_of[start, end] = which.reshape(-1)
        return runs, run_of

    def spread(self, of_runs: np.ndarray) -> np.ndarray:
        """(layers + 1, layers + 1) by start and end of what is given for each of `runs`."""
        return np.append(of_runs, np.inf)[self.run_of]

    def rank_seconds(self, node: int, heads: float, columns: float, rows: float) -> np.ndarray:
        """(runs,) seconds of a rank with these parts, from 0 to 1, of every layer and of the head."""
        layer = self.seconds[node] @ (1.0, heads, columns)
        return np.asarray(self.token_s[node] + self.runs @ [*layer, self.head_s[node] * rows])

    def rank_bytes(self, heads: float, columns: float, rows: float) -> np.ndarray:
        """(runs,) bytes of such a rank; the core's to a byte for each layer."""
        layer = self.bytes @ (1.0, heads, columns)
        return np.asarray(self.worker_bytes + self.runs @ [*layer, self.head_bytes * rows])

    # --- groups ---

    def least_sums(self, members: Sequence[int]) -> float:
        """Seconds that one layer's all-reduces among these nodes take at least."""
        link = self._worst(members)
        link = dataclasses.replace(link, bytes_s=math.inf) if link.burst_bytes else link
        return min(sums_s(link, self.model, self.request, len(members), 1))

    def with_sums(self, compute: np.ndarray, members: Sequence[int], runs: slice = slice(None)) -> np.ndarray:
        """(runs,) seconds of a stage of these nodes, given the seconds of its slowest rank for some runs."""
        if len(members) == 1:
            return compute
        link, layers = self._worst(members), self.runs[runs, :-1].sum(axis=1).tolist()
        sums = sums_s(link, self.model, self.request, len(members), 1)
        found = []
        for count, seconds in zip(layers, compute.tolist(), strict=True):
            if link.burst_bytes and count and seconds < math.inf:
                idle_s = seconds / (count * self.model.reductions) + link.latency_s
                sums = sums_s(link, self.model, self.request, len(members), 1, idle_s)
            times = [count * each for each in sums]
            found.append(seconds + times[codec_of(times, seconds)])
        return np.array(found)

    def _worst(self, members: Sequence[int]) -> LinkCost:
        pairs = list(itertools.combinations(members, 2))
        return LinkCost(
            max(float(self.latency[a, b]) for a, b in pairs),
            min(float(self.bytes_s[a, b]) for a, b in pairs),
            min(float(self.burst_bytes[a, b]) for a, b in pairs),
        )


def _part(layers: tuple[int, int], heads: int = 0, ffn: int = 0, vocab: int = 0) -> Role:
    return Role(0, "", 0, layers, (0, heads), (0, ffn), (0, vocab), 1.0)


def run_role(model: ModelDescription, node: NodeView, start: int, end: int) -> Role:
    """A run of whole layers as a role; the one with the last layer has the output head."""
    vocab = (0, model.vocab) if end == model.layers and end > start else (0, 0)
    return Role(0, node.node_id, 0, (start, end), (0, model.heads), (0, model.ffn), vocab, 1.0)


def weight_of(node: NodeView, whole_s: float) -> float:
    """Whole models a second, given the seconds of one token of it, as far as the policy lets the node."""
    return max(node.weight, WEIGHT_MIN) / whole_s
