"""Simulated scheduling: accounting, determinism, bad scenarios, and the policies' order."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from edged_plugins import energy
from edged_plugins.energy._semi_markov import Harvester, Mode, bearable

from edged import ConfigError
from edged.scenario import PowerMode, Scenario, Simulated
from edged.simulation import run

MODES = (PowerMode(3, 26e3), PowerMode(2, 22e3, 0.4), PowerMode(1, 23e3, 0.6))
MEANS = (2, 5, 8)  # kJ a slot
POLICIES = {policy.name: policy for policy in energy.edged_policies({})}


def orin(group, mean):
    return Simulated(
        f"{group}-{mean}",
        MODES,
        group=group,
        capacity_joules=100e3,
        harvest_joules=(0.0, 2e3 * mean),
    )


def field_of_nine(arrival, runs=30):
    devices = tuple(orin(group, mean) for group in "abc" for mean in MEANS)
    return Scenario("nine", devices, arrival, slots=100, runs=runs)


@pytest.fixture(scope="module")
def rates():
    found = {}
    for mean in MEANS:
        law = (1 / (2 * mean + 1),) * (2 * mean + 1)
        modes = tuple((mode.above, Mode(mode.slots, round(mode.joules / 1e3))) for mode in MODES)
        rate = bearable(Harvester(100, 10, 20, law, modes), 0.01)
        found |= {f"{group}-{mean}": rate for group in "abc"}
    return found


def test_one_seed_gives_one_result(rates):
    once = run(field_of_nine(0.5, 3), POLICIES["adaptive"], 7, rates)
    again = run(field_of_nine(0.5, 3), POLICIES["adaptive"], 7, rates)
    other = run(field_of_nine(0.5, 3), POLICIES["adaptive"], 8, rates)
    assert once == again
    assert once != other


@pytest.mark.parametrize("name", POLICIES)
def test_energy_is_accounted_for(name, rates):
    """What is spent was in the batteries, was harvested, or was forgiven at an empty one."""
    found = run(field_of_nine(0.7, 5), POLICIES[name], 1, rates)
    least = min(mode.joules for mode in MODES)
    assert found.joules >= (found.jobs_done - 5 * 9) * 3 * least
    assert found.jobs_done + found.dropped <= 5 * 100
    assert 0 <= found.downtime <= 1
    assert 0 <= found.mean_battery <= 1


def results(name, arrival, rates, seeds, runs):
    return [run(field_of_nine(arrival, runs), POLICIES[name], seed, rates) for seed in range(seeds)]


def interval(values):
    """Mean and its 95 % bounds."""
    mean = statistics.mean(values)
    half = 2.1 * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean, mean + half


@pytest.fixture(scope="module")
def busiest(rates):
    return {name: results(name, 0.7, rates, 6, 25) for name in ("uniform", "long-term", "adaptive")}


@pytest.mark.parametrize("measure", ["downtime", "dropped"])
def test_uniform_is_down_longest_and_drops_most_then_long_term_then_adaptive(busiest, measure):
    found = {name: interval([getattr(one, measure) for one in each]) for name, each in busiest.items()}
    assert found["uniform"][0] > found["long-term"][2]
    if measure == "downtime":
        assert found["long-term"][0] > found["adaptive"][2]
    else:
        assert found["long-term"][1] > found["adaptive"][1]


@pytest.mark.parametrize("arrival", [0.5, 0.3])
def test_uniform_is_down_longest_with_fewer_jobs_too(rates, arrival):
    """Both others hardly ever are; the better of them is not reversed beyond its interval."""
    names = ("uniform", "long-term", "adaptive")
    found = {n: interval([one.downtime for one in results(n, arrival, rates, 4, 12)]) for n in names}
    assert found["uniform"][0] > max(found["long-term"][2], found["adaptive"][2])
    assert found["adaptive"][0] <= found["long-term"][2]


def test_balanced_batteries_last_longer():
    """Until the first is empty: shares by battery against shares by speed."""
    kinds = [
        Simulated(
            f"phone-{percent}",
            (PowerMode(1, 2e3),),
            capacity_joules=50e3,
            start=percent / 100,
            reserve=0.0,
            resume=0.0,
        )
        for percent in (90, 60, 30)
    ]
    scenario = Scenario("phones", tuple(kinds), 1.0, slots=400, sharing="all", runs=3)
    by_speed = run(scenario, POLICIES["uniform"], 1)
    balanced = run(scenario, energy.edged_policies({"reserve": 0.0})[3], 1)
    for before, after in zip(by_speed.first_dead_slots, balanced.first_dead_slots, strict=True):
        assert after >= 1.3 * before


def test_a_bandit_s_regret_grows_slower_than_a_root():
    places = tuple(
        Simulated(name, (PowerMode(1, joules),), joules_noise=0.3)
        for name, joules in (("edge", 80.0), ("desk", 100.0), ("cloud", 120.0))
    )
    scenario = Scenario("places", places, 1.0, slots=20_000)
    fresh = next(policy for policy in energy.edged_policies({}) if policy.name == "bandit")
    found = run(scenario, fresh, 3)
    by_jobs = dict(found.regret)
    assert by_jobs[1024] / 1024**0.5 > by_jobs[16384] / 16384**0.5


def test_a_device_that_fails_gives_its_job_to_another():
    kind = dataclasses.replace(orin("a", 8), failure=0.05, repair_slots=3, count=4)
    found = run(Scenario("failing", (kind,), 0.5, slots=400), POLICIES["uniform"], 2)
    assert found.moved > 0


NOBODY = dataclasses.replace(orin("a", 2), count=0)


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (Scenario("s", (), 0.5, 10), "at least one device"),
        (Scenario("s", (NOBODY,), 0.5, 10), "at least one device"),
        (Scenario("s", (orin("a", 2),), 1.5, 10), "arrival from 0 to 1"),
        (Scenario("s", (orin("a", 2),), 0.5, 0), "slots from 1"),
        (Scenario("s", (dataclasses.replace(orin("a", 2), modes=()),), 0.5, 10), "power mode"),
        (Scenario("s", (dataclasses.replace(orin("a", 2), reserve=0.5),), 0.5, 10), "reserve up to resume"),
        (Scenario("s", (dataclasses.replace(orin("a", 2), harvest_joules=(3.0, 1.0)),), 0.5, 10), "harvest"),
        (Scenario("s", (orin("a", 2),), 0.5, 10, sharing="some"), "sharing"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(scenario, said):
    with pytest.raises(ConfigError, match=said):
        run(scenario, POLICIES["uniform"], 1)
