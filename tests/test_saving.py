"""When a node takes no new work: levels apart, jumps ignored, unknown sensors without a say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.saving import Levels, Saving
from edged.types import Battery, DeviceState

LEVELS = Levels(0.2, 0.3, 80.0, yields=True)


def on_battery(percent: float | None, plugged: bool | None = False) -> DeviceState:
    return DeviceState(battery=Battery(percent, bool(plugged), plugged))


def hot(celsius: float, is_throttled: bool | None = None) -> DeviceState:
    return DeviceState(temperature_celsius=celsius, is_throttled=is_throttled)


def heard(*states: DeviceState) -> list[bool]:
    saving = Saving(LEVELS)
    return [bool(saving.update(state)) for state in states]


@pytest.mark.parametrize(
    ("states", "verdicts"),
    [
        ([on_battery(p) for p in (50, 19, 18, 25, 29, 31, 32)], [0, 0, 1, 1, 1, 1, 0]),
        ([on_battery(p) for p in (50, 2, 50, 49)], [0, 0, 0, 0]),
        ([on_battery(19), on_battery(19), on_battery(19, True), on_battery(19, True)], [0, 1, 1, 0]),
        ([on_battery(19, True)] * 3, [0, 0, 0]),
        ([on_battery(19), on_battery(None), on_battery(19), on_battery(19)], [0, 0, 0, 1]),
        ([DeviceState()] * 3, [0, 0, 0]),
        ([hot(c) for c in (79, 80, 81, 75, 71, 70, 69, 69)], [0, 0, 1, 1, 1, 1, 1, 0]),
        ([hot(50, True), hot(50, True), hot(50, False), hot(50, False)], [0, 1, 1, 0]),
        ([DeviceState(in_use=True)] * 2 + [DeviceState(in_use=False)] * 2, [0, 1, 1, 0]),
    ],
    ids=[
        "down and up",
        "a jump",
        "a charger",
        "plugged",
        "a gap",
        "no sensors",
        "heat",
        "throttled",
        "owner",
    ],
)
def test_work_stops_and_starts_at_different_levels(states: list[DeviceState], verdicts: list[int]) -> None:
    assert heard(*states) == [bool(verdict) for verdict in verdicts]


def test_the_owner_has_no_say_where_the_profile_gives_none() -> None:
    saving = Saving(Levels(0.2, 0.3))
    assert [saving.update(DeviceState(in_use=True)) for _ in range(3)] == [""] * 3


def test_every_cause_is_named() -> None:
    saving = Saving(LEVELS)
    for _ in range(2):
        said = saving.update(
            DeviceState(battery=Battery(5.0, False, False), temperature_celsius=95, in_use=True)
        )
    assert said.split("; ") == [
        "its battery is below its reserve, until 30 % or a charger",
        "it is too hot, or its supply too weak",
        "its owner is using it",
    ]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=40))
def test_a_verdict_never_changes_twice_within_two_readings(percents: list[float]) -> None:
    verdicts = heard(*(on_battery(percent) for percent in percents))
    for before, at, after in zip(verdicts, verdicts[1:], verdicts[2:], strict=False):
        assert not (before != at != after)
