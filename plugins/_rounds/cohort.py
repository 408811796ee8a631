"""Who takes part in a round, and how long it is waited for. Pure.

A member is asked only if its device can bear it, and each that is not has a reason. What a sensor does not
say changes nothing, as everywhere in edged; a device without a battery is on mains.

The deadline is the median of earlier arrivals plus k times their median absolute deviation (Hampel 1974, "the
influence curve and its role in robust estimation"; asked for by users of hivemind instead of fixed
timeouts). A member that never came counts as infinitely late: with those who came in time alone, each
deadline would be shorter than the one before.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edged import Battery, ConfigError, DeviceState, NodeView

NEARLY = 1e-9  # a product of a fraction and a number of members, rounded, is not one more than it is

NOT_DRAWN = "it was not drawn for this round"


@dataclass(frozen=True, slots=True)
class Entrant:
    """A member that could take part. `idle_s`: how long nobody has used the device; None where unknown."""

    rank: int
    node: NodeView
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What a device must be like; the defaults ask for nothing but what its own node says."""

    charging: bool = False  # on a charger or mains only
    battery_least: float | None = None  # percent, unless on a charger
    celsius_most: float | None = None
    throttled: bool = False  # is one that is slowed down by heat asked too?
    metered: bool = False  # is one asked whose link costs money by the byte?
    idle_s: float = 0.0  # how long nobody must have used it


@dataclass(frozen=True, slots=True)
class Choice:
    """chosen: ranks, ascending; left_out: why each of the others is not."""

    chosen: tuple[int, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)


def choose(
    entrants: Iterable[Entrant], round: int, seed: int, fraction: float, rules: Rules, least: int = 1
) -> Choice:
    """ceil(fraction n) of all n entrants, at least `least`, drawn from those that are able; all that are able
    where they are fewer than that. The caller decides whether these are enough.

    The draw is a function of (seed, round, rank): of the order of the entrants it knows nothing, and where
    one becomes unable only its own place is drawn again. ConfigError for a fraction outside (0, 1]
    or a rank twice.
    """
    entrants = list(entrants)
    if not 0 < fraction <= 1:
        raise ConfigError(f"expected a fraction above 0 and at most 1, got {fraction}")
    if len({entrant.rank for entrant in entrants}) != len(entrants):
        raise ConfigError("expected each rank once among those who could take part")
    reasons = {entrant.rank: unable(entrant, rules) for entrant in entrants}
    wanted = max(least, math.ceil(fraction * len(entrants) - NEARLY))
    able = sorted((rank for rank in reasons if not reasons[rank]), key=lambda rank: _lot(seed, round, rank))
    chosen = tuple(sorted(able[:wanted]))
    left_out = {rank: reasons[rank] or NOT_DRAWN for rank in sorted(reasons) if rank not in chosen}
    return Choice(chosen, left_out)


def unable(entrant: Entrant, rules: Rules) -> str:
    """Why a member cannot be asked now, or ""."""
    node = entrant.node
    if not node.online:
        return "it is offline"
    if node.refuses:
        return f"it takes no new roles: {node.refuses}"
    return _starved(node.device.battery, rules) or _strained(node.device, rules) or _in_use(entrant, rules)


def _starved(battery: Battery | None, rules: Rules) -> str:
    if battery is None or battery.charging or battery.plugged:
        return ""
    is_known = battery.charging is not None or battery.plugged is not None
    if rules.charging and is_known:
        return "it is not charging"
    if rules.battery_least is None or battery.percent is None or battery.percent >= rules.battery_least:
        return ""
    return f"its battery is at {battery.percent:.0f} %, below {rules.battery_least:.0f} %"


def _strained(device: DeviceState, rules: Rules) -> str:
    celsius = device.temperature_celsius
    if device.is_throttled and not rules.throttled:
        return "it is slowed down, by heat or a weak supply"
    if rules.celsius_most is not None and celsius is not None and celsius > rules.celsius_most:
        return f"it is at {celsius:.0f} degrees, above {rules.celsius_most:.0f}"
    return "its link is metered" if device.is_metered and not rules.metered else ""


def _in_use(entrant: Entrant, rules: Rules) -> str:
    if rules.idle_s > 0 and entrant.node.device.in_use:
        return "somebody is using it"
    if entrant.idle_s is not None and entrant.idle_s < rules.idle_s:
        return f"it was used {entrant.idle_s:.0f} s ago, less than {rules.idle_s:.0f} s"
    return ""


def _lot(seed: int, round: int, rank: int) -> bytes:
    return hashlib.sha256(f"{seed} {round} {rank}".encode()).digest()


# --- how long a round waits -----------------------------------------------------------------------

Verdict = Literal["wait", "close", "fail"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """floor_s, ceiling_s: the deadline is never outside; k: of the deviation, 3 is two standard deviations of
    a normal one; quorum: the part of the cohort without which no round ends, but by the ceiling; rounds: how
    many of the last ones are looked at."""

    floor_s: float
    ceiling_s: float
    k: float = 3.0
    quorum: float = 0.5
    rounds: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.floor_s <= self.ceiling_s < math.inf:
            raise ConfigError(f"expected 0 < floor_s <= ceiling_s, got {self.floor_s} and {self.ceiling_s}")
        if not (0 <= self.k < math.inf and 0 < self.quorum <= 1 and self.rounds >= 1):
            raise ConfigError(
                "expected k of at least 0, a quorum in (0, 1] and at least 1 round, "
                f"got {self.k}, {self.quorum} and {self.rounds}"
            )

    def deadline_s(self, offsets: Sequence[Sequence[float]]) -> float:
        """Seconds from a round's beginning, of the earlier rounds' arrivals in seconds from theirs.

        Give the real offset of one that came too late, and infinity for one that never came. The ceiling
        where nothing is known, or where half did not come.
        """
        arrived = [offset for round in offsets[-self.rounds :] for offset in round]
        median = statistics.median(arrived) if arrived else math.inf
        if math.isinf(median):
            return self.ceiling_s
        deviation = statistics.median(abs(offset - median) for offset in arrived)
        bound = median + self.k * deviation if self.k else median
        return min(max(bound, self.floor_s), self.ceiling_s)

    def verdict(self, arrived: int, cohort: int, elapsed_s: float, deadline_s: float) -> Verdict:
        """Close a round that all came to, or a quorum by the deadline; fail at the ceiling without one."""
        if arrived >= cohort:
            return "close"
        has_quorum = arrived >= math.ceil(self.quorum * cohort - NEARLY)
        if has_quorum and elapsed_s >= deadline_s:
            return "close"
        return "fail" if elapsed_s >= self.ceiling_s else "wait"
