"""Training `federated`: many members improve one adapter in rounds, each on its own rows.

Provides the round loop, and the aggregators that make one state of a round's updates. It does not know how a
model is read, how nodes are found, or how a lost one comes back.

This module is light; torch and numpy are loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from edged import AggregatorEntry, ConfigError, Training, hookimpl

from ._job import check_federated, keys
from ._layout import cost, memory, plan

LOAD = "edged_plugins.personal_lora._trainer:load"
ENGINE = "torch_blocks"

AGGREGATORS: tuple[AggregatorEntry, ...] = ()


@hookimpl
def edged_aggregators(settings: Mapping[str, Any]) -> Sequence[AggregatorEntry]:
    if settings:
        raise ConfigError(
            f"no setting plugin.personal_lora.{min(settings)}; it has none", remedy="remove the key"
        )
    return AGGREGATORS


@hookimpl
def edged_trainings(aggregators: Mapping[str, AggregatorEntry]) -> Sequence[Training]:
    return [
        Training(
            "federated",
            ENGINE,
            partial(check_federated, aggregators),
            partial(plan, aggregators),
            partial(cost, aggregators),
            LOAD,
            keys(aggregators),
            partial(memory, aggregators),
        )
    ]
