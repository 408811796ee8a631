"""What the grid emits hour by hour, and when a job should start for the least of it. Pure.

The file is CSV: the header `time,g_per_kwh`, then a line for each hour, in order and without gaps. `time` is
when that hour begins, RFC 3339 in UTC; `g_per_kwh` is grams of CO2 (or equivalent) of a kilowatt-hour in it:

    time,g_per_kwh
    2026-11-27T00:00:00Z,312
    2026-11-27T01:00:00Z,287.5

The rule is carbon-aware schedulers' common one: a job that may wait starts where the mean intensity over its
run is least, with its end before its deadline.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from edged import ConfigError

HEADER = "time,g_per_kwh"
HOUR_S = 3600.0
JOULES_PER_KWH = 3.6e6
INTENSITY_MAX = 5000.0  # g/kWh; the dirtiest plants have a third of it: more is a slip
HOURS_MAX = 2 * 8784  # two years
ROUNDING_S = 1e-3
GAIN = 1e-3  # a later start must be cleaner by this part: a planned one would else move on by its rounding
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)")


@dataclass(frozen=True, slots=True)
class Intensities:
    """Grams of CO2 for a kilowatt-hour; the first hour begins at `start` (Unix time)."""

    start: float
    hourly: tuple[float, ...]

    @property
    def end(self) -> float:
        return self.start + HOUR_S * len(self.hourly)

    def covers(self, start: float, duration_s: float = 0.0) -> bool:
        """Does it know all of a run that starts then?"""
        return self.start <= start < self.end and start + duration_s <= self.end

    def mean(self, start: float, duration_s: float) -> float:
        """Mean over a run that it covers, by time; of an instant, the hour's."""
        first = math.floor((start - self.start) / HOUR_S)
        if duration_s <= 0:
            return self.hourly[first]
        total = 0.0
        for hour in range(first, len(self.hourly)):
            begin = self.start + HOUR_S * hour
            inside = min(begin + HOUR_S, start + duration_s) - max(begin, start)
            if inside <= 0:
                break
            total += inside * self.hourly[hour]
        return total / duration_s

    def cleanest(self, now: float, duration_s: float, deadline: float) -> float:
        """When a run should start to end by `deadline` with the least mean intensity; the earliest such time.

        `now` where nothing is cleaner, where the run cannot wait, and where this does not cover a run that
        starts now: without it nothing can be compared.
        """
        if not self.covers(now, duration_s):
            return now
        best, least = now, self.mean(now, duration_s) * (1 - GAIN)
        latest = deadline - duration_s
        for start in self._starts(duration_s, latest):
            if now < start <= latest and self.covers(start, duration_s):
                mean = self.mean(start, duration_s)
                if mean < least:
                    best, least = start, mean
        return best

    def _starts(self, duration_s: float, latest: float) -> list[float]:
        """Where a least mean can be: a run begins or ends with an hour, or can wait no longer. Ascending."""
        edges = [self.start + HOUR_S * hour for hour in range(len(self.hourly) + 1)]
        return sorted({latest, *edges, *(edge - duration_s for edge in edges)})


def grams(joules: float, g_per_kwh: float) -> float:
    return joules / JOULES_PER_KWH * g_per_kwh


def parse(text: str, origin: str) -> Intensities:
    """The file's hours; ConfigError names the line, what was expected there and what came."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    rows = [(number, line) for number, line in lines if line]
    if not rows or rows[0][1] != HEADER:
        came = rows[0][1][:60] if rows else "an empty file"
        raise _wrong(f"the header {HEADER!r}", came, rows[0][0] if rows else 1, origin)
    hours = [(number, *_row(line, number, origin)) for number, line in rows[1:]]
    if not 1 <= len(hours) <= HOURS_MAX:
        raise _wrong(f"1 to {HOURS_MAX} hours", str(len(hours)), rows[-1][0], origin)
    for (_, before, _), (number, time, _) in itertools.pairwise(hours):
        if abs(time - before - HOUR_S) > ROUNDING_S:
            what = "a gap" if time > before + HOUR_S else "an earlier or repeated hour"
            raise _wrong(f"{_rfc3339(before + HOUR_S)}, an hour after the line before", what, number, origin)
    return Intensities(hours[0][1], tuple(value for _, _, value in hours))


def _row(line: str, number: int, origin: str) -> tuple[float, float]:
    time, _, value = (part.strip() for part in line.partition(","))
    try:
        if not _TIME.fullmatch(time):
            raise ValueError
        begins = datetime.fromisoformat(time).timestamp()
    except ValueError as error:
        raise _wrong('a time like "2026-11-27T14:00:00Z", in UTC', repr(time[:40]), number, origin) from error
    try:
        intensity = float(value)
    except ValueError:
        intensity = math.nan
    if not 0 <= intensity <= INTENSITY_MAX:
        raise _wrong(f"grams for a kWh from 0 to {INTENSITY_MAX:g}", repr(value[:40]), number, origin)
    return begins, intensity


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _wrong(expected: str, came: str, number: int, origin: str) -> ConfigError:
    return ConfigError(
        f"energy: expected {expected} in line {number} of {origin}; {came} came", remedy="mend the file"
    )
