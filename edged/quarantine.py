"""Nodes that were lost while they worked: they get no new role for a while. Pure.

Each loss of a node on end doubles the while; who lasts for long after one begins anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .types import NodeView

FIRST_S = 1.0  # a worker is started again so soon, where its node is the only one
MOST_S = 300.0
FORGOTTEN_S = 600.0  # after the last loss


class Quarantine:
    """Times are seconds of one clock that only goes forward."""

    def __init__(self) -> None:
        self._lost: dict[str, tuple[int, float]] = {}  # losses on end, and when the last one was

    def add(self, node_id: str, now: float) -> None:
        """It was lost."""
        count, last = self._lost.get(node_id, (0, now))
        self._lost[node_id] = (1 if now - last > FORGOTTEN_S else count + 1, now)

    def left_s(self, node_id: str, now: float) -> float:
        """Seconds until it may get a role; 0 for now."""
        count, last = self._lost.get(node_id, (0, now))
        wait_s = min(MOST_S, FIRST_S * 2.0 ** min(count - 1, 30)) if count else 0.0
        return max(0.0, last + wait_s - now)

    def any(self, now: float) -> bool:
        """Is there any node that may not?"""
        return any(self.left_s(node_id, now) for node_id in self._lost)

    def seen(self, nodes: Sequence[NodeView], now: float) -> list[NodeView]:
        """The nodes, those in quarantine with that as the reason why they take no role."""
        return [self._seen(node, self.left_s(node.node_id, now)) for node in nodes]

    def _seen(self, node: NodeView, left_s: float) -> NodeView:
        if not left_s or node.refuses:
            return node
        why = f"it was lost while it worked; in {left_s:.0f} s it is taken again"
        return dataclasses.replace(node, refuses=why)
