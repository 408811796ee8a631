"""Keys of a job's file that only aggregators read, and their bounds. Light: the daemon reads it, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edged import ConfigError, TrainingKey

LIMITS = {  # least, most, whether the most itself is allowed
    "mu": (0.0, 1e6, True),
    "server_learning_rate": (0.0, 1e3, True),
    "server_momentum": (0.0, 1.0, False),
    "beta1": (0.0, 1.0, False),
    "beta2": (0.0, 1.0, False),
    "tau": (1e-12, 1.0, True),
    "ranks_sent": (0.0, 1.0, True),
    "download_density": (0.0, 1.0, True),
    "upload_density": (0.0, 1.0, True),
    "trim": (0.0, 0.5, False),
    "liars": (0, 1 << 20, True),
    "pull": (0.0, 2.0, False),
    "buffer": (1, 1024, True),
    "staleness_most": (0, 1 << 20, True),
    "window": (0, 1024, True),
    "spread": (0.0, 1.0, True),
}
NOT_ZERO = ("server_learning_rate", "ranks_sent", "download_density", "upload_density")
GRAPHS = ("complete", "ring")

ADAPTIVE_RATE = 1e-3  # of adaptive steps, whose length is about this one for every value
PLAIN_RATE = 1.0  # the mean itself, without momentum
OUTER_RATE = 0.7  # DiLoCo's

MU = TrainingKey("mu", 0.01, "fedprox: how strongly a member is held to what it loaded")
MOMENTUM = TrainingKey("server_momentum", 0.9, "of the server's optimiser")
BETA1 = TrainingKey("beta1", 0.9, "of the server's optimiser: how long a mean change is remembered")
BETA2 = TrainingKey("beta2", 0.99, "of the server's optimiser: how long its square is")
TAU = TrainingKey("tau", 1e-3, "of the server's optimiser: added to the root of the squares")
RANKS_SENT = TrainingKey(
    "ranks_sent",
    0.5,
    "lora-a2: part of a factor's values that a member sends, in ranks whose change is worth most",
)
DOWNLOAD_DENSITY = TrainingKey("download_density", 0.25, "flasc: part of the values that members load")
UPLOAD_DENSITY = TrainingKey("upload_density", 0.25, "flasc: part of the values that a member changes")
TRIM = TrainingKey("trim", 0.1, "trimmed-mean: part of the updates left out at each end of a value")
LIARS = TrainingKey("liars", 1, "krum: how many of a round's members may lie")
PULL = TrainingKey("pull", 0.5, "mira: 0: each on its own; 1 on a complete graph: all the mean; below 2")
BUFFER = TrainingKey("buffer", 2, "fedbuff: pushes of members that make a revision")
STALENESS_MOST = TrainingKey(
    "staleness_most", 100, "of a push: revisions made since it began; an older one does not count"
)
WINDOW = TrainingKey(
    "window", 0, "delayed-nesterov: pushes between two steps of the momentum; 0: as many as clients"
)
SPREAD = TrainingKey("spread", 0.0, "delayed-nesterov: part of the momentum at each push, up to 1 / window")
DYNAMIC_STEPS = TrainingKey(
    "dynamic_steps", False, "local steps by each client's speed, so that all push about as often"
)
GRAPH = TrainingKey("graph", "complete", "mira: who is pulled to whom: complete, or ring in order of ranks")


def server_learning_rate(default: float) -> TrainingKey:
    return TrainingKey("server_learning_rate", default, "of the server's optimiser")


def number(settings: Mapping[str, Any], key: TrainingKey) -> float:
    """A job's value, or the key's own; ConfigError, with the bounds, where it is none of them."""
    value = settings.get(key.key, key.default)
    least, most, is_closed = LIMITS[key.key]
    kinds = (int,) if isinstance(LIMITS[key.key][0], int) else (int, float)
    is_fit = (
        type(value) in kinds
        and least <= value <= most
        and (is_closed or value < most)
        and (value > 0 or key.key not in NOT_ZERO)
    )
    if not is_fit:
        low = f"above {least:g}" if key.key in NOT_ZERO else f"{least:g} or more"
        high = f"up to {most:g}" if is_closed else f"below {most:g}"
        raise ConfigError(f"{key.key}: expected a number {low} and {high}, got {value!r}", remedy=key.text)
    return value


def graph_of(settings: Mapping[str, Any]) -> str:
    value = settings.get(GRAPH.key, GRAPH.default)
    if value not in GRAPHS:
        raise ConfigError(f"graph: expected {' or '.join(GRAPHS)}, got {value!r}", remedy=GRAPH.text)
    return str(value)
