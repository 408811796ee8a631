"""How long a training may be silent before a rank counts as frozen: by the silences that there were. Pure.

A process that was stopped, or hangs in a driver, keeps its connections open: nothing but its silence tells.
Steps differ in length with their rows, and an evaluation takes longer than a step, so the limit is far above
all that was seen; it is short where steps are short.
"""

from __future__ import annotations

import statistics
from collections import deque

FIRST_S = 300.0  # until some reports came: checkpoints are read and the first evaluation runs meanwhile
SETTLED = 3
LEAST_S = 20.0  # a busy machine, a slow disk
KEPT = 256  # silences; the longest of all is kept beside them
SPREADS, TIMES = 10.0, 3.0  # above the median, and of the longest


class Patience:
    """Told of every report; times are seconds of one monotonic clock."""

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._silences: deque[float] = deque(maxlen=KEPT)
        self._longest = 0.0
        self._heard = 0  # since `begin`

    def begin(self, now: float) -> None:
        """Another epoch begins: nothing was heard in it yet."""
        self._heard_at, self._heard = now, 0

    def heard(self, now: float) -> None:
        silence = max(0.0, now - self._heard_at)
        self._silences.append(silence)
        self._longest = max(self._longest, silence)
        self._heard_at = now
        self._heard += 1

    @property
    def limit_s(self) -> float:
        """LEAST_S at least; the median and ten median deviations, or three times the longest, where more."""
        if self._heard < SETTLED:
            return max(FIRST_S, TIMES * self._longest)
        median = statistics.median(self._silences)
        spread = statistics.median(abs(silence - median) for silence in self._silences)
        return max(LEAST_S, median + SPREADS * spread, TIMES * self._longest)

    def is_over(self, now: float) -> bool:
        return now - self._heard_at > self.limit_s
