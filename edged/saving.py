"""Should this node take no new work? A verdict with hysteresis, from its battery, its heat and its owner.

Each cause begins at one level and ends at another, and only when two readings in a row say so: a sensor that
jumps once changes nothing. What a sensor does not say changes nothing either. A charger ends the first cause.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .types import DeviceState

COOLER_CELSIUS = 10.0  # below the limit, before a hot device works again
READINGS = 2


@dataclass(frozen=True, slots=True)
class Levels:
    """Parts of the battery; the thermal limit in degrees, or None; does edged stop for its owner?"""

    reserve: float
    resume: float
    limit_celsius: float | None = None
    yields: bool = False


@dataclass(slots=True)
class _Cause:
    """One of them, and how many readings in a row contradicted it."""

    holds: bool = False
    against: int = 0

    def hear(self, said: bool | None) -> None:
        self.against = self.against + 1 if said is not None and said != self.holds else 0
        if self.against >= READINGS:
            self.holds, self.against = not self.holds, 0


@dataclass(slots=True)
class Saving:
    """The verdict: `because` is "" while the node may work."""

    levels: Levels
    because: str = ""
    _battery: _Cause = field(default_factory=_Cause)
    _heat: _Cause = field(default_factory=_Cause)
    _owner: _Cause = field(default_factory=_Cause)

    def update(self, state: DeviceState) -> str:
        """Hear one reading; why no new work is taken now, or ""."""
        levels = self.levels
        self._battery.hear(self._is_low(state))
        self._heat.hear(self._is_hot(state))
        self._owner.hear(state.in_use if levels.yields else None)
        causes = []
        if self._battery.holds:
            causes.append(f"its battery is below its reserve, until {100 * levels.resume:.0f} % or a charger")
        if self._heat.holds:
            causes.append("it is too hot, or its supply too weak")
        if self._owner.holds:
            causes.append("its owner is using it")
        self.because = "; ".join(causes)
        return self.because

    def _is_low(self, state: DeviceState) -> bool | None:
        battery = state.battery
        if battery is None:
            return None
        if battery.plugged or battery.charging:
            return False
        if battery.percent is None:
            return None
        bound = self.levels.resume if self._battery.holds else self.levels.reserve
        return battery.percent < 100 * bound

    def _is_hot(self, state: DeviceState) -> bool | None:
        limit, celsius = self.levels.limit_celsius, state.temperature_celsius
        if state.is_throttled:
            return True
        if limit is None or celsius is None:
            return state.is_throttled
        return celsius >= (limit - COOLER_CELSIUS if self._heat.holds else limit)
