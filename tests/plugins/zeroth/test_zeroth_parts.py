"""Server and members of fwdllm and ferret together, on losses whose minimum is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from edged_plugins.zeroth_order._aggregators import factors_of, parameters_of
from edged_plugins.zeroth_order._ferret import Ferret, Projected
from edged_plugins.zeroth_order._forward import FwdLLM, Measured
from zeroth_rig import start

from edged import ConfigError, Factors, Member, PolicyViolation, Update

MEMBERS = [Member(rank, 4, 2.0) for rank in range(3)]
FORWARD = {
    "seed": 5,
    "local_steps": 8,
    "candidates": 1,
    "variance_most": 1e9,
    "learning_rate": 0.02,
    "perturbation": 2.0**-7,
}
FERRET = {"seed": 5, "local_steps": 4, "coordinates": 20, "server_learning_rate": 0.3}


def wish(member: int) -> np.ndarray:
    """What a member would like its values to be: its own, and mostly what all would like."""
    common = np.random.default_rng(100).standard_normal(88)
    return common + 0.3 * np.random.default_rng(member).standard_normal(88)


def flat(factors: Factors) -> np.ndarray:
    return np.concatenate([part.ravel() for _, part in sorted(parameters_of(factors).items())])


def distance(factors: Factors, member: int) -> float:
    return float(((flat(factors) - wish(member)) ** 2).sum() / 2)


def copied(factors: Factors) -> Factors:
    return factors_of({name: array.copy() for name, array in parameters_of(factors).items()})


def of(server: Any) -> Factors:
    return server.download(MEMBERS[0]).factors


def measured(server: FwdLLM, settings: dict[str, Any], round: int) -> list[Update]:
    """What members send after the slopes that they were asked for."""
    updates = []
    for member in MEMBERS:
        part, download = Measured(settings, start(), member.rank), server.download(member)
        own, rank = copied(part.begin(download)), member.rank
        steps = range(round * 8, round * 8 + 8)
        extras = part.train(steps, own, lambda step, own=own, rank=rank: distance(own, rank))
        np.testing.assert_allclose(flat(own), flat(download.factors), rtol=0, atol=1e-6)
        updates.append(Update(member, round, 1.0, {}, extras))
    return updates


def fwdllm_round(server: FwdLLM, settings: dict[str, Any], round: int) -> None:
    server.begin(round, MEMBERS)
    for update in measured(server, settings, round):
        server.add(update)
    server.finish()


def ferret_round(server: Ferret, settings: dict[str, Any], round: int) -> None:
    server.begin(round, MEMBERS)
    for member in MEMBERS:
        part = Projected(settings, start(), member.rank)
        assert part.after_gradients
        own = copied(part.begin(server.download(member)))
        named, at = parameters_of(own), 0
        for _ in range(4):  # what a trainer does by gradients
            at, gradient = 0, flat(own) - wish(member.rank)
            for _, array in sorted(named.items()):
                array -= (0.1 * gradient[at : at + array.size]).reshape(array.shape).astype(np.float32)
                at += array.size
        extras = part.train(range(4 * round, 4 * round + 4), own, lambda step: 0.0)
        assert len(extras["coordinates"].ravel()) == 4 * 20
        server.add(Update(member, round, 1.0, {}, extras))
    server.finish()


@pytest.mark.parametrize(
    ("kind", "run", "settings"),
    [
        (FwdLLM, fwdllm_round, FORWARD),
        (FwdLLM, fwdllm_round, FORWARD | {"candidates": 4}),
        (Ferret, ferret_round, FERRET),
    ],
    ids=["fwdllm", "fwdllm that chooses", "ferret"],
)
def test_the_loss_of_unlike_members_falls_in_rounds(kind: Any, run: Any, settings: dict[str, Any]) -> None:
    server, losses = kind(settings, start(), MEMBERS), []
    for number in range(20):
        losses.append(sum(distance(of(server), member.rank) for member in MEMBERS))
        run(server, settings, number)
    assert losses[-1] < 0.5 * losses[0]


def test_weights_stay_until_the_mean_slope_is_sure_and_directions_are_always_new() -> None:
    """B20: the server asks for more while the variance is above the threshold, and never steps then. Later
    steps, whose gradient is smaller, need fewer directions for the same variance."""
    settings = FORWARD | {"variance_most": 0.5}
    server = FwdLLM(settings, start(), MEMBERS)
    seen: set[int] = set()
    needed: list[int] = []
    rounds_of_step = 0
    for number in range(60):
        before, rounds_of_step = flat(of(server)).copy(), rounds_of_step + 1
        fwdllm_round(server, settings, number)
        asked = [int(i) for m in MEMBERS for i in server.download(m).extras["directions"]]
        assert len(asked) == 24
        assert not seen & set(asked)
        seen |= set(asked)
        if (flat(of(server)) != before).any():
            assert server._collected.slopes == []
            needed.append(rounds_of_step)
            rounds_of_step = 0
        else:
            assert server._collected.variance > 0.5
            assert len(server._collected.slopes) == 24 * rounds_of_step
    assert needed[0] > 1
    assert np.mean(needed[-3:]) < needed[0]


def test_a_step_is_the_weighted_mean_of_slopes_times_directions() -> None:
    server = FwdLLM(FORWARD, start(), MEMBERS)
    before = flat(of(server)).copy()
    fwdllm_round(server, FORWARD, 0)
    gradient = (before - flat(of(server))) / FORWARD["learning_rate"]
    exact = np.mean([before - wish(member.rank) for member in MEMBERS], axis=0)
    cosine = gradient @ exact / np.linalg.norm(gradient) / np.linalg.norm(exact)
    # of n directions in d dimensions 1 / sqrt(1 + d/n)
    assert cosine == pytest.approx(1 / math.sqrt(1 + 88 / 24), abs=0.25)


def test_a_round_that_is_refused_adds_no_direction() -> None:
    server = FwdLLM(FORWARD | {"variance_most": 1e-9}, start(), MEMBERS)
    fwdllm_round(server, FORWARD, 0)
    kept = {name: array.tobytes() for name, array in server.state_dict().items()}
    server.begin(1, MEMBERS)
    with pytest.raises(PolicyViolation, match="at least one member"):
        server.finish()
    assert {name: array.tobytes() for name, array in server.state_dict().items()} == kept


FOUR = np.array([20, 20, 20, 20], np.int32)


@pytest.mark.parametrize(
    ("extras", "says"),
    [
        ({}, "expected counts and coordinates"),
        ({"counts": FOUR[:3], "coordinates": np.zeros(80)}, "2 coordinates or more of each of 4 blocks"),
        ({"counts": FOUR - [19, 0, 0, -19], "coordinates": np.zeros(80)}, "2 coordinates or more"),
        (
            {"counts": FOUR * 2, "coordinates": np.zeros(160)},
            "expected 80 coordinates in an update, got 160",
        ),
        ({"counts": FOUR, "coordinates": np.zeros(79)}, "expected 80 coordinates in an update, got 79"),
        ({"counts": FOUR, "coordinates": np.full(80, np.nan)}, "finite coordinates"),
        ({"counts": FOUR * 1.0, "coordinates": np.zeros(80)}, "2 coordinates or more"),
    ],
)
def test_coordinates_that_are_none_are_refused_and_the_round_goes_on(
    extras: dict[str, Any], says: str
) -> None:
    servers = [Ferret(FERRET, start(), MEMBERS) for _ in range(2)]
    good = {"counts": FOUR, "coordinates": np.ones(80, np.float32)}
    for server in servers:
        server.begin(0, MEMBERS)
        server.add(Update(MEMBERS[0], 0, 1.0, {}, good))
    with pytest.raises(ConfigError, match=says):
        servers[0].add(Update(MEMBERS[1], 0, 1.0, {}, extras))
    for server in servers:
        server.finish()
    np.testing.assert_array_equal(*(flat(of(server)) for server in servers))


@pytest.mark.parametrize(
    ("extras", "says"),
    [
        ({}, "expected slopes"),
        ({"slopes": np.zeros(7)}, "expected 8 slopes"),
        ({"slopes": np.full(8, np.inf)}, "finite slopes"),
    ],
)
def test_slopes_that_are_none_are_refused_and_the_round_goes_on(extras: dict[str, Any], says: str) -> None:
    server = FwdLLM(FORWARD, start(), MEMBERS)
    server.begin(0, MEMBERS)
    with pytest.raises(ConfigError, match=says):
        server.add(Update(MEMBERS[0], 0, 1.0, {}, extras))
    assert server._came == []


def test_more_coordinates_than_values_are_refused_by_name() -> None:
    """88 values in four factors: 22 of each."""
    Ferret(FERRET | {"coordinates": 22}, start(), MEMBERS)
    with pytest.raises(ConfigError, match="coordinates: expected at most 22"):
        Ferret(FERRET | {"coordinates": 23}, start(), MEMBERS)


def test_a_member_measures_along_as_many_directions_as_it_has_steps() -> None:
    part, server = Measured(FORWARD, start(), 0), FwdLLM(FORWARD, start(), MEMBERS)
    part.begin(server.download(MEMBERS[0]))
    with pytest.raises(ConfigError, match="expected 3 directions of the server, got 8"):
        part.train(range(3), copied(start()), lambda step: 0.0)
