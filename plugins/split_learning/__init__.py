"""Trainings `split` and `local`: one model tuned by several nodes, each on its own part, or by one alone.

Provides, over the blocks of engine `torch_blocks`: label-sharing and U-shaped splits with any number of
clients, pipelines, remote frozen blocks, PrivateLoRA's residuals and parallel adapters; codecs and noise for
what travels. It does not know how a model is read, how nodes are found, or how a lost one comes back: it is
handed blocks and a `Channel`, and asked for the steps that it has kept.

This module is light; torch is loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edged import ConfigError, Training, hookimpl

from ._cost import cost
from ._job import check_local, check_split, keys
from ._layout import memory, plan_local, plan_split

LOAD = "edged_plugins.split_learning._trainer:load"
ENGINE = "torch_blocks"


@hookimpl
def edged_trainings(settings: Mapping[str, Any]) -> Sequence[Training]:
    if settings:
        raise ConfigError(
            f"no setting plugin.split_learning.{min(settings)}; it has none", remedy="remove the key"
        )
    return [
        Training("split", ENGINE, check_split, plan_split, cost, LOAD, keys("split"), memory),
        Training("local", ENGINE, check_local, plan_local, cost, LOAD, keys("local"), memory),
    ]
