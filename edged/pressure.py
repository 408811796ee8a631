"""Is memory short? A verdict with hysteresis, from what is free and how long the system waits for it."""

from __future__ import annotations

SHORT_FREE, ENOUGH_FREE = 0.05, 0.10  # of all memory
SHORT_WAIT, ENOUGH_WAIT = 10.0, 2.0  # percent of ten seconds with something waiting (PSI)


class Pressure:
    """What a node holds without need is given back from the first bound on, until the second is met."""

    def __init__(self) -> None:
        self.is_short = False

    def update(self, free: float | None, wait: float | None) -> bool:
        """Is it short now? `free`: share of all memory; `wait`: percent; None where unknown."""
        least_free, most_wait = (ENOUGH_FREE, ENOUGH_WAIT) if self.is_short else (SHORT_FREE, SHORT_WAIT)
        is_little = free is not None and free < least_free
        self.is_short = is_little or (wait is not None and wait > most_wait)
        return self.is_short
