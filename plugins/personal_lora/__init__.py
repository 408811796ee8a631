"""Training `federated`: many members improve one adapter in rounds, each on its own rows.

Provides the round loop, and the aggregators that make one state of a round's updates. It does not know how a
model is read, how nodes are found, or how a lost one comes back.

This module is light; torch and numpy are loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edged import AggregatorEntry, ConfigError, TrainingKey, hookimpl

from . import _settings as key

HERE = "edged_plugins.personal_lora"
MOMENTUM_KEYS = (key.server_learning_rate(key.PLAIN_RATE), key.MOMENTUM)
OUTER_KEYS = (key.server_learning_rate(key.OUTER_RATE), key.MOMENTUM)
ADAPTIVE_KEYS = (key.server_learning_rate(key.ADAPTIVE_RATE), key.BETA1, key.BETA2, key.TAU)
ADAGRAD_KEYS = (key.server_learning_rate(key.ADAPTIVE_RATE), key.BETA1, key.TAU)
FLASC_KEYS = (key.DOWNLOAD_DENSITY, key.UPLOAD_DENSITY, *ADAPTIVE_KEYS)


def products_kept(cohort: int, values: int) -> int:
    """Bytes of a round's factors, of the stack that is made of them, and of the last one, in F32."""
    return 12 * cohort * values


def rows_kept(cohort: int, values: int) -> int:
    """Bytes of a round's updates, in F32."""
    return 4 * cohort * values


def adapters_kept(cohort: int, values: int) -> int:
    """Bytes of what each member has and of what it sent in this round, in F32."""
    return 8 * cohort * values


def _sum(name: str, load: str, *keys: TrainingKey) -> AggregatorEntry:
    """It needs nothing of the updates but their weighted sum."""
    return AggregatorEntry(name, f"{HERE}.{load}", keys, is_sum=True)


AGGREGATORS: tuple[AggregatorEntry, ...] = (
    _sum("fedavg", "_mean:load_fedavg"),
    _sum("ffa", "_mean:load_ffa"),
    AggregatorEntry("flora", f"{HERE}._exact:load_flora", unlike_ranks=True, bytes_kept=products_kept),
    AggregatorEntry("flexlora", f"{HERE}._exact:load_flexlora", unlike_ranks=True, bytes_kept=products_kept),
    _sum("fedprox", "_mean:load_fedprox", key.MU),
    _sum("fedavgm", "_optimisers:load_fedavgm", *MOMENTUM_KEYS),
    _sum("fedadagrad", "_optimisers:load_fedadagrad", *ADAGRAD_KEYS),
    _sum("fedadam", "_optimisers:load_fedadam", *ADAPTIVE_KEYS),
    _sum("fedyogi", "_optimisers:load_fedyogi", *ADAPTIVE_KEYS),
    _sum("fdlora", "_optimisers:load_fdlora", *OUTER_KEYS),
    AggregatorEntry("lora-a2", f"{HERE}._sparse:load_lora_a2", (key.RANKS_SENT,)),
    AggregatorEntry("flasc", f"{HERE}._sparse:load_flasc", FLASC_KEYS),
    AggregatorEntry("median", f"{HERE}._robust:load_median", bytes_kept=rows_kept),
    AggregatorEntry("trimmed-mean", f"{HERE}._robust:load_trimmed", (key.TRIM,), bytes_kept=rows_kept),
    AggregatorEntry("krum", f"{HERE}._robust:load_krum", (key.LIARS,), bytes_kept=rows_kept),
    AggregatorEntry(
        "scaffold", f"{HERE}._members:load_scaffold", (key.server_learning_rate(key.PLAIN_RATE),)
    ),
    AggregatorEntry("mira", f"{HERE}._members:load_mira", (key.PULL, key.GRAPH), bytes_kept=adapters_kept),
)


@hookimpl
def edged_aggregators(settings: Mapping[str, Any]) -> Sequence[AggregatorEntry]:
    if settings:
        raise ConfigError(
            f"no setting plugin.personal_lora.{min(settings)}; it has none", remedy="remove the key"
        )
    return AGGREGATORS
