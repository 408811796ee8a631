"""Who takes part in a round, and how long it is waited for."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from edged_plugins._rounds.cohort import NOT_DRAWN, Entrant, Rules, Waiting, choose, unable

from edged import Battery, ConfigError, DeviceState, NodeView

INF = math.inf


def entrant(rank: int = 0, idle_s: float | None = None, *, online: bool = True, **device: Any) -> Entrant:
    return Entrant(
        rank, NodeView(f"id{rank}", f"node{rank}", online=online, device=DeviceState(**device)), idle_s
    )


# --- the cohort -----------------------------------------------------------------------------------


UNABLE = [
    pytest.param(Rules(), {"online": False}, "offline", id="offline"),
    pytest.param(
        Rules(charging=True), {"battery": Battery(80, charging=False)}, "not charging", id="charging"
    ),
    pytest.param(
        Rules(charging=True), {"battery": Battery(80, plugged=False)}, "not charging", id="unplugged"
    ),
    pytest.param(Rules(battery_least=50), {"battery": Battery(49)}, "49 %, below 50 %", id="battery"),
    pytest.param(Rules(), {"is_throttled": True}, "slowed down", id="throttled"),
    pytest.param(Rules(celsius_most=60), {"temperature_celsius": 61.0}, "61 degrees, above 60", id="heat"),
    pytest.param(Rules(), {"is_metered": True}, "metered", id="metered"),
    pytest.param(Rules(idle_s=60), {"in_use": True}, "somebody", id="in use"),
    pytest.param(Rules(idle_s=60), {"idle_s": 59.0}, "59 s ago, less than 60 s", id="idle"),
]
ABLE = [
    pytest.param(Rules(charging=True), {}, id="no battery is mains"),
    pytest.param(Rules(charging=True), {"battery": Battery(5, charging=True)}, id="charging"),
    pytest.param(
        Rules(charging=True), {"battery": Battery(100, charging=False, plugged=True)}, id="full on mains"
    ),
    pytest.param(Rules(charging=True), {"battery": Battery(50)}, id="nobody knows whether it charges"),
    pytest.param(Rules(battery_least=50), {"battery": Battery(5, plugged=True)}, id="low on a charger"),
    pytest.param(Rules(battery_least=50), {"battery": Battery(50)}, id="just enough"),
    pytest.param(Rules(battery_least=50), {"battery": Battery()}, id="nobody knows how full"),
    pytest.param(Rules(throttled=True), {"is_throttled": True}, id="throttled and allowed"),
    pytest.param(Rules(celsius_most=60), {"temperature_celsius": 60.0}, id="just cool enough"),
    pytest.param(Rules(metered=True), {"is_metered": True}, id="metered and allowed"),
    pytest.param(Rules(), {"in_use": True, "idle_s": 0.0}, id="in use and not asked for"),
    pytest.param(Rules(idle_s=60), {"idle_s": 60.0}, id="just idle enough"),
    pytest.param(
        Rules(charging=True, battery_least=50, celsius_most=60, idle_s=60), {}, id="no sensors at all"
    ),
]


@pytest.mark.parametrize(("rules", "state", "reason"), UNABLE)
def test_a_member_that_cannot_be_asked_says_why(rules: Rules, state: dict[str, Any], reason: str) -> None:
    choice = choose([entrant(0), entrant(1, **state)], 1, 7, 1.0, rules)
    assert choice.chosen == (0,)
    assert reason in choice.left_out[1]


@pytest.mark.parametrize(("rules", "state"), ABLE)
def test_a_member_that_can_bear_it_is_asked(rules: Rules, state: dict[str, Any]) -> None:
    assert unable(entrant(**state), rules) == ""


def test_what_a_node_says_of_itself_counts_first() -> None:
    node = NodeView("id", "node", refuses="its owner is using it")
    assert unable(Entrant(0, node), Rules()) == "it takes no new roles: its owner is using it"


@pytest.mark.parametrize(
    ("members", "fraction", "least", "expected"),
    [
        (10, 0.3, 1, 3),
        (10, 0.31, 1, 4),
        (100, 0.07, 1, 7),
        (10, 0.01, 1, 1),
        (10, 0.1, 3, 3),
        (2, 0.5, 5, 2),
        (7, 1, 1, 7),
    ],
)
def test_so_many_are_drawn(members: int, fraction: float, least: int, expected: int) -> None:
    choice = choose([entrant(rank) for rank in range(members)], 1, 7, fraction, Rules(), least)
    assert len(choice.chosen) == expected
    assert {rank: NOT_DRAWN for rank in range(members) if rank not in choice.chosen} == choice.left_out


def test_the_draw_is_the_same_whoever_lists_the_members_and_differs_by_round_and_seed() -> None:
    entrants = [entrant(rank) for rank in range(50)]
    first = choose(entrants, 1, 7, 0.2, Rules())
    assert choose(reversed(entrants), 1, 7, 0.2, Rules()) == first
    assert choose(entrants, 2, 7, 0.2, Rules()).chosen != first.chosen
    assert choose(entrants, 1, 8, 0.2, Rules()).chosen != first.chosen


def test_only_the_place_of_one_that_became_unable_is_drawn_again() -> None:
    entrants = [entrant(rank) for rank in range(50)]
    first = set(choose(entrants, 1, 7, 0.2, Rules()).chosen)
    for gone in first:
        entrants[gone] = entrant(gone, online=False)
        again = set(choose(entrants, 1, 7, 0.2, Rules()).chosen)
        assert len(again) == len(first)
        assert first - again == {gone}
        entrants[gone] = entrant(gone)


def test_everybody_is_drawn_equally_often() -> None:
    counts: Counter[int] = Counter()
    for round in range(1000):
        counts.update(choose([entrant(rank) for rank in range(10)], round, 3, 0.3, Rules()).chosen)
    expected, deviation = 300, math.sqrt(1000 * 0.3 * 0.7)
    assert all(abs(counts[rank] - expected) < 4 * deviation for rank in range(10))


@pytest.mark.parametrize(
    ("ranks", "fraction"), [([0, 1], 0.0), ([0, 1], 1.5), ([0, 1], float("nan")), ([1, 1], 0.5)]
)
def test_a_draw_that_means_nothing_is_refused(ranks: list[int], fraction: float) -> None:
    with pytest.raises(ConfigError):
        choose([entrant(rank) for rank in ranks], 1, 7, fraction, Rules())


# --- waiting --------------------------------------------------------------------------------------


def test_the_deadline_is_the_median_and_so_many_deviations() -> None:
    waiting = Waiting(floor_s=1, ceiling_s=1000, k=3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rounds = [list(rng.exponential(30, 9) + 20) for _ in range(3)]
        pooled = np.concatenate(rounds)
        expected = np.median(pooled) + 3 * np.median(np.abs(pooled - np.median(pooled)))
        assert waiting.deadline_s(rounds) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        pytest.param([], 100.0, id="nothing known: the ceiling"),
        pytest.param([[]], 100.0, id="nobody was asked"),
        pytest.param([[1.0, 1.0, 1.0]], 5.0, id="never below the floor"),
        pytest.param([[90.0, 50.0, 10.0]], 100.0, id="never above the ceiling"),
        pytest.param([[20.0, 22.0, 24.0, INF, 23.0]], 23 + 3 * 1.0, id="one never came"),
        pytest.param([[20.0, INF, INF]], 100.0, id="most never came"),
        pytest.param([[20.0, 20.0, INF, INF]], 100.0, id="half never came"),
        pytest.param(
            [[99.0] * 50, [10.0], [10.0], [10.0], [12.0], [14.0]], 10.0, id="old rounds are forgotten"
        ),
    ],
)
def test_the_deadline_bears_what_rounds_are_like(rounds: list[list[float]], expected: float) -> None:
    assert Waiting(floor_s=5, ceiling_s=100, k=3).deadline_s(rounds) == expected


def test_one_straggler_hardly_moves_the_deadline() -> None:
    waiting = Waiting(floor_s=1, ceiling_s=10_000)
    usual = [[20.0 + i for i in range(11)]]
    assert waiting.deadline_s([[*usual[0], 5000.0]]) < 1.2 * waiting.deadline_s(usual)


def test_deadlines_do_not_shrink_because_the_late_are_cut_off() -> None:
    """Counting only who came in time, the deadline would fall round by round."""
    waiting = Waiting(floor_s=1, ceiling_s=1000, k=1, rounds=3)
    arrivals = [float(s) for s in range(10, 31)]
    history, forgetful, deadlines = [arrivals], [arrivals], []
    for _ in range(20):
        deadlines.append(waiting.deadline_s(history))
        history.append([s if s <= deadlines[-1] else INF for s in arrivals])
        forgetful.append([s for s in arrivals if s <= waiting.deadline_s(forgetful)])
    assert min(deadlines) == deadlines[0] == statistics.median(arrivals) + 5
    assert waiting.deadline_s(forgetful) < deadlines[0] - 3


@pytest.mark.parametrize(
    ("arrived", "elapsed_s", "expected"),
    [
        pytest.param(10, 1, "close", id="all came"),
        pytest.param(9, 29, "wait", id="before the deadline"),
        pytest.param(9, 30, "close", id="at the deadline"),
        pytest.param(6, 30, "close", id="just the quorum"),
        pytest.param(5, 30, "wait", id="no quorum yet"),
        pytest.param(6, 40, "close", id="the quorum came late"),
        pytest.param(5, 100, "fail", id="no quorum at the ceiling"),
        pytest.param(0, 100, "fail", id="nobody"),
    ],
)
def test_a_round_ends_with_all_or_with_a_quorum_at_its_deadline(
    arrived: int, elapsed_s: float, expected: str
) -> None:
    waiting = Waiting(floor_s=5, ceiling_s=100, quorum=0.6)
    assert waiting.verdict(arrived, 10, elapsed_s, 30) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Waiting(0, 1),
        lambda: Waiting(2, 1),
        lambda: Waiting(1, INF),
        lambda: Waiting(1, 2, k=-1),
        lambda: Waiting(1, 2, quorum=0),
        lambda: Waiting(1, 2, rounds=0),
    ],
)
def test_waiting_that_means_nothing_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()
