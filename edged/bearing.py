"""What this node's battery bears in jobs a slot, and its power mode: what `long-term` and `adaptive` weigh.

Source: Khoshsirat, Perin, Rossi (arXiv:2408.15907). The profile says the harvest and the watts, a sensor or
the profile the capacity. The figure itself is a policy's (`Policy.fit`): numerical, so it is computed in a
process of its own, once for the same inputs. A charger makes a node one on mains at once, and back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from . import identity as ids
from .config import Profile
from .device import Device
from .errors import EdgedError
from .scenario import PowerMode, Simulated
from .supervisor import Supervisor
from .types import Battery

log = logging.getLogger(__name__)
SLOT_S = 100.0  # of the source; a job takes one, at the profile's load_watts
JOULES_PER_WH = 3600.0
ON_MAINS = 1.0  # jobs a slot: as many as time allows
BANDS = (40.0, 60.0)  # percent from which power modes 2 and 3 hold: the source's table
FIT_S = 120.0  # it takes a second; a busy Raspberry Pi takes longer


@dataclass(frozen=True, slots=True)
class Bears:
    """`jobs`: a slot, None where unknown. `unfitted`: why it is, though the profile says a harvest."""

    jobs: float | None = None
    unfitted: str = ""


def lives_on(battery: Battery | None) -> bool:
    """Does a device live on its battery now? A battery without a charger's sensor tells by charging."""
    return battery is not None and not battery.plugged and not battery.charging


def power_mode(battery: Battery | None) -> int | None:
    """1 below 40 % of the battery, 2 below 60 %, else 3; None on mains, and where the level is unknown."""
    if battery is None or battery.percent is None or not lives_on(battery):
        return None
    return 1 + sum(battery.percent >= bound for bound in BANDS)


def described(profile: Profile, battery: Battery | None) -> Simulated | None:
    """This node as a simulated one; None where the profile says no harvest, or nothing says its capacity.

    What a job takes is above what the device draws idle; a capacity counts to two digits, since what a
    sensor says of it wanders.
    """
    watts, energy = profile.device.watts, profile.energy
    capacity = _capacity_joules(profile, battery)
    if energy.harvest_watts is None or watts is None or capacity is None:
        return None
    idle, load = (SLOT_S * each for each in watts)
    low, high = (SLOT_S * each for each in energy.harvest_watts)
    return Simulated(
        "this",
        (PowerMode(1, load - idle),),
        capacity_joules=float(f"{capacity:.2g}"),
        reserve=energy.reserve,
        resume=energy.resume,
        harvest_joules=(low, high),
        is_solar=energy.is_solar,
        idle_joules=idle,
    )


def _capacity_joules(profile: Profile, battery: Battery | None) -> float | None:
    """As its sensor says, else as the profile does."""
    if battery is not None and battery.capacity_joules:
        return battery.capacity_joules
    stated = profile.device.battery_wh
    return None if stated is None else JOULES_PER_WH * stated


class Bearing:
    """Computed when first asked for, kept in the cache folder; what failed is tried again after a restart."""

    def __init__(
        self, profile: Profile, cache: Path, device: Device, supervisor: Supervisor, fit: str
    ) -> None:
        """`fit`: the dotted name of a policy's; "" where no loaded policy has one."""
        self._profile, self._cache, self._device = profile, cache, device
        self._supervisor, self._fit = supervisor, fit
        self._found: dict[str, Bears] = {}  # by file name; capacities to two digits are few
        self._lock = asyncio.Lock()

    def read(self, battery: Battery | None) -> Bears:
        """As far as it was computed before."""
        stated = self._profile.device.battery_wh
        if not lives_on(battery) and (battery is not None or stated is None):
            return Bears(ON_MAINS)
        if self._profile.energy.harvest_watts is None:
            return Bears()
        device = described(self._profile, battery)
        if device is None:
            return Bears(None, "nothing says its battery's capacity; write device.battery_wh in its profile")
        if not self._fit:
            return Bears(None, "it has no plugin that computes what its battery bears; load energy")
        return self._known(device) or Bears(None, "what its battery bears is still being computed")

    async def ensure(self) -> None:
        """Compute it where that was not done before, and can be."""
        async with self._lock:
            device = described(self._profile, self._device.read().battery)
            if device is None or not self._fit or self._known(device):
                return
            params = {"function": self._fit, "settings": [dataclasses.asdict(device)]}
            try:
                result = await self._supervisor.run_task("edged.worker:call", params, timeout_s=FIT_S)
                jobs = float(result["answer"][device.name])
                self._found[self._file(device).name] = Bears(jobs)
                ids.write_atomically(self._file(device), json.dumps(jobs).encode())
                log.info("battery fitted", extra={"jobs_per_slot": round(jobs, 4)})
            except OSError as error:
                log.warning("fit not kept", extra={"reason": str(error)})
            except (EdgedError, KeyError, TypeError, ValueError) as error:
                log.warning("battery not fitted", extra={"reason": str(error)})
                why = f"what its battery bears cannot be computed there: {error}"
                self._found[self._file(device).name] = Bears(None, why)

    def _known(self, device: Simulated) -> Bears | None:
        file = self._file(device)
        if file.name not in self._found:
            try:
                self._found[file.name] = Bears(float(json.loads(file.read_text())))
            except (OSError, ValueError, TypeError):
                return None
        return self._found[file.name]

    def _file(self, device: Simulated) -> Path:
        """Named by everything the figure depends on."""
        digest = hashlib.sha256(f"{self._fit}|{device}".encode()).hexdigest()[:12]
        return self._cache / f"bearable-{digest}.json"
