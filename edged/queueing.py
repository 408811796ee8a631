"""Who goes next among jobs that wait, where a job runs one iteration at a time. Pure.

`Fcfs`: first come, first served. `Mlfq`: queues of falling priority; who has had the quantum of one falls to
the next, so that short jobs overtake long ones whose length nobody knows. An iteration is never cut short.
Quanta bound work, starving is by the clock: the two may have different units, which are the caller's.

Source: FastServe (arXiv:2305.05920) and its released code, for the queues and for skip-join.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

LEVELS = 16  # quanta double: a job that falls out of the last has had 65535 of the first, and stays there
GROWTH = 2


@dataclass(slots=True, eq=False)
class Queued:
    """A job that waits or runs. `first`: the work of its first iteration, its prompt, which is known
    beforehand; of the others nothing is. `since`: when it came here, or its last iteration ended."""

    first: float = 1.0
    since: float = 0.0
    level: int = 0
    used: float = 0.0  # of the quantum of its level


J = TypeVar("J", bound=Queued)


class Fcfs(Generic[J]):
    """First come, first served; whoever has begun goes on."""

    def __init__(self) -> None:
        self._jobs: deque[J] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def join(self, job: J, now: float) -> None:
        """A new job."""
        job.since = now
        self._jobs.append(job)

    def head(self, now: float) -> J | None:
        """Who is next; it stays here until it leaves."""
        return self._jobs[0] if self._jobs else None

    def leave(self, job: J) -> None:
        """It runs an iteration, or gives up."""
        self._jobs.remove(job)

    def back(self, job: J, work: float, now: float) -> None:
        """It has run an iteration of so much work, and is not done."""
        job.since = now
        self._jobs.appendleft(job)


class Mlfq(Generic[J]):
    """Queues of falling priority; that of level i has the quantum `quantum` * 2^i.

    skips: a job joins the first queue whose quantum its first iteration keeps (skip-join), not the first.
    starving: who has not run for so long goes to the front of the first queue.
    """

    def __init__(self, skips: bool, starving: float = math.inf, quantum: float = 1.0) -> None:
        self._skips, self._starving, self._quantum = skips, starving, quantum
        self._levels: list[deque[J]] = [deque() for _ in range(LEVELS)]

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def join(self, job: J, now: float) -> None:
        """A new job."""
        job.since, job.used = now, 0.0
        job.level = self._level_of(job.first) if self._skips else 0
        self._levels[job.level].append(job)

    def head(self, now: float) -> J | None:
        """Who is next; it stays here until it leaves."""
        self._promote(now)
        return next((jobs[0] for jobs in self._levels if jobs), None)

    def leave(self, job: J) -> None:
        """It runs an iteration, or gives up."""
        self._levels[job.level].remove(job)

    def back(self, job: J, work: float, now: float) -> None:
        """It has run an iteration of so much work, and is not done: it falls where its quantum is used up."""
        job.since = now
        job.used += work
        if job.used > self._quantum * GROWTH**job.level and job.level < LEVELS - 1:
            job.level, job.used = job.level + 1, 0.0
        self._levels[job.level].appendleft(job)

    def _level_of(self, work: float) -> int:
        keeping = (level for level in range(LEVELS) if self._quantum * GROWTH**level >= work)
        return next(keeping, LEVELS - 1)

    def _promote(self, now: float) -> None:
        """Whoever starves, the longest in front."""
        starving = [job for jobs in self._levels for job in jobs if now - job.since >= self._starving]
        for job in sorted(starving, key=lambda job: -job.since):
            self.leave(job)
            job.level, job.used = 0, 0.0
            self._levels[0].appendleft(job)
