"""The battery's long run, against worked values of arXiv:2408.15907's model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from edged_plugins.energy._semi_markov import (
    Harvester,
    Mode,
    _stationary,
    _transitions,
    bearable,
    even_law,
    fit,
    long_run,
)

KILOJOULES = tuple([1 / 21] * 21)  # 0 to 20 kJ a slot, evenly
ORIN_15, ORIN_30, ORIN_60 = Mode(3, 26), Mode(2, 22), Mode(1, 23)
TINY = Harvester(4, 1, 2, (0.5, 0.5), ((0.0, Mode(1, 2)),))


def orin(*modes: tuple[float, Mode]) -> Harvester:
    return Harvester(100, 10, 20, KILOJOULES, modes)


def test_the_small_chain_has_its_known_figures():
    found = long_run(TINY, 0.5, limit=1)
    assert found.risk == pytest.approx(0.434286, abs=1e-6)
    assert found.saving == pytest.approx(0.497143, abs=1e-6)
    assert found.jobs_per_slot == pytest.approx(0.251429, abs=1e-6)
    assert found.energy == pytest.approx(1.765714, abs=1e-6)


@pytest.mark.parametrize(
    ("arrival", "risk"), [(0.2, 0.0003), (0.3, 0.0054), (0.33, 0.0101), (0.4, 0.0335), (0.5, 0.0990)]
)
def test_the_risk_at_60_watts_is_as_computed_before(arrival, risk):
    assert long_run(orin((0.0, ORIN_60)), arrival).risk == pytest.approx(risk, abs=6e-5)


def test_time_in_saving_is_more_than_time_at_risk():
    found = long_run(orin((0.0, ORIN_60)), 0.33)
    assert found.saving == pytest.approx(0.0153, abs=6e-5)
    assert found.saving > found.risk


@pytest.mark.parametrize(("mode", "rate"), [(ORIN_15, 1 / 3), (ORIN_30, 1 / 2), (ORIN_60, 0.329)])
def test_the_arrival_rate_that_a_fixed_mode_bears(mode, rate):
    assert bearable(orin((0.0, mode)), 0.01) == pytest.approx(rate, abs=6e-4)


def test_the_dynamic_mode_is_bound_by_time_before_energy():
    rate = bearable(orin((0.0, ORIN_15), (0.4, ORIN_30), (0.6, ORIN_60)), 0.01)
    assert rate == pytest.approx(0.43, abs=5e-3)


@pytest.mark.parametrize("device", [TINY, orin((0.0, ORIN_15), (0.4, ORIN_30), (0.6, ORIN_60))])
@pytest.mark.parametrize("arrival", [0.0, 0.3, 1.0])
def test_every_state_goes_somewhere(device, arrival):
    assert np.allclose(_transitions(device, arrival).sum(axis=1), 1)


def test_risk_never_falls_with_more_arrivals():
    risks = [long_run(orin((0.0, ORIN_60)), arrival).risk for arrival in np.linspace(0, 1, 21)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(risks))


@pytest.mark.parametrize("arrival", [0.05, 0.2, 0.33])
def test_no_more_energy_is_spent_than_harvested(arrival):
    """But for what a job takes from an empty battery, which the model forgives."""
    device = orin((0.0, ORIN_60))
    assert long_run(device, arrival).jobs_per_slot * 23 <= 10 * (1 + 1e-3)


@pytest.mark.parametrize("cost", [0.3, 0.8, 1.5])
def test_a_job_of_parts_of_a_unit_costs_them_on_the_mean(cost):
    """What comes in is spent, but for what overflows from a full battery."""
    device = Harvester(100, 10, 20, even_law(0, 0.4), ((0.0, Mode(1, cost)),))
    spent = long_run(device, bearable(device, 0.01)).jobs_per_slot * cost
    assert 0.9 * 0.2 <= spent <= 0.2 * (1 + 1e-3)


@pytest.mark.parametrize("arrival", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("device", [TINY, orin((0.0, ORIN_15), (0.4, ORIN_30), (0.6, ORIN_60))])
def test_energy_is_spent_harvested_lost_at_a_full_battery_or_forgiven_at_an_empty_one(device, arrival):
    """An exact balance of the long run, over the chain's own law, all in units a stage."""
    size = device.capacity + 1
    law = _stationary(_transitions(device, arrival)).reshape(2, 2, size)
    harvested = spent = lost = forgiven = 0.0
    for busy, active, energy in itertools.product((0, 1), (0, 1), range(size)):
        mode = device.mode(energy) if busy and active else Mode(1, 0)
        gains = np.array([1.0])
        for _ in range(mode.slots):
            gains = np.convolve(gains, device.harvest)
        here = law[busy, active, energy]
        reached = energy + np.arange(len(gains)) - mode.energy
        harvested += here * (gains @ np.arange(len(gains)))
        spent += here * mode.energy
        lost += here * (gains @ (reached - device.capacity).clip(0))
        forgiven += here * (gains @ (-reached).clip(0))
    assert spent - forgiven == pytest.approx(harvested - lost)
    assert spent > 0


def test_the_small_chain_spends_what_it_harvests_but_for_what_is_clipped():
    spent = long_run(TINY, 0.5).jobs_per_slot * 2
    assert spent == pytest.approx(0.502857, abs=1e-6)
    assert spent <= 0.5 * 1.01


@pytest.mark.parametrize("arrival", [-0.1, 1.1, float("nan")])
def test_an_arrival_rate_that_is_no_probability_is_refused(arrival):
    with pytest.raises(ValueError, match="arrival probability"):
        long_run(TINY, arrival)


@pytest.mark.parametrize(("low", "high"), [(0, 20), (0.3, 0.4), (2, 2), (0, 0.01), (1.7, 5.2)])
def test_an_even_law_in_units_keeps_its_mean(low, high):
    law = even_law(low, high)
    assert sum(law) == pytest.approx(1)
    assert sum(units * p for units, p in enumerate(law)) == pytest.approx((low + high) / 2, abs=1e-5)


def described(**changes):
    battery = {
        "name": "b",
        "capacity_joules": 100e3,
        "reserve": 0.1,
        "resume": 0.2,
        "harvest_joules": (0, 20e3),
        "idle_joules": 0.0,
        "is_solar": False,
        "modes": ({"slots": 1, "joules": 23e3, "above": 0.0},),
    }
    return battery | changes


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({}, 0.31, 0.35),
        ({"is_solar": True}, 0.05, 0.15),
        ({"harvest_joules": (0, 400), "is_solar": True, "idle_joules": 50}, 1e-4, 0.01),
        ({"harvest_joules": (0, 0)}, 0.0, 0.0),
        ({"capacity_joules": 0.0}, 1.0, 1.0),
    ],
    ids=["as published", "by the sun", "in the shade", "never filled", "on mains"],
)
def test_a_described_battery_bears_what_fills_it(changes, least, most):
    assert least <= fit([described(**changes)])["b"] <= most
