"""What the device draws, as functions over a root directory. Anything missing is None; no reader raises.

Sources: the kernel's hwmon (ina3221) and powercap (intel-rapl) documents; JetPack 4's iio files as
jetson-stats reads them; NVIDIA's management library.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._files import glob, number, text

MEAN_OVER_S = 0.1  # counters tick every millisecond: less time than this says little
STALE_S = 300.0  # an energy counter may have wrapped more than once since: begin anew
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")  # they feed all the others


def jetson_watts(root: Path) -> float | None:
    """The input rail, which feeds all the others; else, as on AGX Orin, the sum of rails."""
    rails = _hwmon_rails(root) or _iio_rails(root)
    total = next((rails[label] for label in TOTAL_RAILS if label in rails), None)
    return total if total is not None else sum(rails.values()) if rails else None


def _hwmon_rails(root: Path) -> dict[str, float]:
    """Watts by rail of JetPack 5 and later."""
    rails: dict[str, float] = {}
    for hwmon in glob(root, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):
        for channel in (1, 2, 3):  # 7 is the sum of the shunts
            label = text(hwmon / f"in{channel}_label") or ""
            millivolts = number(hwmon / f"in{channel}_input")
            milliamperes = number(hwmon / f"curr{channel}_input")
            if _is_rail(label) and millivolts is not None and milliamperes is not None:
                rails[label] = max(0.0, millivolts * milliamperes / 1e6)
    return rails


def _iio_rails(root: Path) -> dict[str, float]:
    """Watts by rail of JetPack 4."""
    rails: dict[str, float] = {}
    for device in glob(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*"):
        for channel in (0, 1, 2):
            label = text(device / f"rail_name_{channel}") or ""
            milliwatts = number(device / f"in_power{channel}_input")
            if _is_rail(label) and milliwatts is not None:
                rails[label] = max(0.0, milliwatts / 1e3)
    return rails


def _is_rail(label: str) -> bool:
    return bool(label) and "NC" not in label


class Nvml:
    """Watts of all NVIDIA cards that say them; `library` is the module pynvml, or None without it."""

    def __init__(self, library: Any) -> None:
        self._library, self._handles = library, list[Any]()
        if library is not None:
            try:
                library.nvmlInit()
                count = library.nvmlDeviceGetCount()
                self._handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            except library.NVMLError:  # no driver, or one of another version
                self._library = None

    def watts(self) -> float | None:
        found = [self._watts_of(handle) for handle in self._handles]
        known = [each for each in found if each is not None]
        return sum(known) if known else None

    def _watts_of(self, handle: Any) -> float | None:
        try:
            return float(self._library.nvmlDeviceGetPowerUsage(handle)) / 1e3
        except self._library.NVMLError:  # integrated ones have no such sensor
            return None


class Rapl:
    """Watts of the processor packages and their memory, from energy counters read twice.

    A package's zone holds its cores', so sub-zones are left out, but memory, which is beside it.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._clock = root, clock
        self._before: tuple[float, dict[str, float]] | None = None
        self._last: float | None = None

    def watts(self) -> float | None:
        """The mean since the last call; None at the first, and where the counters cannot be read."""
        now = self._clock()
        if self._before is not None and 0 <= now - self._before[0] < MEAN_OVER_S:
            return self._last
        counters, ranges = self._read()
        before, self._before = self._before, (now, counters)
        self._last = None
        if before is not None and before[1].keys() == counters.keys() and now - before[0] <= STALE_S:
            spent = [joules(before[1][zone], counters[zone], ranges[zone]) for zone in counters]
            known = [each for each in spent if each is not None]
            if known and len(known) == len(spent):
                self._last = sum(known) / (now - before[0])
        return self._last

    def _read(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """Energy and range by zone, in uJ."""
        counters: dict[str, float] = {}
        ranges: dict[str, float | None] = {}
        for zone in glob(self._root, "sys/class/powercap/intel-rapl:*"):
            name, energy = text(zone / "name") or "", number(zone / "energy_uj")
            if energy is not None and (name.startswith("package") or name == "dram"):
                counters[zone.name] = energy
                ranges[zone.name] = number(zone / "max_energy_range_uj")
        return counters, ranges


def joules(before_uj: float, after_uj: float, range_uj: float | None) -> float | None:
    """Energy between two readings of a counter that wraps at `range_uj`."""
    if after_uj >= before_uj:
        return (after_uj - before_uj) / 1e6
    return (after_uj - before_uj + range_uj) / 1e6 if range_uj and range_uj >= before_uj else None
