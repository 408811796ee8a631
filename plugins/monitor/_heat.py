"""Temperature and throttling as functions over a root directory. Anything missing is None; no reader raises.

Sources: the kernel's thermal and hwmon documents; Raspberry Pi's firmware bits (get_throttled); Intel's
throttle counters. A counter that rises between two readings says that the processor was slowed down.
"""

from __future__ import annotations

import re
from pathlib import Path

from ._files import glob, number, text

CELSIUS = range(1, 150)  # a disabled Tegra zone reads -256, an absent one 0
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
# Under-voltage, frequency capped, throttled, soft temperature limit; the bits above: since the start.
SLOWED_NOW = 0b1111
COUNTERS = "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"
_PROCESSOR = re.compile(r"cpu|soc|gpu|pkg|^tj|core|k10temp|zenpower|cluster|tsens|acpitz", re.IGNORECASE)
_COOLING = re.compile(r"^Processor$|cpufreq|cpu_throttle|devfreq|gpu", re.IGNORECASE)  # not fans


def temperature(root: Path) -> float | None:
    """The hottest processor sensor in degrees Celsius: thermal zones, else hwmon chips."""
    zones = [
        _celsius(zone / "temp")
        for zone in glob(root, "sys/class/thermal/thermal_zone*")
        if _PROCESSOR.search(text(zone / "type") or "")
    ]
    chips = [
        _celsius(path)
        for chip in glob(root, "sys/class/hwmon/hwmon*")
        if _PROCESSOR.search(text(chip / "name") or "")
        for path in glob(chip, "temp*_input")
    ]
    return max((each for each in zones + chips if each is not None), default=None)


def _celsius(path: Path) -> float | None:
    milli = number(path)
    return milli / 1000 if milli is not None and int(milli / 1000) in CELSIUS else None


class Throttling:
    """Is the processor slowed down because of heat or a weak supply? None where nothing says so."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._counted: float | None = None

    def read(self) -> bool | None:
        said = [self._by_firmware(), self._by_cooling(), self._by_counters()]
        known = [each for each in said if each is not None]
        return any(known) if known else None

    def _by_firmware(self) -> bool | None:
        try:
            return bool(int(text(self._root / FIRMWARE) or "", 16) & SLOWED_NOW)
        except ValueError:
            return None

    def _by_cooling(self) -> bool | None:
        """Passive cooling that is at work; its states go from 0, not cooling, up."""
        states = [
            number(device / "cur_state")
            for device in glob(self._root, "sys/class/thermal/cooling_device*")
            if _COOLING.search(text(device / "type") or "")
        ]
        known = [state for state in states if state is not None]
        return any(state > 0 for state in known) if known else None

    def _by_counters(self) -> bool | None:
        """Did any rise since the last reading? None at the first."""
        counts = [count for count in map(number, glob(self._root, COUNTERS)) if count is not None]
        before, self._counted = self._counted, sum(counts) if counts else None
        return None if before is None or self._counted is None else self._counted > before
