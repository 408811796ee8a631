"""Aggregators that need no gradients: members send scalars for seeds, and all draw the same directions.

This module is light; numpy is loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edged import AggregatorEntry, ConfigError, hookimpl

AGGREGATORS: tuple[AggregatorEntry, ...] = ()


@hookimpl
def edged_aggregators(settings: Mapping[str, Any]) -> Sequence[AggregatorEntry]:
    if settings:
        raise ConfigError(
            f"no setting plugin.zeroth_order.{min(settings)}; it has none", remedy="remove the key"
        )
    return AGGREGATORS
