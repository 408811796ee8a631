"""Rounds that do not wait for everybody, over tiny models: members that leave, come late, or cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins._rounds.cohort import Rules
from edged_plugins._tensors.adapters import pairs_of, read_peft
from edged_plugins._training.link import Stopped
from edged_plugins.personal_lora._semi import OwnDevice, key_of
from rig import Outcome, Planned, finished, kept_by, raised, run_threads
from rounds_rig import breaks_before, federated
from safetensors.numpy import load_file

from edged import Battery, ConfigError, DeviceState, EngineError
from edged.figures import rounds_log

SEMI = "semi-synchronous"
THREE = ({}, {}, {})
UNPLUGGED = DeviceState(battery=Battery(percent=50.0, charging=False, plugged=False))


def steps_of(outcome: Outcome) -> list[dict[str, float]]:
    return [values for kind, _, values in outcome.reports if kind == "step"]


def log_of(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Rows of the job's rounds; a node's name is its rank."""
    server = outcomes[-1]
    return rounds_log(
        [(step, kind, values) for kind, step, values in server.reports],
        [str(rank) for rank in range(len(outcomes))],
    )


def adapter_of(plan: Planned) -> dict[str, np.ndarray]:
    """scale B A by module."""
    config, tensors = read_peft(plan.folders[-1] / "adapter")
    return {name: pair.scale * pair.b @ pair.a for name, pair in pairs_of(config, tensors).items()}


def ups(outcomes: list[Outcome], round: int) -> dict[int, tuple[int, np.ndarray]]:
    """Weight and values of each update that reached the server in a round."""
    return {
        source: (header["weight"], np.frombuffer(b"".join(frames), "<f4"))
        for source, header, frames in outcomes[-1].received
        if header["k"] == "up" and header["at"] == [round]
    }


def downs(outcome: Outcome, round: int) -> np.ndarray:
    [found] = [
        b"".join(frames)
        for _, header, frames in outcome.received
        if header["k"] == "down" and header["at"] == [round]
    ]
    return np.frombuffer(found, "<f4")


class Stage:
    """Holds the server's trainer and its clock, for members that act on them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.server: Any = None

    def enters(self, trainer: Any) -> None:
        self.server = trainer
        trainer.semi.clock = lambda: self.now

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Give the turn away until the server has come so far."""
        turn = self.server.channel._channel._hall.turn
        for _ in range(2000):
            if what():
                return
            turn.wait(0.01)
        pytest.fail("the server did not come so far")


def at_round(round: int, act: Callable[[Any], None]) -> Callable[[Any], None]:
    """A change: a member that does something before it trains in a round."""

    def change(trainer: Any) -> None:
        real = trainer._train

        def train(number: int, frozen: str) -> Any:
            if number == round:
                act(trainer)
            return real(number, frozen)

        trainer._train = train

    return change


@pytest.mark.parametrize("keys", [{"method": "fedavg"}, {"method": "fedadam", "fraction": 0.6}], ids=str)
def test_where_all_come_in_time_the_rounds_are_those_that_wait(
    keys: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    plans = [
        federated(
            tiny("llama")[1], tmp_path / mode, clients=THREE, mode=mode, rounds=3, local_steps=1, **keys
        )
        for mode in ("synchronous", SEMI)
    ]
    for plan in plans:
        finished(run_threads(plan))
    one, other = (adapter_of(plan) for plan in plans)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_member_that_leaves_in_mid_round_costs_its_own_update_alone(tiny: Any, tmp_path: Path) -> None:
    """What the round made is the weighted mean of the updates that came."""
    plan = federated(tiny("llama")[1], tmp_path, clients=THREE, mode=SEMI, rounds=3, local_steps=1)
    stage = Stage()

    def vanishes(trainer: Any) -> None:
        stage.server.left(1, "its worker ended")
        raise Stopped

    changes = {1: at_round(1, vanishes), 3: stage.enters}
    outcomes = finished(run_threads(plan, keep="messages", changes=changes))
    log = log_of(outcomes)
    assert [row["members"] for row in log] == [["0", "1", "2"], ["0", "2"], ["0", "2"]]
    assert [row["left_out"] for row in log] == [
        {},
        {"1": "it left in mid round"},
        {"1": "it is away"},
    ]
    came = ups(outcomes, 1)
    assert sorted(came) == [0, 2]
    total = sum(weight for weight, _ in came.values())
    mean = sum(weight * values.astype(np.float64) for weight, values in came.values()) / total
    for rank in (0, 2):
        np.testing.assert_allclose(downs(outcomes[rank], 2), mean, rtol=0, atol=1e-7)


def test_a_late_update_is_refused_and_its_member_takes_part_again(tiny: Any, tmp_path: Path) -> None:
    plan = federated(
        tiny("llama")[1], tmp_path, clients=THREE[:2], mode=SEMI, rounds=8, local_steps=2, eval_rows=0
    )
    stage = Stage()

    def dawdles(trainer: Any) -> None:
        semi = stage.server.semi
        stage.wait_for(lambda: 0 in semi.arrived)
        stage.now += 1000.0
        stage.wait_for(lambda: 1 in semi._owes)

    changes = {1: at_round(0, dawdles), 2: stage.enters}
    outcomes = finished(run_threads(plan, keep="messages", changes=changes))
    rows, log = steps_of(outcomes[-1]), log_of(outcomes)
    assert log[0]["members"] == ["0"]
    assert log[0]["left_out"] == {"1": "its update came too late"}
    np.testing.assert_array_equal(downs(outcomes[0], 1), ups(outcomes, 0)[0][1])  # the mean of one
    assert ups(outcomes, 0)[1]  # it did come, and nothing was made of it
    assert rows[0].get("refused", 0) == 0
    assert rows[-1]["refused"] == 1
    assert log[-1]["members"] == ["0", "1"]
    between = [row["left_out"] for row in log[1:] if row["left_out"]]
    assert all(row == {"1": "it still trains round 0"} for row in between)


def test_a_member_that_is_back_goes_on_from_what_it_kept(tiny: Any, tmp_path: Path) -> None:
    """It missed rounds: the download replaces its adapter, and its personal one is the last that it kept."""
    plan = federated(
        tiny("llama")[1], tmp_path, clients=THREE, mode=SEMI, rounds=4, local_steps=1,
        personal="ditto", personal_steps=1,
    )  # fmt: skip
    stage, members = Stage(), {}

    def vanishes(trainer: Any) -> None:
        stage.server.left(1, "its worker ended")
        raise Stopped

    def breaks(trainer: Any) -> None:
        stage.enters(trainer)
        breaks_before(3)(trainer)

    first = run_threads(plan, changes={1: at_round(1, vanishes), 3: breaks})
    assert str(raised(first)) == "it breaks here"
    assert kept_by(plan)[1] == [1]
    assert 3 in kept_by(plan)[3]

    def looks(trainer: Any) -> None:
        def look(trainer: Any) -> None:
            members["personal"] = trainer.flat(trainer._personal, "AB").copy()

        at_round(3, look)(trainer)

    kept = Path(plan.folders[1]) / "step-1.safetensors"
    before = load_file(kept)["personal"]
    outcomes = finished(run_threads(plan, 3, changes={1: looks}))
    np.testing.assert_array_equal(members["personal"], before)
    assert [row["members"] for row in log_of(outcomes)] == [["0", "1", "2"]]


def test_a_device_that_is_not_what_the_job_asks_for_sits_out(tiny: Any, tmp_path: Path) -> None:
    plan = federated(
        tiny("llama")[1], tmp_path, clients=THREE, mode=SEMI, rounds=2, local_steps=1, only_charging=True
    )

    def unplugged(trainer: Any) -> None:
        trainer.device(UNPLUGGED)
        real = trainer._sits_out

        def sits_out(number: int) -> bool:
            found = bool(real(number))
            trainer.device(DeviceState())  # it is plugged in after the first round
            return found

        trainer._sits_out = sits_out

    outcomes = finished(run_threads(plan, changes={1: unplugged}))
    log = log_of(outcomes)
    assert [row["members"] for row in log] == [["0", "2"], ["0", "1", "2"]]
    assert log[0]["left_out"] == {"1": "it is not charging"}


def test_a_round_without_its_quorum_ends_the_epoch_by_name(tiny: Any, tmp_path: Path) -> None:
    waits = {"wait_least_s": 0.1, "wait_most_s": 0.3}
    plan = federated(
        tiny("llama")[1], tmp_path, clients=THREE, mode=SEMI, rounds=1, only_charging=True, **waits
    )
    changes = {rank: (lambda trainer: trainer.device(UNPLUGGED)) for rank in (0, 1)}
    error = raised(run_threads(plan, changes=changes))
    assert isinstance(error, EngineError)
    assert error.code == "quorum"
    assert "round 0: expected 2 members; 1 sent an update" in str(error)
    assert "client0: it is not charging" in str(error)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"mode": "sometimes"}, "mode"),
        ({"mode": SEMI, "method": "flora"}, "mode = synchronous with flora"),
        ({"mode": SEMI, "method": "scaffold"}, "mode = synchronous with scaffold"),
        ({"mode": SEMI, "masked": True}, "mode = synchronous with masked"),
        ({"mode": SEMI, "method": "krum", "quorum": 0.5, "clients": [{}] * 5}, "a quorum of at least 5"),
        ({"mode": SEMI, "quorum": 0.0}, "quorum above 0"),
        ({"mode": SEMI, "wait_least_s": 5.0, "wait_most_s": 4.0}, "wait_least_s <= wait_most_s"),
        ({"only_charging": True}, "mode = semi-synchronous with only_charging"),
        ({"metered": False}, "mode = semi-synchronous with metered"),
        ({"battery_least": 30.0}, "mode = semi-synchronous with battery_least"),
    ],
    ids=str,
)
def test_what_such_rounds_cannot_do_is_refused_by_name(
    keys: dict[str, Any], says: str, tiny: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        federated(tiny("llama")[1], tmp_path, **{"clients": THREE, **keys})


@pytest.mark.parametrize(
    ("submitter", "optional", "least"), [("server", (0, 1, 2), 2), ("client1", (0, 2), 1)]
)
def test_clients_are_optional_but_for_the_one_that_asked_for_the_job(
    submitter: str, optional: tuple[int, ...], least: int, tiny: Any, tmp_path: Path
) -> None:
    path = tiny("llama")[1]
    plan = federated(path, tmp_path / "semi", clients=THREE, mode=SEMI, submitter=submitter).plan
    assert (plan.optional, plan.optional_least) == (optional, least)
    waits = federated(path, tmp_path / "all", clients=THREE, submitter=submitter).plan
    assert (waits.optional, waits.optional_least) == ((), 0)


# --- pure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "reason", "key"),
    [
        (3, "it is not charging", "out_3_it_is_not_charging"),
        (31, "its battery is at 17 %, below 30 %", "out_31_its_battery_is_at_17_below_30"),
        (1, "it is slowed down, by heat or a weak supply", "out_1_it_is_slowed_down_by_heat_or_a"),
        (0, "\x1b[0m é", "out_0_0m"),
        (0, "", "out_0_it_says_not_why"),
        (0, "x" * 90, "out_0_it_says_not_why"),
    ],
)
def test_a_reason_is_a_figures_name(rank: int, reason: str, key: str) -> None:
    assert key_of(rank, reason) == key
    assert key.isidentifier()
    assert len(key) <= 40


def test_a_device_is_idle_when_nobody_was_seen_at_it_for_so_long() -> None:
    now = 0.0
    device = OwnDevice(Rules(idle_s=60.0), lambda: now)
    assert device.cannot() == ""  # what no sensor says changes nothing
    device.hear(DeviceState(in_use=True))
    assert device.cannot() == "somebody is using it"
    device.hear(DeviceState(in_use=False))
    now = 59.0
    assert "it was used 59 s ago" in device.cannot()
    now = 60.0
    assert device.cannot() == ""
