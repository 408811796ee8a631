"""What a device sustains: how fast it works after a while, of what its short benchmark says. Pure.

A benchmark of three seconds runs on a cold device; work of minutes may not go on at that rate. The ratio is
the time that tokens should have taken by the benchmark, over the time that they took. It is kept as it is
until WINDOWS in a row, each WINDOW_S of computing, say that it moved by over DRIFT to the same side: a short
hiccup changes nothing, nor does what a prediction is usually wrong by. Then their mean is kept: that is news.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW_S, WINDOWS = 5.0, 4  # together the while of steady work
DRIFT = 0.2
LEAST = 0.05  # below that something else went wrong than heat
PAUSE_S = 30.0  # without work, and what was heard before is of another temperature
REST_S = 300.0  # without work, and a device that is not hot is as fast as in its benchmark


@dataclass(slots=True)
class _Window:
    busy_s: float = 0.0
    measured_s: float = 0.0
    expected_s: float = 0.0


@dataclass(slots=True)
class Sustained:
    """The ratio of one device and weight type; `kept` is what predictions use, above 0 and at most 1."""

    kept: float = 1.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOWS))
    _window: _Window = field(default_factory=_Window)
    _heard_at: float = -math.inf

    def hear(self, now: float, busy_s: float, measured_s: float, expected_s: float) -> bool:
        """Within `busy_s` of computing, tokens that should have taken `expected_s` took `measured_s`.
        True when the ratio moved."""
        if now - self._heard_at > PAUSE_S:
            self._recent.clear()
            self._window = _Window()
        self._heard_at, window = now, self._window
        window.busy_s += busy_s
        window.measured_s += measured_s
        window.expected_s += expected_s
        if window.busy_s < WINDOW_S or not window.measured_s > 0:
            return False
        self._window = _Window()
        self._recent.append(min(max(window.expected_s / window.measured_s, LEAST), 1.0))
        if len(self._recent) < WINDOWS or not self._agree():
            return False
        self.kept = math.prod(self._recent) ** (1 / WINDOWS)
        return True

    def rest(self, idle_s: float, is_hot: bool) -> bool:
        """Hear for how long the device has computed nothing. True when that made it whole."""
        if is_hot or self.kept == 1.0 or idle_s < REST_S:
            return False
        self.kept = 1.0
        return True

    def _agree(self) -> bool:
        """Did every recent window move to the same side, by more than the drift?"""
        slowest, fastest = min(self._recent), max(self._recent)
        return fastest < self.kept * (1 - DRIFT) or slowest > self.kept * (1 + DRIFT)
