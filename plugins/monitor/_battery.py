"""Batteries and chargers as functions over a root directory. Anything missing is None; no reader raises.

Source: the kernel's power_supply documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edged import Battery

from ._files import glob, number, text

JOULES_PER_WH = 3600.0
_MAINS = re.compile(r"Mains|Wireless|USB.*")
_CHARGING = {"Charging": True, "Discharging": False, "Not charging": False, "Full": False}


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
    now, full = _joules([cell.energy_now for cell in cells]), _joules([cell.energy_full for cell in cells])
    return Battery(_percent(cells), charging, plugged(root), now, full)


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
    for supply in glob(root, "sys/class/power_supply/*"):
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


def _joules(energies: list[float | None]) -> float | None:
    """The sum of energies in Wh; None where one is unknown."""
    known = [energy for energy in energies if energy is not None]
    return sum(known) * JOULES_PER_WH if known and len(known) == len(energies) else None
