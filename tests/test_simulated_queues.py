"""Jobs that wait, in simulation: queueing theory, accounting, and what owners and failures do to a queue."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter

import pytest

from edged import ConfigError
from edged.planning import CORE_POLICIES
from edged.scenario import QUEUES, PowerMode, Scenario, Simulated
from edged.simulation import mean, percentile, run

LATENCY = CORE_POLICIES[0]
WAITING = [queue for queue in QUEUES if queue != "drop"]
UNLIKE = {"prompts": ((1, 0.8), (6, 0.2)), "lengths": ((1, 0.8), (12, 0.2))}


def server(slots=1, **changes):
    return Simulated("server", (PowerMode(slots, 10.0),), **changes)


def one_server(queue, arrival=0.2, slots=4000, **changes):
    return Scenario("one server", (server(),), arrival, slots, queue=queue, queue_max=500, **changes)


@pytest.mark.parametrize("slots", [1, 5, 20])
def test_waiting_for_one_server_is_as_the_queue_with_chance_arrivals_and_fixed_service_has_it(slots):
    """Geo/D/1: p D (D - 1) / 2 (1 - p D) slots in the mean, at half of what the server can do."""
    arrival = 0.5 / slots
    scenario = Scenario(
        "queue", (server(slots),), arrival, slots=10_000 * slots, queue="fcfs", queue_max=1000
    )
    waited = mean(run(scenario, LATENCY, 1).waits)
    assert waited == pytest.approx(arrival * slots * (slots - 1) / 2 / (1 - arrival * slots), rel=0.1)


def test_time_to_the_first_token_is_as_the_queue_with_poisson_arrivals_has_it():
    """M/D/1: D + R D^2 / 2 (1 - R D) is 0.15 s for prefill of 0.1 s and 5 jobs a second; the limit of many
    short slots."""
    D, R, slot_s = 0.1, 5.0, 0.005
    scenario = Scenario(
        "prefill", (server(20),), R * slot_s, slots=160_000, slot_s=slot_s, queue="fcfs", queue_max=1000
    )
    expected = D + R * D**2 / (2 * (1 - R * D))
    assert expected == pytest.approx(0.15)
    assert mean(run(scenario, LATENCY, 1).turnarounds) * slot_s == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("sharing", ["one", "all"])
@pytest.mark.parametrize("queue", QUEUES)
def test_every_job_is_done_or_dropped_or_waits(queue, sharing):
    devices = tuple(
        dataclasses.replace(server(2, count=2, failure=0.02, repair_slots=5, owner_use=0.05), name=n, group=n)
        for n in "ab"
    )
    scenario = Scenario("s", devices, 1.0, 300, runs=3, sharing=sharing, queue=queue, queue_max=7, **UNLIKE)
    found = run(scenario, LATENCY, 4)
    assert found.jobs_done + found.dropped + found.waiting == 3 * 300
    assert found.jobs_done > 0
    assert found.dropped > 0
    assert 0 <= found.jobs_done - found.waits.total() <= 3 * 4
    room = 7 if queue != "drop" else 0
    assert max(found.curves["waiting"]) <= room + 4  # who was let in, and whose device is away


def test_one_server_is_busy_at_the_same_times_whatever_the_discipline():
    runs = [run(one_server(queue, **UNLIKE), LATENCY, 5) for queue in WAITING]
    assert max(runs[0].curves["waiting"]) > 3
    for other in runs[1:]:
        assert other.curves["busy"] == runs[0].curves["busy"]
        assert other.jobs_done + other.waiting == runs[0].jobs_done + runs[0].waiting


@pytest.mark.parametrize(
    ("prompts", "lengths", "arrival", "quicker", "slower"),
    [
        (((1, 1.0),), ((2, 0.9), (40, 0.1)), 0.12, "mlfq", "fcfs"),
        (((1, 1.0),), ((2, 0.9), (40, 0.1)), 0.12, "skip-join", "fcfs"),
        (*UNLIKE.values(), 0.17, "skip-join", "mlfq"),
        (*UNLIKE.values(), 0.17, "skip-join", "fcfs"),
    ],
    ids=["unlike answers", "unlike answers, skipping", "long prompts", "long prompts, against fcfs"],
)
def test_short_jobs_overtake_long_ones(prompts, lengths, arrival, quicker, slower):
    """Beside answers of unlike length falling priority helps; beside long prompts, only where they skip."""
    work = {"prompts": prompts, "lengths": lengths}
    quick, slow = (run(one_server(queue, arrival, 10_000, **work), LATENCY, 5) for queue in (quicker, slower))
    assert mean(quick.turnarounds) < 0.85 * mean(slow.turnarounds)


def test_jobs_of_one_length_wait_alike_under_every_discipline():
    runs = [run(one_server(queue, 0.7, 2000), LATENCY, 6) for queue in WAITING]
    assert runs[0].waits == runs[1].waits == runs[2].waits


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_queue_drops_who_comes(room):
    """A job a slot, and a server that takes three: one in three is served. Behind three, one waits nine."""
    scenario = Scenario("s", (server(3),), 1.0, 90, queue="fcfs", queue_max=room)
    found = run(scenario, LATENCY, 1)
    assert (found.jobs_done, found.waiting, found.dropped) == (30, room, 60 - room)
    assert percentile(found.waits, 1.0) == 3 * room


@pytest.mark.parametrize("queue", WAITING)
@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_full_queue_stops_no_service(queue, room):
    """A job of three iterations a slot: the server is never idle, so it ends one in three slots."""
    scenario = Scenario("s", (server(),), 1.0, 300, queue=queue, queue_max=room, lengths=((3, 1.0),))
    found = run(scenario, LATENCY, 1)
    iterations = 3 * found.jobs_done
    assert 300 - 3 * (room + 2) <= iterations <= 300


@pytest.mark.parametrize("queue", WAITING)
def test_a_job_that_nothing_disturbs_stays_where_it_began(queue):
    scenario = Scenario("s", (server(count=40),), 0.5, 500, queue=queue, lengths=((8, 1.0),))
    found = run(scenario, LATENCY, 3)
    assert found.moved == 0
    assert set(found.turnarounds) == {8}
    assert set(found.waits) == {0}


@pytest.mark.parametrize("queue", WAITING)
def test_a_failure_loses_no_job_where_jobs_wait(queue):
    devices = (server(2, count=3, failure=0.05, repair_slots=5),)
    scenario = Scenario("s", devices, 0.2, 3000, queue=queue, queue_max=1000, lengths=((3, 1.0),))
    found = run(scenario, LATENCY, 3)
    assert found.dropped == 0
    assert found.moved > 0
    assert found.jobs_done > 500


@pytest.mark.parametrize(
    ("changes", "curve"),
    [({"owner_use": 0.05, "owner_slots": 10}, "in use"), ({"failure": 0.05, "repair_slots": 10}, "failed")],
)
def test_a_device_is_away_for_its_part_of_the_time(changes, curve):
    """So long in the mean: 10 slots of 10 + 1 / 0.05."""
    scenario = Scenario("s", (server(count=200, **changes),), 0.0, 400)
    away = run(scenario, LATENCY, 1).curves[curve]
    assert statistics.mean(away[100:]) / 200 == pytest.approx(1 / 3, rel=0.05)


def test_a_device_in_use_takes_no_job_and_ends_the_one_it_has():
    scenario = Scenario("s", (server(5, owner_use=1.0, owner_slots=1000),), 1.0, 20, queue="fcfs")
    assert run(scenario, LATENCY, 1).jobs_done == 0
    later = dataclasses.replace(scenario, devices=(server(5, owner_use=0.2, owner_slots=1000),), slots=200)
    found = run(later, LATENCY, 2)
    assert found.jobs_done >= 1
    assert found.waiting == 64


@pytest.mark.parametrize("queue", QUEUES)
def test_one_seed_gives_one_result_with_every_queue(queue):
    scenario = one_server(queue, slots=500, **UNLIKE)
    assert run(scenario, LATENCY, 7) == run(scenario, LATENCY, 7)
    assert run(scenario, LATENCY, 7) != run(scenario, LATENCY, 8)


@pytest.mark.parametrize(
    ("counts", "part", "middle", "value"),
    [
        ({}, 0.95, None, None),
        ({0: 1}, 0.95, 0, 0),
        ({0: 19, 100: 1}, 0.95, 5, 0),
        ({0: 18, 100: 2}, 0.95, 10, 100),
        ({3: 1, 1: 1, 2: 2}, 0.5, 2, 2),
        ({3: 1, 1: 1, 2: 2}, 1.0, 2, 3),
    ],
)
def test_means_and_percentiles_are_of_all_that_were_counted(counts, part, middle, value):
    assert mean(Counter(counts)) == middle
    assert percentile(Counter(counts), part) == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queue": "lifo"}, "queue of drop, fcfs, mlfq, skip-join"),
        ({"queue_max": -1}, "queue_max from 0"),
        ({"starve_slots": 0}, "starve_slots of 1 or more.*; 0 came"),
        ({"lengths": ()}, "lengths as pairs"),
        ({"lengths": ((1, 0.5),)}, "add up to 1"),
        ({"lengths": ((0, 1.0),)}, "number from 1"),
        ({"prompts": ((1, 1.5), (2, -0.5))}, "prompts as pairs"),
        ({"slot_s": float("inf")}, "slot_s above 0"),
        ({"arrival": float("nan")}, "arrival from 0 to 1"),
        ({"devices": (server(owner_use=2.0),)}, "owner_use from 0 to 1"),
        ({"devices": (server(owner_slots=0),)}, "owner_slots of 1 or more"),
        ({"devices": (server(repair_slots=-1),)}, "repair_slots of 0 or more"),
        ({"devices": (server(count=-2),)}, "count of 0 or more.*-2 came"),
        ({"devices": (server(count=-2), server(count=5))}, "count of 0 or more"),
        ({"devices": (server(count=10**9),)}, "at most 100000 devices"),
        ({"devices": (server(), server())}, "another name for each"),
        ({"devices": (server(capacity_joules=float("inf")),)}, "capacity_joules"),
    ],
)
def test_a_scenario_whose_queue_or_devices_make_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        run(dataclasses.replace(one_server("fcfs"), **changes), LATENCY, 1)
