"""What a job took: its pace, its bytes, its joules, over all its epochs. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from . import metering
from .types import Metered, Predicted
from .wire import Used

_NOTHING = Metered(0.0, 0.0, 0.0)  # of a role that begins


@dataclass(frozen=True, slots=True)
class Spent:
    """By a job in one epoch. `joules`: None where not every node measured them all along."""

    tokens: int
    bytes_sent: int
    joules: float | None


def spent_between(
    before: Sequence[Used | None], after: Sequence[Used | None], tokens: int, part: float
) -> Spent:
    """What the roles of a group sent and spent between two answers of each (None: it gave none). `tokens` of
    them are the job's, which are this `part` of all."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    sent = sum(max(0, b.bytes_sent - a.bytes_sent) for a, b in pairs)
    each = [metering.spent(a.metered, b.metered) for a, b in pairs]
    known = [joules for joules in each if joules is not None]
    return Spent(tokens, round(part * sent), part * sum(known) if len(known) == len(after) else None)


def pace(times: Sequence[float]) -> tuple[float | None, float]:
    """The median gap between tokens in ms, None of fewer than two; seconds from the first to the last."""
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return (statistics.median(gaps) * 1000, times[-1] - times[0]) if gaps else (None, 0.0)


def estimated_joules(predicted: Predicted, tpot_ms: float | None) -> float | None:
    """Of a token: as predicted from the profiles' watts, over the time that it really took."""
    if predicted.joules_per_token is None or not predicted.tpot_ms or tpot_ms is None:
        return None
    return predicted.joules_per_token * tpot_ms / predicted.tpot_ms


def estimated_training_joules(watts: Sequence[tuple[float, float] | None], seconds: float) -> float | None:
    """Of nodes with these watts, idle and at work, as if all worked all along; None where one is unknown."""
    known = [load - idle for each in watts if each is not None for idle, load in [each]]
    return seconds * sum(known) if known and len(known) == len(watts) else None


def joules_with(before: float | None, used: Sequence[Used | None]) -> float | None:
    """Joules of earlier epochs and of this one's roles; None where one of them did not measure all along."""
    each = [metering.spent(_NOTHING, role.metered if role is not None else None) for role in used]
    known = [joules for joules in each if joules is not None]
    if before is None or not each or len(known) < len(each):
        return None
    return before + sum(known)


def joules_of(epochs: Sequence[Spent], estimated: float | None) -> tuple[float | None, str | None]:
    """Of a job and where they are from: measured where every node of every epoch did that, else the estimate
    of a token times all of them."""
    measured = [spent.joules for spent in epochs if spent.joules is not None]
    if len(measured) == len(epochs):
        return sum(measured), "measured"
    if estimated is None:
        return None, None
    return estimated * sum(spent.tokens for spent in epochs), "estimated"
