"""Training `federated`: many members improve one adapter in rounds, each on its own rows.

Provides the round loop, and the aggregators that make one state of a round's updates. It does not know how a
model is read, how nodes are found, or how a lost one comes back.

This module is light; torch and numpy are loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from edged import AggregatorEntry, Training, TrainingKey, Travels, hookimpl

from . import _settings as key
from ._job import TORCH, check_federated, keys
from ._layout import cost, engine_of, memory, plan
from ._weights import node_weight_most

LOAD = "edged_plugins.personal_lora._trainer:load"
HERE = "edged_plugins.personal_lora"
MOMENTUM_KEYS = (key.server_learning_rate(key.PLAIN_RATE), key.MOMENTUM)
OUTER_KEYS = (key.server_learning_rate(key.OUTER_RATE), key.MOMENTUM)
ADAPTIVE_KEYS = (key.server_learning_rate(key.ADAPTIVE_RATE), key.BETA1, key.BETA2, key.TAU)
FLASC_KEYS = (
    key.DOWNLOAD_DENSITY,
    key.UPLOAD_DENSITY,
    key.server_learning_rate(key.ADAPTIVE_RATE),
    key.BETA1,
    key.BETA2,
    key.TAU,
)
ADAGRAD_KEYS = (key.server_learning_rate(key.ADAPTIVE_RATE), key.BETA1, key.TAU)


def products_kept(cohort: int, values: int) -> int:
    """Bytes of a round's factors, of the stack that is made of them, and of the last one, in F32."""
    return 12 * cohort * values


def rows_kept(cohort: int, values: int) -> int:
    """Bytes of a round's updates, in F32."""
    return 4 * cohort * values


def adapters_kept(cohort: int, values: int) -> int:
    """Bytes of what each member has and of what it sent in this round, in F32."""
    return 8 * cohort * values


def frozen_travels(round: int, ranks: Sequence[int]) -> Travels:
    """A stays the start's, which everybody draws."""
    return Travels(down="B" if round else "", up="B")


def stack_travels(round: int, ranks: Sequence[int]) -> Travels:
    """A stack of all members' factors comes, and the adapter begins again."""
    return Travels(down="", stack=sum(ranks) if round else 0)


def prox_travels(round: int, ranks: Sequence[int]) -> Travels:
    return Travels(down="AB" if round else "", down_extras=(("mu", "f8", ()),))


def scaffold_travels(round: int, ranks: Sequence[int]) -> Travels:
    """Control variates both ways, each as large as an adapter."""
    control = (("control", "f4", ("values",)),)
    return Travels(down="AB" if round else "", down_extras=control, up_extras=control)


def flasc_travels(round: int, ranks: Sequence[int]) -> Travels:
    """Values and where they are: the largest down, and up those that changed most."""
    density = (("upload_density", "f8", ()),)
    return Travels(down_extras=density, down_part="download_density", up_part="upload_density")


def alternating_travels(round: int, ranks: Sequence[int]) -> Travels:
    """One factor up, of the ranks that changed most. After the first round A is the start's."""
    return Travels(
        down="AB" if round > 1 else "B" if round else "",
        up="A" if round % 2 else "B",
        down_extras=(("ranks_sent", "f8", ()),),
        up_extras=(("ranks", "b1", ("layers", "r")),),
        up_part="ranks_sent",
    )


def _sum(
    name: str,
    load: str,
    *keys: TrainingKey,
    travels: Callable[[int, Sequence[int]], Travels] | None = None,
) -> AggregatorEntry:
    """It needs nothing of the updates but their weighted sum."""
    return AggregatorEntry(name, f"{HERE}.{load}", keys, is_sum=True, travels=travels)


AGGREGATORS: tuple[AggregatorEntry, ...] = (
    _sum("fedavg", "_mean:load_fedavg"),
    _sum("ffa", "_mean:load_ffa", travels=frozen_travels),
    AggregatorEntry(
        "flora",
        f"{HERE}._exact:load_flora",
        unlike_ranks=True,
        bytes_kept=products_kept,
        travels=stack_travels,
    ),
    AggregatorEntry("flexlora", f"{HERE}._exact:load_flexlora", unlike_ranks=True, bytes_kept=products_kept),
    _sum("fedprox", "_mean:load_fedprox", key.MU, travels=prox_travels),
    _sum("fedavgm", "_optimisers:load_fedavgm", *MOMENTUM_KEYS),
    _sum("fedadagrad", "_optimisers:load_fedadagrad", *ADAGRAD_KEYS),
    _sum("fedadam", "_optimisers:load_fedadam", *ADAPTIVE_KEYS),
    _sum("fedyogi", "_optimisers:load_fedyogi", *ADAPTIVE_KEYS),
    _sum("fdlora", "_optimisers:load_fdlora", *OUTER_KEYS),
    AggregatorEntry(
        "lora-a2", f"{HERE}._sparse:load_lora_a2", (key.RANKS_SENT,), travels=alternating_travels
    ),
    AggregatorEntry("flasc", f"{HERE}._sparse:load_flasc", FLASC_KEYS, travels=flasc_travels),
    AggregatorEntry("median", f"{HERE}._robust:load_median", bytes_kept=rows_kept),
    AggregatorEntry("trimmed-mean", f"{HERE}._robust:load_trimmed", (key.TRIM,), bytes_kept=rows_kept),
    AggregatorEntry("krum", f"{HERE}._robust:load_krum", (key.LIARS,), bytes_kept=rows_kept),
    AggregatorEntry(
        "scaffold",
        f"{HERE}._members:load_scaffold",
        (key.server_learning_rate(key.PLAIN_RATE),),
        travels=scaffold_travels,
    ),
    AggregatorEntry("mira", f"{HERE}._members:load_mira", (key.PULL, key.GRAPH), bytes_kept=adapters_kept),
)


ASYNCHRONOUS: tuple[AggregatorEntry, ...] = (  # their rounds are revisions: of pushes, whoever they are of
    AggregatorEntry(
        "fedbuff",
        f"{HERE}._pushes:load_fedbuff",
        (key.BUFFER, key.server_learning_rate(key.PLAIN_RATE), key.STALENESS_MOST, key.DYNAMIC_STEPS),
        bytes_kept=rows_kept,
    ),
    AggregatorEntry(
        "delayed-nesterov",
        f"{HERE}._pushes:load_delayed_nesterov",
        (key.WINDOW, key.SPREAD, *OUTER_KEYS, key.STALENESS_MOST, key.DYNAMIC_STEPS),
        bytes_kept=rows_kept,
    ),
)


def _check(options: Mapping[str, Any]) -> None:
    """Of every key that is one of ours; a file may bring those of a member's other method, too."""
    for name in options:
        if name in key.LIMITS:
            key.number(options, TrainingKey(name, options[name], name))
    key.graph_of(options)


def _enough(options: Mapping[str, Any]) -> int:
    """Krum's: a majority beside its neighbours."""
    return 2 * int(options["liars"]) + 3


def _checked(entry: AggregatorEntry) -> AggregatorEntry:
    return replace(entry, check=_check, least=_enough if entry.name == "krum" else None)


@hookimpl
def edged_aggregators(settings: Mapping[str, Any]) -> Sequence[AggregatorEntry]:
    most = node_weight_most(settings)
    return [replace(_checked(entry), weight_most=most) for entry in (*AGGREGATORS, *ASYNCHRONOUS)]


@hookimpl
def edged_trainings(aggregators: Mapping[str, AggregatorEntry]) -> Sequence[Training]:
    return [
        Training(
            "federated",
            TORCH,
            partial(check_federated, aggregators),
            partial(plan, aggregators),
            partial(cost, aggregators),
            LOAD,
            keys(aggregators),
            partial(memory, aggregators),
            "rounds",
            engine_of,
        )
    ]
