"""Buffered pushes and delayed Nesterov against their definitions; which pushes count; resumed states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from edged_plugins._rounds.asynchronous import Buffered, DelayedNesterov, local_steps

from edged import ConfigError, ProtocolError

SIZE = 50


def deltas(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, SIZE))


START = deltas(1, seed=9)[0]


def buffered(**settings: Any) -> Buffered:
    return Buffered(START, **{"size": 3, **settings})


def nesterov(**settings: Any) -> DelayedNesterov:
    return DelayedNesterov(START, **{"N": 4, **settings})


def push(server: Buffered | DelayedNesterov, member: int, baseline: int, delta: Any, *weight: float) -> bool:
    """The member's next."""
    return server.push(member, server.fence.turn(member), baseline, delta, *weight)


def refused(
    server: Buffered | DelayedNesterov,
    code: str,
    member: int,
    baseline: int,
    delta: Any,
    *weight: float,
    turn: int | None = None,
) -> None:
    before, counted = server.state_dict(), server.fence.refused[code]
    turn = server.fence.turn(member) if turn is None else turn
    with pytest.raises(ProtocolError) as error:
        server.push(member, turn, baseline, delta, *weight)
    assert error.value.code == code
    assert f"member {member} " in str(error.value)
    assert server.fence.refused[code] == counted + 1
    after = server.state_dict()
    assert all((after[name] == before[name]).all() for name in before if name != "refused")


# --- buffered -------------------------------------------------------------------------------------


def test_a_full_buffer_makes_the_mean_by_weight_and_staleness() -> None:
    server = buffered(size=4, lr=0.5)
    for member, delta in enumerate(deltas(8, seed=1)):
        push(server, member, 0, delta)
    theta, pushes = server.theta.copy(), deltas(4, seed=2)
    baselines, weights = [0, 2, 1, 0], [3.0, 1.0, 0.5, 7.0]
    made = [push(server, 20 + i, baseline, pushes[i], weights[i]) for i, baseline in enumerate(baselines)]
    w = np.array(weights) / np.sqrt(1 + 2.0 - np.array(baselines))
    assert made == [False, False, False, True]
    assert server.revision == 3
    np.testing.assert_allclose(
        server.theta, theta + 0.5 * np.average(pushes, axis=0, weights=w), rtol=0, atol=1e-13
    )


def test_staleness_does_not_shrink_the_step() -> None:
    """All push the same: the step is that, however stale they are. By their count it would be 1 / 2 of it."""
    server, delta = buffered(size=2), deltas(1)[0]
    for member in range(6):
        push(server, member, 0, delta)
    theta = server.theta.copy()
    push(server, 10, 0, delta)
    push(server, 11, 0, delta)
    np.testing.assert_allclose(server.theta - theta, delta, rtol=1e-12)
    by_count = (1 / np.sqrt(1 + 3) + 1 / np.sqrt(1 + 3)) / 2
    assert by_count == 0.5


def test_a_fresh_push_counts_more_than_a_stale_one() -> None:
    server = Buffered(np.zeros(1), 1)
    for member in range(3):
        push(server, member, member, [0.0])
    server.size = 2
    push(server, 3, 3, [1.0])
    push(server, 4, 0, [-1.0])
    assert server.theta[0] == pytest.approx((1 - 1 / 2) / (1 + 1 / 2), rel=1e-12)


def test_one_fresh_push_of_each_is_federated_averaging() -> None:
    server, pushes, rows = buffered(), deltas(3), [10.0, 30.0, 60.0]
    for member in range(3):
        push(server, member, 0, pushes[member], rows[member])
    np.testing.assert_allclose(server.theta, np.average(START + pushes, axis=0, weights=rows), atol=1e-14)


# --- delayed Nesterov -----------------------------------------------------------------------------


def nesterov_steps(theta: np.ndarray, gradients: np.ndarray, lr: float, beta: float) -> np.ndarray:
    """As torch.optim.SGD(nesterov=True, dampening=0) does it."""
    m = np.zeros_like(theta)
    for g in gradients:
        m = beta * m + g
        theta = theta - lr * (g + beta * m)
    return theta


@pytest.mark.parametrize("N", [1, 2, 5])
def test_so_many_pushes_move_as_nesterov_does_on_their_mean(N: int) -> None:
    server, pushes = nesterov(N=N), deltas(5 * N)
    for t, delta in enumerate(pushes):
        assert push(server, t % N, t, delta)
    means = -pushes.reshape(5, N, SIZE).mean(1)
    assert np.abs(server.theta - nesterov_steps(START, means, 0.7, 0.9)).max() < 1e-12


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_a_window_of_one_push_is_nesterov_whatever_the_spread(c: float) -> None:
    server, pushes = nesterov(N=1, c=c, lr=0.1, beta=0.5), deltas(7)
    for t, delta in enumerate(pushes):
        push(server, 0, t, delta)
    assert np.abs(server.theta - nesterov_steps(START, -pushes, 0.1, 0.5)).max() < 1e-12


@pytest.mark.parametrize("c", [0.0, 0.1, 0.2])
def test_a_window_has_its_part_of_the_old_momentum_and_the_rest_of_the_new(c: float) -> None:
    N, lr, beta = 5, 0.7, 0.9
    server, pushes = nesterov(N=N, c=c), deltas(4 * N)
    theta, m = START.copy(), np.zeros(SIZE)
    for window in range(4):
        for t in range(window * N, (window + 1) * N):
            push(server, t, t, pushes[t])
        g = -pushes[window * N : (window + 1) * N].mean(0)
        old, m = m, beta * m + g
        spread = (N - 1) * c
        theta = theta - lr * (g + beta * (spread * old + (1 - spread) * m))
        assert np.abs(server.theta - theta).max() < 1e-12


def test_without_momentum_each_push_moves_by_its_share() -> None:
    server, pushes = nesterov(beta=0.0, lr=1.0), deltas(8)
    for t, delta in enumerate(pushes):
        push(server, 0, t, delta)
    np.testing.assert_allclose(server.theta, START + pushes.sum(0) / 4, atol=1e-13)


# --- the fence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: buffered(size=1, staleness_most=2), lambda: nesterov(staleness_most=2)]
)
def test_a_push_that_must_not_count_is_refused_by_name_and_changes_nothing(
    make: Callable[[], Buffered | DelayedNesterov],
) -> None:
    server, pushes = make(), deltas(6)
    refused(server, "update-future", 3, 1, pushes[0])
    for t in range(4):
        push(server, 0, t, pushes[t])
    refused(server, "update-stale", 1, 1, pushes[4])
    refused(server, "update-stale", 1, -1, pushes[4])
    refused(server, "update-future", 1, 5, pushes[4])
    refused(server, "update-replay", 0, 2, pushes[2], turn=2)
    refused(server, "update-replay", 0, 4, pushes[4], turn=3)
    refused(server, "update-future", 0, 4, pushes[4], turn=5)
    refused(server, "update-shape", 1, 4, pushes[4][:-1])
    refused(server, "update-shape", 1, 4, pushes[4:5])
    refused(server, "update-nan", 1, 4, np.full(SIZE, np.nan))
    refused(server, "update-nan", 1, 4, np.full(SIZE, -np.inf))
    assert push(server, 1, 2, pushes[4])  # two revisions old
    assert push(server, 1, 4, pushes[5])
    assert sum(server.fence.refused.values()) == 11


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_zero(weight: float) -> None:
    refused(buffered(), "update-weight", 0, 0, START, weight)


def test_a_fast_member_pushes_again_from_the_same_revision() -> None:
    server, pushes = buffered(size=3), deltas(3)
    made = [push(server, 0, 0, delta) for delta in pushes]
    assert made == [False, False, True]
    np.testing.assert_allclose(server.theta, START + pushes.mean(0), atol=1e-14)


def test_what_the_fence_remembers_does_not_grow_with_pushes() -> None:
    server = nesterov(staleness_most=3)
    for t in range(200):
        push(server, t % 5, t, START)
    assert server.state_dict()["turns"].tolist() == [[member, 40] for member in range(5)]


# --- the state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(9))
@pytest.mark.parametrize("make", [buffered, lambda: nesterov(c=0.1)])
def test_a_server_goes_on_from_its_state_bit_for_bit(
    make: Callable[[], Buffered | DelayedNesterov], stop: int
) -> None:
    pushes = deltas(9)

    def go_on(server: Buffered | DelayedNesterov, first: int, last: int) -> None:
        for t in range(first, last):
            push(server, t % 4, server.revision, pushes[t])
            if t == 1:
                refused(server, "update-replay", 1, 0, pushes[t], turn=0)

    whole, begun, resumed = make(), make(), make()
    go_on(whole, 0, 9)
    go_on(begun, 0, stop)
    state = {name: np.array(array) for name, array in begun.state_dict().items()}
    go_on(begun, stop, 9)  # what was taken as state does not change with it
    resumed.load_state_dict(state)
    go_on(resumed, stop, 9)
    expected = whole.state_dict()
    for name, array in resumed.state_dict().items():
        assert array.tobytes() == expected[name].tobytes(), name
    assert resumed.theta.tobytes() == begun.theta.tobytes()


def test_a_state_of_another_size_is_refused() -> None:
    for server, other in (
        (buffered(), Buffered(np.zeros(3), 3)),
        (nesterov(), DelayedNesterov(np.zeros(3), 4)),
    ):
        with pytest.raises(ConfigError, match="50 values"):
            server.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: buffered(size=0),
        lambda: buffered(staleness_most=-1),
        lambda: nesterov(N=0),
        lambda: nesterov(beta=1.0),
        lambda: nesterov(c=0.26),
        lambda: nesterov(c=-0.1),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()


# --- local steps ----------------------------------------------------------------------------------


def test_local_steps_follow_the_speeds_of_the_card() -> None:
    """B26: 0.58, 0.75, 1.51 and 3.33 s a step; the fastest is the measure with percentile 100."""
    speeds = {rank: 1 / s for rank, s in enumerate((0.58, 0.75, 1.51, 3.33))}
    steps = local_steps(50, speeds, percentile=100)
    assert steps == {0: 50, 1: 38, 2: 19, 3: 8}
    for rank, speed in speeds.items():  # all windows are equal within one step's time
        assert 0 <= 50 / speeds[0] - steps[rank] / speed < 1 / speed


def test_local_steps_are_by_the_ninetieth_percentile() -> None:
    rng = np.random.default_rng(4)
    for count in (1, 2, 5, 40):
        speeds = {rank: float(v) for rank, v in enumerate(rng.uniform(0.01, 3, count))}
        fast = np.percentile(list(speeds.values()), 90)
        for rank, steps in local_steps(100, speeds).items():
            assert steps == max(1, int(100 * speeds[rank] / fast + 1e-9))


def test_equal_members_take_all_steps_and_the_slowest_takes_one() -> None:
    for speed in (0.1, 1 / 3, 7.7):
        assert local_steps(49, dict.fromkeys(range(3), speed)) == dict.fromkeys(range(3), 49)
    assert local_steps(10, {0: 1.0, 1: 1e-6})[1] == 1
    assert local_steps(10, {}) == {}


@pytest.mark.parametrize(
    ("H", "speed"), [(0, 1.0), (10, 0.0), (10, -1.0), (10, math.inf), (10, float("nan"))]
)
def test_steps_and_speeds_are_above_zero(H: int, speed: float) -> None:
    with pytest.raises(ConfigError):
        local_steps(H, {0: 1.0, 1: speed})
