"""What a device spent on each of its roles: an integral of power readings. Pure.

Energy is the trapezoid over readings, less what the device draws idle. A reading that is absent, negative or
above what any device draws is left out. Over more than GAP_S without one, or from one sensor to another, the
integral is broken: that time counts as not metered, and a job that lies in it is not measured.

The idle draw is the lesser of the profile's figure and the median of readings while no role computed. The
profile's is of the whole device, so it is too high for a sensor that sees but a part of it (RAPL: the
processor); what runs beside edged makes the other too high.

Energy of a time in which several roles computed is divided by how long each did. Where one of them does not
say, that time is not metered. A role says how long it computed when a batch ends, so a time in which none
ended waits: a batch that then ends and took as long has it, else nothing computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .types import WATTS_MAX, Metered

GAP_S = 4.0  # readings come every second; of more than this nobody knows what happened
QUIET_READINGS = 30
JOB_S = 3.0  # a shorter job lies between too few readings: its ends alone are as long as one of them
BATCH_S = 120.0  # a longer batch counts as idle before
COVERED = 0.95  # of a job's time, before its energy is known
Busy = Mapping[str, float | None]  # by role, seconds computed so far; None where it does not say


@dataclass(slots=True)
class _Account:
    since: float
    joules: float = 0.0
    metered_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Silence:
    """Time between two readings in which no batch ended: its length, mean watts and the second reading."""

    seconds: float
    mean_watts: float
    watts: float


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    watts: float
    source: str | None
    busy: Busy


class Meter:
    """The integral of one device. Times are seconds of one clock that never goes back."""

    def __init__(self, idle_watts: float | None = None) -> None:
        """`idle_watts`: as the profile says, if it does."""
        self._said = idle_watts
        self._quiet: deque[float] = deque(maxlen=QUIET_READINGS)
        self._source: str | None = None
        self._last: _Reading | None = None
        self._accounts: dict[str, _Account] = {}
        self._silent: deque[_Silence] = deque()

    @property
    def idle_watts(self) -> float | None:
        """What is taken off; None while neither the profile nor a quiet time said it."""
        known = [] if self._said is None else [self._said]
        if self._quiet:
            known.append(sorted(self._quiet)[len(self._quiet) // 2])
        return min(known, default=None)

    def quiet(self, watts: float | None, source: str | None) -> None:
        """A reading while the device holds no role; nothing while it holds one."""
        if not self._accounts and watts is not None and is_sound(watts):
            self._change_source(source)
            self._quiet.append(watts)

    def hear(self, now: float, watts: float | None, source: str | None, busy: Busy) -> None:
        """A reading of the device. `busy`: every role that it holds."""
        self._accounts = {role: self._accounts.get(role) or _Account(now) for role in busy}
        if watts is None or not is_sound(watts):
            return
        self._change_source(source)
        last, self._last = self._last, _Reading(now, watts, source, dict(busy))
        if last is None or not 0 < now - last.at <= GAP_S:
            self._settle(0.0)
            return
        shares, seconds = _shares(last.busy, busy), now - last.at
        between = _Silence(seconds, (watts + last.watts) / 2, watts)
        if shares is None:
            self._settle(0.0)
            return
        if shares:
            self._charge([between, *self._settle(_computed(last.busy, busy) - seconds)], shares)
        else:
            self._silent.append(between)
            if sum(silence.seconds for silence in self._silent) > BATCH_S:
                self._quiet.append(self._silent.popleft().watts)
        if self.idle_watts is not None:
            for account in self._accounts.values():
                account.metered_s += min(seconds, now - account.since)

    def _settle(self, computed_s: float) -> list[_Silence]:
        """Of the silent time, the last `computed_s`, which a batch took; in the rest nothing computed."""
        of_batch: list[_Silence] = []
        while self._silent and computed_s > 0:
            of_batch.append(self._silent.pop())
            computed_s -= of_batch[-1].seconds
        self._quiet.extend(silence.watts for silence in self._silent)
        self._silent.clear()
        return of_batch

    def _charge(self, times: list[_Silence], shares: Mapping[str, float]) -> None:
        idle = self.idle_watts
        if idle is None:
            return
        spent = sum((each.mean_watts - idle) * each.seconds for each in times)
        for role, account in self._accounts.items():
            account.joules += shares.get(role, 0.0) * spent

    def of(self, role: str, now: float) -> Metered | None:
        """What `role` spent since it was first heard of; None for a role that never was."""
        account = self._accounts.get(role)
        return None if account is None else Metered(account.joules, account.metered_s, now - account.since)

    def forget(self, role: str) -> None:
        self._accounts.pop(role, None)

    def _change_source(self, source: str | None) -> None:
        """Another sensor sees another part of the device: nothing of the last one compares with it."""
        if source != self._source:
            self._source, self._last = source, None
            self._quiet.clear()
            self._silent.clear()


def is_sound(watts: float) -> bool:
    """May a device draw that? NaN is no number of watts."""
    return 0 <= watts <= WATTS_MAX


def spent(before: Metered | None, after: Metered | None) -> float | None:
    """Joules between two answers of one meter; None where there is none, where it did not see the whole of
    the time, or where that was too short for its readings."""
    if before is None or after is None:
        return None
    elapsed, metered = after.elapsed_s - before.elapsed_s, after.metered_s - before.metered_s
    if not elapsed >= JOB_S or not COVERED * elapsed <= metered <= elapsed / COVERED:
        return None
    joules = after.joules - before.joules
    return max(0.0, joules) if abs(joules) <= WATTS_MAX * elapsed else None


def _computed(before: Busy, after: Busy) -> float:
    """Seconds that the role which computed most did, as far as it is known."""
    known = [(after[role], before.get(role)) for role in after]
    return max((b - a for b, a in known if a is not None and b is not None), default=0.0)


def _shares(before: Busy, after: Busy) -> dict[str, float] | None:
    """For each role its part of what was computed in between; {} when nothing was, None when that cannot
    be told. A role alone has all of it."""
    computed: dict[str, float] = {}
    for role, seconds in after.items():
        earlier = before.get(role)
        if seconds is None or earlier is None:
            return {role: 1.0} if len(after) == 1 else None
        computed[role] = max(0.0, seconds - earlier)
    total = sum(computed.values())
    return {role: seconds / total for role, seconds in computed.items()} if total else {}
