"""A tensor group: how the nodes of one stage divide its heads, columns and vocabulary rows.

Attention is cut between whole groups of query heads that share a KV head, the feed-forward and the
output head between whole quantisation blocks. The two all-reduces of a layer make each of these parts
wait for its own slowest rank, so each is divided by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edged import ModelDescription, NodeView, PlanRequest, PolicyViolation, Role

from . import _cutting, _fitting

Counts = tuple[Sequence[int], Sequence[int], Sequence[int]]  # of each rank: head groups, columns, rows


def groups_max(model: ModelDescription) -> int:
    """The most nodes that one tensor group of this model can have."""
    return min(
        math.ceil(total / unit)
        for total, unit in (
            (model.heads, model.head_unit),
            (model.ffn, model.ffn_unit),
            (model.vocab, model.vocab_unit),
        )
    )


@dataclass(frozen=True)
class Group:
    """The nodes of one stage with their weights: requested shares, or measured speeds.

    `forgiving`: a rank whose weight comes to no head group gets one all the same, which is right where
    somebody named the nodes and nobody the shares; else it is refused.
    """

    model: ModelDescription
    nodes: Sequence[NodeView]
    weights: Sequence[float]
    request: PlanRequest
    layers: tuple[int, int]
    stage: int = 0
    first_rank: int = 0
    has_head: bool = True  # the last stage computes the output head
    forgiving: bool = False

    def roles(self) -> tuple[Role, ...]:
        """The group's roles. PolicyViolation where the model cannot be cut so."""
        model, ranks = self.model, len(self.nodes)
        heads = _units("query heads", model.heads, model.head_unit, ranks)
        columns = _units("columns of the feed-forward", model.ffn, model.ffn_unit, ranks)
        rows = _units("rows of the output head", model.vocab, model.vocab_unit, ranks)
        self._check_heads(heads)
        if self.request.shares is not None:
            shared = [_cutting.apportion_all(units, self.weights) for units in (heads, columns, rows)]
            return self._made((shared[0], shared[1], shared[2]))
        by_speed = self._made((self._by_speed(heads), self._by_speed(columns), self._by_speed(rows)))
        if _fitting.fits(by_speed, self.nodes, model, self.request):
            return by_speed
        within = self._within_budgets(heads, columns, rows)
        return by_speed if within is None else self._made(within)

    def _check_heads(self, units: int) -> None:
        counts = _cutting.apportion(units, self.weights)
        if self.forgiving or 0 not in counts:
            return
        rank, model = counts.index(0), self.model
        raise PolicyViolation(
            f"expected shares of at least one group of {model.head_unit} of the {model.heads} query heads; "
            f"rank {self.first_rank + rank}'s comes to "
            f"{self.weights[rank] / sum(self.weights) * model.heads:.2g} heads",
            remedy=f"give rank {self.first_rank + rank} a larger share, or leave it out",
        )

    # --- counts ---

    def _by_speed(self, units: int) -> list[int]:
        counts = _cutting.balance(units, self.weights)
        assert counts is not None  # there is a unit for each
        return counts

    def _within_budgets(self, heads: int, columns: int, rows: int) -> Counts | None:
        """Counts that no budget is too small for, or None. Head groups are the coarsest, so they go
        first: each node takes those that it holds with the like part of the rest, or else with the
        least of the rest; then the columns, then the rows, with what is left."""

        def like(count: int, units: int, of: int) -> int:
            return max(1, math.ceil(count * of / units))

        head_counts = self._first_that_fits(
            heads,
            lambda rank, n: (n, like(n, heads, columns), like(n, heads, rows)),
            lambda rank, n: (n, 1, 1),
        )
        if head_counts is None:
            return None
        column_counts = self._first_that_fits(
            columns,
            lambda rank, n: (head_counts[rank], n, like(n, columns, rows)),
            lambda rank, n: (head_counts[rank], n, 1),
        )
        if column_counts is None:
            return None
        row_counts = self._first_that_fits(rows, lambda rank, n: (head_counts[rank], column_counts[rank], n))
        return None if row_counts is None else (head_counts, column_counts, row_counts)

    def _first_that_fits(
        self, units: int, *parts: Callable[[int, int], tuple[int, int, int]]
    ) -> list[int] | None:
        """Units by speed, capped by the first of `parts` (rank, units -> counts) whose caps hold all."""
        for part in parts:
            caps = [
                _fitting.largest(
                    units,
                    lambda n, rank=rank, part=part: self._role_of(rank, part(rank, n)),
                    node,
                    self.model,
                    self.request,
                )
                for rank, node in enumerate(self.nodes)
            ]
            counts = _cutting.balance(units, self.weights, caps)
            if counts is not None:
                return counts
        return None

    # --- roles ---

    def _role_of(self, rank: int, counts: tuple[int, int, int]) -> Role:
        """A role of these sizes, wherever its parts begin."""
        model = self.model
        heads, columns, rows = counts
        return self._role(
            rank,
            (0, min(heads * model.head_unit, model.heads)),
            (0, min(columns * model.ffn_unit, model.ffn)),
            (0, min(rows * model.vocab_unit, model.vocab)),
        )

    def _made(self, counts: Counts) -> tuple[Role, ...]:
        model = self.model
        heads = _cutting.ranges(counts[0], model.head_unit, model.heads)
        ffn = _cutting.ranges(counts[1], model.ffn_unit, model.ffn)
        vocab = _cutting.ranges(counts[2], model.vocab_unit, model.vocab)
        return tuple(
            self._role(rank, *parts) for rank, parts in enumerate(zip(heads, ffn, vocab, strict=True))
        )

    def _role(self, rank: int, heads: tuple[int, int], ffn: tuple[int, int], vocab: tuple[int, int]) -> Role:
        return Role(
            rank=self.first_rank + rank,
            node_id=self.nodes[rank].node_id,
            stage=self.stage,
            layers=self.layers,
            heads=heads,
            ffn=ffn,
            vocab=vocab if self.has_head else (0, 0),
            share=(heads[1] - heads[0]) / self.model.heads,
        )


def _units(what: str, total: int, unit: int, ranks: int) -> int:
    units = math.ceil(total / unit)
    if units < ranks:
        raise PolicyViolation(
            f"expected at most {units} nodes, since this model's {total} {what} go {unit} at a time; "
            f"{ranks} came",
            remedy=f"name at most {units} nodes, or use --strategy hybrid or layers",
        )
    return units
