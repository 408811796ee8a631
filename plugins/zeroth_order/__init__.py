"""Aggregators for members that train without gradients, by directions that everybody draws alike.

Provides `fedkseed` (scalars per seed), `mezo` (a mean of factors that were tuned by MeZO), `fwdllm` (a mean
of slopes times directions, stepped by when it is sure) and, for members that do have gradients but little to
send by, `ferret` (changes projected on directions). It does not know how a loss is evaluated, how rounds are
run, or what travels between nodes.

This module is light; numpy is loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edged import AggregatorEntry, ConfigError, TrainingKey, Travels, hookimpl

SEEDS_MAX = 1 << 16  # an index takes two bytes
SAMPLINGS = ("uniform", "amplitude")
LIMITS = {
    "variance_most": (1e-12, 1e12),
    "candidates": (1, 1000),
    "coordinates": (2, SEEDS_MAX),
    "server_learning_rate": (1e-12, 10.0),
}
PERTURBATION = TrainingKey(
    "perturbation", 2.0**-11, "how far the weights are moved to measure a slope: a power of two"
)


def seeds_travel(round: int, ranks: Sequence[int]) -> Travels:
    """A sum for each seed comes, and a seed and a slope for each step goes; no factor does."""
    return Travels(
        "",
        "",
        down_extras=(("table", "f4", ("seeds",)),),
        up_extras=(("scalars", "f4", ("local_steps",)), ("seeds", "u2", ("local_steps",))),
    )


def slopes_travel(round: int, ranks: Sequence[int]) -> Travels:
    """Which directions to measure along comes beside the factors, and a slope for each goes. Until the server
    has stepped for the first time the factors are the start's, and less comes than this says."""
    return Travels(
        "AB" if round else "",
        "",
        down_extras=(("directions", "i8", ("local_steps",)),),
        up_extras=(("slopes", "f4", ("local_steps",)),),
    )


def coordinates_travel(round: int, ranks: Sequence[int]) -> Travels:
    """Factors come, and coordinates of each block's change go."""
    coordinates = ("coordinates", "f4", ("blocks", "coordinates"))
    return Travels("AB" if round else "", "", up_extras=(coordinates, ("counts", "i4", ("blocks",))))


AGGREGATORS: tuple[AggregatorEntry, ...] = (
    AggregatorEntry(
        "fedkseed",
        "edged_plugins.zeroth_order._aggregators:FedKSeed",
        keys=(
            TrainingKey("seeds", 4096, "directions that members draw from; 4 bytes each travel down a round"),
            TrainingKey(
                "seed_sampling", "uniform", "uniform, or amplitude: seeds of steep slopes more often"
            ),
            PERTURBATION,
        ),
        is_sum=True,
        local="edged_plugins.zeroth_order._local:KSeed",
        joins="edged_plugins.zeroth_order._local:Joined",
        replays="edged_plugins.zeroth_order._local:replays",
        whole="edged_plugins.zeroth_order._whole:Whole",
        travels=seeds_travel,
    ),
    AggregatorEntry(
        "mezo",
        "edged_plugins.zeroth_order._aggregators:Mezo",
        keys=(PERTURBATION,),
        is_sum=True,
        local="edged_plugins.zeroth_order._local:Mezo",
    ),
    AggregatorEntry(
        "fwdllm",
        "edged_plugins.zeroth_order._forward:FwdLLM",
        keys=(
            TrainingKey(
                "variance_most", 0.1, "of the mean slope; above it the server asks for more before it steps"
            ),
            TrainingKey(
                "candidates", 10, "directions drawn for one that is asked for; 1: none is chosen, no bias"
            ),
            PERTURBATION,
        ),
        local="edged_plugins.zeroth_order._forward:Measured",
        travels=slopes_travel,
    ),
    AggregatorEntry(
        "ferret",
        "edged_plugins.zeroth_order._ferret:Ferret",
        keys=(
            TrainingKey(
                "coordinates", 512, "numbers that a member sends for A or B of a layer, in the mean of all"
            ),
            TrainingKey(
                "server_learning_rate", 1.0, "part of the members' mean change that the server makes"
            ),
        ),
        local="edged_plugins.zeroth_order._ferret:Projected",
        after_gradients=True,
        travels=coordinates_travel,
    ),
)


def _check(options: Mapping[str, Any]) -> None:
    seeds, apart = options.get("seeds", 4096), options.get("perturbation", PERTURBATION.default)
    if not 1 <= seeds <= SEEDS_MAX:
        raise ConfigError(f"seeds: expected 1 to {SEEDS_MAX}, got {seeds}", remedy="mend the job's file")
    if not 1e-8 <= apart <= 1:
        raise ConfigError(f"perturbation: expected 1e-8 to 1, got {apart}", remedy="2^-11, say")
    if options.get("seed_sampling", "uniform") not in SAMPLINGS:
        raise ConfigError(f"seed_sampling: expected {' or '.join(SAMPLINGS)}", remedy="mend the job's file")
    for name, (low, high) in LIMITS.items():
        if not low <= options.get(name, low) <= high:
            raise ConfigError(
                f"{name}: expected {low:g} to {high:g}, got {options[name]}", remedy="mend the job's file"
            )


@hookimpl
def edged_aggregators(settings: Mapping[str, Any]) -> Sequence[AggregatorEntry]:
    if settings:
        raise ConfigError(
            f"no setting plugin.zeroth_order.{min(settings)}; it has none", remedy="remove the key"
        )
    return [replace(entry, check=_check) for entry in AGGREGATORS]
