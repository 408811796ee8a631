"""The integral of power: against numpy, with gaps, nonsense, several roles, two idle draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.metering import COVERED, GAP_S, JOB_S, QUIET_READINGS, Meter, spent
from edged.types import WATTS_MAX, Metered

IDLE = 4.0
NONSENSE = (None, -1.0, math.nan, math.inf, WATTS_MAX + 1)


def metered(readings: Sequence[tuple[float, float | None]], idle: float | None = IDLE) -> Metered:
    """Of one role that computes without pause."""
    meter = Meter(idle)
    for at, watts in readings:
        meter.hear(at, watts, "s", {"role": at})
    found = meter.of("role", readings[-1][0])
    assert found is not None
    return found


steps = st.lists(st.tuples(st.floats(0.05, GAP_S - 0.01), st.floats(0, 60)), min_size=2, max_size=40)


@given(steps)
def test_energy_is_the_trapezoid_over_readings_less_the_idle_draw(
    steps: list[tuple[float, float]],
) -> None:
    at, watts = np.cumsum([step for step, _ in steps]), np.array([watts for _, watts in steps])
    found = metered(list(zip(at.tolist(), watts.tolist(), strict=True)))
    assert found.joules == pytest.approx(np.trapezoid(watts - IDLE, at), abs=1e-6)
    assert found.metered_s == pytest.approx(found.elapsed_s) == pytest.approx(at[-1] - at[0])


@given(steps, st.lists(st.tuples(st.integers(0, 39), st.sampled_from(NONSENSE)), max_size=8))
def test_nonsense_is_left_out_as_if_it_had_not_been_read(
    steps: list[tuple[float, float]], strewn: list[tuple[int, float | None]]
) -> None:
    at = list(itertools.accumulate(step for step, _ in steps))
    sound: list[tuple[float, float | None]] = [(a, w) for a, (_, w) in zip(at, steps, strict=True)]
    extra = [(at[n], nonsense) for n, nonsense in strewn if n < len(at) - 1]
    mixed = sorted(sound[1:] + extra, key=lambda reading: reading[0])
    assert metered([sound[0], *mixed]) == metered(sound)


def test_a_gap_breaks_the_integral_and_is_not_bridged() -> None:
    found = metered([(0, 10.0), (1, 10.0), (2 + GAP_S, 10.0), (3 + GAP_S, 10.0)])
    assert found == Metered(2 * (10.0 - IDLE), 2.0, 3 + GAP_S)


def test_a_sensor_that_fell_silent_leaves_the_rest_unmetered() -> None:
    found = metered([(0, 10.0), (1, 10.0), (2, None), (3, None)])
    assert found == Metered(10.0 - IDLE, 1.0, 3.0)


def test_another_sensor_begins_another_integral() -> None:
    """What the battery gives is of the whole device, what counters say of its processor."""
    meter = Meter(IDLE)
    for at, source in enumerate(("battery", "battery", "rapl", "rapl")):
        meter.hear(at, 10.0, source, {"role": float(at)})
    assert meter.of("role", 3) == Metered(2 * (10.0 - IDLE), 2.0, 3.0)


# --- the idle draw --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "quiet", "idle"),
    [
        (4.0, (), 4.0),
        (4.0, (9.0, 9.0, 9.0), 4.0),  # something else ran
        (4.0, (3.0, 3.0, 50.0), 3.0),  # the sensor sees a part of the device
        (None, (5.0, 3.0, 4.0), 4.0),
        (None, (), None),
        (None, (-1.0, math.nan), None),
    ],
)
def test_the_idle_draw_is_the_lesser_of_what_the_profile_and_a_quiet_time_say(
    said: float | None, quiet: Sequence[float], idle: float | None
) -> None:
    meter = Meter(said)
    for watts in quiet:
        meter.quiet(watts, "s")
    assert meter.idle_watts == idle


def test_without_an_idle_draw_nothing_is_metered() -> None:
    assert metered([(0, 10.0), (1, 10.0)], idle=None) == Metered(0.0, 0.0, 1.0)


def test_a_loaded_role_that_rests_says_the_idle_draw_and_spends_nothing() -> None:
    meter = Meter()
    for at, (watts, busy) in enumerate([(3.0, 0.0), (3.0, 0.0), (9.0, 1.0), (3.0, 1.0)]):
        meter.hear(at, watts, "s", {"role": busy})
    assert meter.idle_watts == 3.0
    found = meter.of("role", 3)
    assert found is not None
    assert found.joules == pytest.approx((3.0 + 9.0) / 2 - 3.0)


def test_readings_beside_a_role_are_no_quiet_time() -> None:
    meter = Meter()
    meter.hear(0, 20.0, "s", {"role": 0.0})
    meter.quiet(20.0, "s")
    assert meter.idle_watts is None


def test_an_old_quiet_time_is_forgotten() -> None:
    meter = Meter()
    for watts in (*[30.0] * QUIET_READINGS, *[5.0] * QUIET_READINGS):
        meter.quiet(watts, "s")
    assert meter.idle_watts == 5.0


# --- several roles --------------------------------------------------------------------------------


def test_roles_share_the_energy_by_how_long_each_computed() -> None:
    meter = Meter(IDLE)
    for at in range(5):
        meter.hear(at, 14.0, "s", {"a": 0.75 * at, "b": 0.25 * at, "idle": 7.0})
    found = {role: meter.of(role, 4) for role in ("a", "b", "idle")}
    assert {role: each and each.joules for role, each in found.items()} == {"a": 30.0, "b": 10.0, "idle": 0.0}
    assert all(each and each.metered_s == 4.0 for each in found.values())


def test_beside_a_role_that_does_not_say_what_it_computed_nothing_is_metered() -> None:
    meter = Meter(IDLE)
    for at in range(3):
        meter.hear(at, 14.0, "s", {"a": float(at), "b": None})
    assert meter.of("a", 2) == Metered(0.0, 0.0, 2.0)
    for at in range(3, 6):
        meter.hear(at, 14.0, "s", {"b": None})  # alone it has all of it
    assert meter.of("b", 5) == Metered(30.0, 3.0, 5.0)
    assert meter.of("a", 5) is None


# --- a job ----------------------------------------------------------------------------------------

BEGUN = Metered(100.0, 50.0, 80.0)  # there was a gap once, before the job


def later(joules: float, metered_s: float, elapsed_s: float) -> Metered:
    return Metered(BEGUN.joules + joules, BEGUN.metered_s + metered_s, BEGUN.elapsed_s + elapsed_s)


@pytest.mark.parametrize(
    ("after", "joules"),
    [
        (later(60.0, 10.0, 10.0), 60.0),
        (later(60.0, 10.0 * COVERED, 10.0), 60.0),
        (later(60.0, 9.0, 10.0), None),  # a gap within the job
        (later(60.0, 12.0, 10.0), None),  # energy from before it
        (later(6.0, JOB_S / 2, JOB_S / 2), None),
        (later(-0.5, 10.0, 10.0), 0.0),  # as idle as it gets
        (later(-1e9, 10.0, 10.0), None),
        (later(1e9, 10.0, 10.0), None),
        (later(math.nan, 10.0, 10.0), None),
        (later(60.0, math.nan, math.nan), None),
        (Metered(0.0, 0.0, 0.0), None),  # another role of the same name
        (None, None),
    ],
)
def test_a_job_is_measured_where_the_meter_saw_all_of_it(after: Metered | None, joules: float | None) -> None:
    assert spent(BEGUN, after) == joules
    assert spent(None, after) is None


@pytest.mark.parametrize("batch_s", [0.5, 2.5, 7.0, 60.0])
def test_a_batch_that_is_longer_than_the_time_between_readings_has_all_its_energy(batch_s: float) -> None:
    """Idle at 2 W for 20 s, then batches one after the other at 10 W, then idle again; a reading a second."""
    meter = Meter(idle_watts=3.0)
    batches, idle_s = 3, 20
    work_s = batches * batch_s
    end = idle_s + math.ceil(work_s) + idle_s
    for second in range(end + 1):
        ended = min(batches, max(0, int((second - idle_s) / batch_s)))
        is_working = idle_s < second <= idle_s + work_s
        meter.hear(float(second), 10.0 if is_working else 2.0, "s", {"r": ended * batch_s})
    found = meter.of("r", float(end))
    assert found is not None
    assert meter.idle_watts == 2.0
    assert found.joules == pytest.approx(8.0 * work_s, abs=16.0)  # two readings at the edges
    assert found.metered_s == pytest.approx(end)
