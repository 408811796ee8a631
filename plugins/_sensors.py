"""Readers of sysfs and procfs, as functions over a root directory. Anything missing is None.

Sources: the kernel's power_supply, thermal, hwmon (ina3221), powercap (intel-rapl) documents. Every
file may be missing, empty, unreadable or garbled at any moment: no reader raises.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edged import Battery

TEXT_BYTES_MAX = 65536  # the longest file read is /proc/cpuinfo; its first processors are enough
CELSIUS = range(1, 150)  # a disabled Tegra zone reads -256, an absent one 0
MEAN_OVER_S = 0.1  # counters tick every millisecond: less time than this says little
STALE_S = 300.0  # an energy counter may have wrapped more than once since: begin anew
_MAINS = re.compile(r"Mains|Wireless|USB.*")
_CHARGING = {"Charging": True, "Discharging": False, "Not charging": False, "Full": False}
_PROCESSOR = re.compile(r"cpu|soc|gpu|pkg|^tj|core|k10temp|zenpower|cluster|tsens|acpitz", re.IGNORECASE)


# --- battery --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One battery: percent, whether it charges, its energy in Wh, the power through it."""

    percent: float | None
    charging: bool | None
    energy_now: float | None
    energy_full: float | None
    watts: float | None


def battery(root: Path) -> Battery | None:
    """All batteries as one, or None where there is none. Batteries of mice and headsets do not count."""
    cells = _cells(root)
    if not cells:
        return None
    states = [cell.charging for cell in cells]
    charging = True if True in states else None if None in states else False
    return Battery(_percent(cells), charging, plugged(root))


def plugged(root: Path) -> bool | None:
    """Whether a charger is connected; None where no charger has a sensor."""
    chargers = [supply for supply in _supplies(root) if _MAINS.fullmatch(text(supply / "type") or "")]
    online = [value for value in (number(supply / "online") for supply in chargers) if value is not None]
    return any(online) if online else None


def battery_watts(root: Path) -> float | None:
    """What the whole device draws from its batteries; None unless one is known to discharge."""
    drawn = [cell.watts for cell in _cells(root) if cell.charging is False and cell.watts]
    return sum(drawn) if drawn and plugged(root) is not True else None


def _supplies(root: Path) -> Iterator[Path]:
    """Power supplies of the device itself, without those of its peripherals."""
    for supply in _glob(root, "sys/class/power_supply/*"):
        if text(supply / "scope") != "Device":
            yield supply


def _cells(root: Path) -> list[Cell]:
    """The device's batteries, without empty bays."""
    batteries = [supply for supply in _supplies(root) if text(supply / "type") == "Battery"]
    return [_cell(supply) for supply in batteries if number(supply / "present") != 0]


def _cell(supply: Path) -> Cell:
    now, full = _energy(supply, "now"), _energy(supply, "full")
    capacity = number(supply / "capacity")
    if capacity is not None and not 0 <= capacity <= 100:
        capacity = None
    if capacity is None and now is not None and full:
        capacity = min(100 * now / full, 100.0)
    return Cell(capacity, _CHARGING.get(text(supply / "status") or ""), now, full, _watts(supply))


def _energy(supply: Path, moment: str) -> float | None:
    """Wh; `energy_*` is in uWh, `charge_*` in uAh at a voltage in uV."""
    energy, charge = number(supply / f"energy_{moment}"), number(supply / f"charge_{moment}")
    voltage = number(supply / "voltage_now")
    if energy is not None:
        return energy / 1e6 if energy >= 0 else None
    return charge * voltage / 1e12 if charge is not None and voltage and charge >= 0 else None


def _watts(supply: Path) -> float | None:
    """Absolute: the sign of a current differs from driver to driver, `status` says the direction."""
    power, current = number(supply / "power_now"), number(supply / "current_now")
    voltage = number(supply / "voltage_now")
    if power is not None:
        return abs(power) / 1e6
    return abs(voltage * current) / 1e12 if voltage is not None and current is not None else None


def _percent(cells: list[Cell]) -> float | None:
    """Of several batteries the energies are summed, for a small one's percent weighs less."""
    if len(cells) == 1:
        return cells[0].percent
    now = [cell.energy_now for cell in cells if cell.energy_now is not None]
    full = [cell.energy_full for cell in cells if cell.energy_full]
    if len(now) != len(cells) or len(full) != len(cells):
        return None
    return min(100 * sum(now) / sum(full), 100.0)


# --- heat -----------------------------------------------------------------------------------------


def temperature(root: Path) -> float | None:
    """The hottest processor sensor in degrees Celsius: thermal zones, else hwmon chips."""
    zones = [
        _celsius(zone / "temp")
        for zone in _glob(root, "sys/class/thermal/thermal_zone*")
        if _PROCESSOR.search(text(zone / "type") or "")
    ]
    chips = [
        _celsius(path)
        for chip in _glob(root, "sys/class/hwmon/hwmon*")
        if _PROCESSOR.search(text(chip / "name") or "")
        for path in _glob(chip, "temp*_input")
    ]
    return max((each for each in zones + chips if each is not None), default=None)


def _celsius(path: Path) -> float | None:
    milli = number(path)
    return milli / 1000 if milli is not None and int(milli / 1000) in CELSIUS else None


# --- power ----------------------------------------------------------------------------------------


def jetson_watts(root: Path) -> float | None:
    """The INA3221's input rail, which feeds all the others; else, as on AGX Orin, the sum of rails."""
    rails: dict[str, float] = {}
    for hwmon in _glob(root, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):
        for channel in (1, 2, 3):  # 7 is the sum of the shunts
            label = text(hwmon / f"in{channel}_label") or ""
            millivolts = number(hwmon / f"in{channel}_input")
            milliamperes = number(hwmon / f"curr{channel}_input")
            if label and "NC" not in label and millivolts is not None and milliamperes is not None:
                rails[label] = millivolts * milliamperes / 1e6
    total = next((rails[label] for label in ("VDD_IN", "POM_5V_IN") if label in rails), None)
    return total if total is not None else sum(rails.values()) if rails else None


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
        for zone in _glob(self._root, "sys/class/powercap/intel-rapl:*"):
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


# --- processor ------------------------------------------------------------------------------------


def cpu_name(root: Path) -> str | None:
    """As /proc/cpuinfo names it, else the board as the device tree does."""
    cpuinfo = text(root / "proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*:[ \t]*(\S[^\n]*)$", cpuinfo, re.MULTILINE)
        if match:
            return match[1].strip()[:100]
    board = (text(root / "proc/device-tree/model") or "").rstrip("\0").strip()
    return board[:100] or None


def load_1m(root: Path) -> float | None:
    first = (text(root / "proc/loadavg") or "").partition(" ")[0]
    return _float(first)


# --- files ----------------------------------------------------------------------------------------


def text(path: Path) -> str | None:
    """A file's text without its end of line; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(TEXT_BYTES_MAX).decode("utf-8", "replace").strip()
    except OSError:  # absent, unplugged meanwhile (ENODEV), asleep (EAGAIN), not ours to read
        return None


def number(path: Path) -> float | None:
    content = text(path)
    return None if content is None else _float(content)


def _float(content: str) -> float | None:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,9})?", content):
        return None
    return float(content)


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # Android hides parts of /sys
        return []
