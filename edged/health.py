"""Conditions a person should know of: declared by code, set and cleared, logged on change only."""

from __future__ import annotations

import logging

from .types import Condition

log = logging.getLogger(__name__)
CONDITIONS_MAX = 64  # a node with more has one problem, not 64


class Health:
    def __init__(self) -> None:
        self._conditions: dict[str, Condition] = {}

    def set(self, condition: Condition) -> None:
        known = self._conditions.get(condition.code)
        if known is None and len(self._conditions) >= CONDITIONS_MAX:
            return
        self._conditions[condition.code] = condition
        if known is None:
            log.warning("condition began", extra={"code": condition.code, "reason": condition.text})

    def clear(self, code: str) -> None:
        if self._conditions.pop(code, None) is not None:
            log.info("condition ended", extra={"code": code})

    @property
    def conditions(self) -> list[Condition]:
        """Worst first."""
        order = ("error", "warning", "info")
        return sorted(self._conditions.values(), key=lambda c: (order.index(c.severity), c.code))
