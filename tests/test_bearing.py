"""What a node's own battery bears: its bands, its description, and a figure computed once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from edged_plugins import energy

from edged import bearing
from edged.bearing import Bearing, Bears
from edged.config import Device as Facts
from edged.config import Energy, Profile
from edged.device import Device
from edged.scenario import PowerMode
from edged.supervisor import Supervisor
from edged.types import Battery, DeviceState, SensorEntry

WATTS = Facts(idle_watts=0.0, load_watts=230.0)
SOURCE = Energy(reserve=0.1, resume=0.2, harvest_watts=(0.0, 200.0))  # 0 to 20 kJ in 100 s
FULL = Battery(80.0, False, False, capacity_joules=100e3)


def profile(energy: Energy = SOURCE, facts: Facts = WATTS) -> Profile:
    return Profile(energy=energy, device=facts)


def make(cache: Path, profile: Profile, battery: Battery | None, fit: str = energy.FIT) -> Bearing:
    supervisor = Supervisor()
    sensor = SensorEntry("recorded", lambda: DeviceState(battery=battery))
    device = Device(profile, cache, {"recorded": sensor}, {}, supervisor)
    return Bearing(profile, cache, device, supervisor, fit)


@pytest.mark.parametrize(
    ("battery", "mode"),
    [
        (None, None),
        (Battery(None, False, False), None),
        (Battery(0.0, False, False), 1),
        (Battery(39.9, False, False), 1),
        (Battery(40.0, False, False), 2),
        (Battery(59.9, None, None), 2),
        (Battery(60.0, False, None), 3),
        (Battery(100.0, False, False), 3),
        (Battery(10.0, False, True), None),
        (Battery(10.0, True, None), None),
    ],
)
def test_the_power_mode_is_the_band_of_a_battery_in_use(battery: Battery | None, mode: int | None) -> None:
    assert bearing.power_mode(battery) == mode


@pytest.mark.parametrize(
    ("profile", "battery", "says"),
    [
        (profile(), None, 1.0),
        (profile(), Battery(5.0, False, True), 1.0),
        (profile(), Battery(5.0, True, None), 1.0),
        (profile(Energy()), FULL, None),
        (profile(), Battery(50.0, False, False), "battery's capacity; write device.battery_wh"),
        (profile(facts=Facts(0.0, 230.0, 28.0)), None, "still being computed"),
        (profile(), FULL, "still being computed"),
    ],
    ids=["no battery", "plugged", "charging", "no harvest", "no capacity", "no sensor", "not yet"],
)
def test_what_needs_no_computing_is_known_at_once(
    profile: Profile, battery: Battery | None, says: float | str | None, tmp_path: Path
) -> None:
    read = make(tmp_path, profile, battery).read(battery)
    if isinstance(says, str):
        assert read.jobs is None
        assert says in read.unfitted
    else:
        assert read == Bears(says)


def test_a_node_is_described_in_slots_by_its_profile_and_its_sensor() -> None:
    facts = Facts(idle_watts=2.0, load_watts=9.0, battery_wh=10.0)
    said = profile(Energy(harvest_watts=(1.0, 5.0), is_solar=True), facts)
    found = bearing.described(said, Battery(50.0, False, False, capacity_joules=54_321.0))
    assert found is not None
    assert found.capacity_joules == 54_000
    assert (found.harvest_joules, found.idle_joules, found.is_solar) == ((100, 500), 200, True)
    assert found.modes == (PowerMode(1, 700),)
    assert (found.reserve, found.resume) == (0.2, 0.3)
    without = bearing.described(said, Battery(50.0))
    assert without is not None
    assert without.capacity_joules == 36_000


def test_the_figure_is_that_of_the_source_and_is_kept(tmp_path: Path) -> None:
    first = make(tmp_path, profile(), FULL)
    asyncio.run(first.ensure())
    jobs = first.read(FULL).jobs
    assert jobs == pytest.approx(0.329, abs=5e-3)  # arXiv:2408.15907, 60 W; its harvest is in whole kJ
    again = make(tmp_path, profile(), FULL)
    assert again.read(FULL).jobs == jobs
    assert again.read(Battery(80.0, True, True, capacity_joules=100e3)) == Bears(1.0)
    (file,) = tmp_path.glob("bearable-*.json")
    assert json.loads(file.read_text()) == jobs
    file.write_text("?")
    assert make(tmp_path, profile(), FULL).read(FULL).jobs is None


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        ("no_such_library:fit", "cannot be computed there: expected no_such_library:fit"),
        ("json:dumps", "cannot be computed there"),
        ("", "no plugin that computes"),
    ],
)
def test_a_figure_that_cannot_be_computed_says_why(fit: str, says: str, tmp_path: Path) -> None:
    made = make(tmp_path, profile(), FULL, fit)
    asyncio.run(made.ensure())
    assert made.read(FULL).jobs is None
    assert says in made.read(FULL).unfitted
