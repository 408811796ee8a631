"""Every update that cannot be used is refused by name and counted, and the round goes on with the rest."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edged_plugins import personal_lora
from edged_plugins._training.link import Link
from edged_plugins.personal_lora import _messages
from edged_plugins.personal_lora._inbox import HEARD_MOST, Inbox
from edged_plugins.personal_lora._rank import job_sha256
from edged_plugins.personal_lora._semi import AT_ONCE, Rounds
from rig import Planned, finished, run_threads
from rounds_rig import federated
from test_rounds import VALUES, adapter_of, spoil, steps_of, stranger

from edged import ConfigError, EngineError, ProtocolError

Wrong = Callable[[int, dict[str, Any], bytearray], None]


@dataclass
class Bad:
    """`reason`: words of the log; `refused`: updates of two rounds that are."""

    wrong: Wrong
    reason: str
    refused: int = 2


def resize(values: bytearray, said: dict[str, Any], count: int) -> None:
    """So many values, as announced."""
    values[:] = np.full(count, 0.01, "<f4").tobytes()
    said.update(of=count)


BAD = {
    "not a number": Bad(
        lambda number, said, values: values.__setitem__(slice(0, 4), np.float32("nan").tobytes()), "finite"
    ),
    "a wrong shape": Bad(
        lambda number, said, values: resize(values, said, VALUES - 1), f"expected {VALUES} values of client0"
    ),
    "a wrong rank": Bad(
        lambda number, said, values: resize(values, said, VALUES // 2), f"expected {VALUES} values of client0"
    ),
    "a stale revision": Bad(
        lambda number, said, values: said.update(at=[number - 1]) if number else None, "expected "
    ),
    "of a round to come": Bad(lambda number, said, values: said.update(at=[number + 1]), "expected up"),
    "no weight": Bad(lambda number, said, values: said.update(weight=-5), "a number of rows above 0"),
}


def job_hash(plan: Planned) -> str:
    return job_sha256(plan.specs[0].settings)


def reasons(caplog: pytest.LogCaptureFixture, message: str = "update refused") -> list[Any]:
    return [record for record in caplog.records if record.message == message]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused_by_name_and_the_round_goes_on(
    case: str, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, plan = BAD[case], federated(tiny("llama")[1], tmp_path, eval_rows=0)
    with caplog.at_level(logging.WARNING):
        server = finished(run_threads(plan, ranks={0: stranger(plan, bad.wrong)}))[-1]
    found = reasons(caplog)
    assert [record.member for record in found] == ["client0"] * bad.refused
    assert all(bad.reason in record.reason for record in found)
    rows = steps_of(server)
    assert rows[-1]["refused"] == bad.refused
    assert "up_0" not in rows[-1]
    assert all("up_1" in row for row in rows)
    assert adapter_of(plan.folders[-1])


def test_a_replay_of_a_former_round_is_left_out_and_counts_nothing_twice(tiny: Any, tmp_path: Path) -> None:
    """Whole, before this round's own: the adapter is that of a job in which it never came; it is refused."""
    made = []
    for name, is_twice in (("twice", True), ("once", False)):
        plan = federated(tiny("llama")[1], tmp_path / name, eval_rows=0)
        part = stranger(plan, lambda number, said, values: None)
        told = finished(
            run_threads(
                plan,
                ranks={0: (lambda channel, part=part: part(Replays(channel)))} if is_twice else {0: part},
            )
        )[-1]
        assert [row.get("refused", 0.0) for row in steps_of(told)] == [0.0, float(is_twice)]
        made.append(adapter_of(plan.folders[-1]))
    for name in made[0]:
        np.testing.assert_array_equal(made[0][name], made[1][name])


class Replays:
    """A channel that says what it said in the round before once more."""

    def __init__(self, channel: Any) -> None:
        self._channel, self._former = channel, None
        self.poll, self.receive = channel.poll, channel.receive

    def send(self, to: int, header: dict[str, Any], frames: Any = ()) -> None:
        if header["k"] == "up":
            if self._former is not None:
                self._channel.send(to, *self._former)
            self._former = (header, frames)
        self._channel.send(to, header, frames)


@pytest.mark.parametrize("method", ["fedavg", "fedbuff"])
def test_another_base_costs_its_member_alone_and_is_counted(
    method: str, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=[{}, {}, {}], method=method)

    def greets(channel: Any) -> None:
        channel.send(3, _messages.hello(job_hash(plan), "1" * 64))

    rows = steps_of(finished(run_threads(plan, ranks={0: greets}))[-1])
    assert all(row["refused"] >= 1 for row in rows)
    assert all("up_0" not in row for row in rows)
    assert any(f"up_{rank}" in row for row in rows for rank in (1, 2))
    refused = next(record for record in caplog.records if record.getMessage() == "update refused")
    assert refused.member == "client0"  # type: ignore[attr-defined]
    assert "the same model at every node" in refused.reason  # type: ignore[attr-defined]


def test_a_masked_sum_needs_all_and_another_base_ends_it_by_name(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=[{}, {}, {}], masked=True, eval_rows=0)

    def greets(channel: Any) -> None:
        channel.send(3, _messages.hello(job_hash(plan), "1" * 64))

    outcomes = run_threads(plan, ranks={0: greets})
    error = next(outcome.error for outcome in outcomes if isinstance(outcome.error, EngineError))
    assert error.code == "model-differs"
    assert "client0" in str(error)


def test_a_member_with_another_model_costs_itself_where_members_may_leave(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, mode="semi-synchronous", wait_least_s=0.1, quorum=0.5)

    def greets(channel: Any) -> None:
        channel.send(len(plan.plan.settings["clients"]), _messages.hello("0" * 64, "1" * 64))

    rows = steps_of(finished(run_threads(plan, ranks={0: greets}))[-1])
    assert [row["refused"] for row in rows] == [1.0, 1.0]
    assert all("up_0" not in row and "up_1" in row for row in rows)


class Says:
    """A channel on which a member says all of `messages`, then what is nothing, endlessly."""

    def __init__(self, *messages: Any) -> None:
        self._messages, self.heard = list(messages), 0

    def poll(self, source: int, timeout_s: float) -> bool:
        return True

    def receive(self, source: int, timeout_s: float) -> Any:
        self.heard += 1
        found = self._messages.pop(0) if self._messages else ({"k": "noise", "at": [3]}, [])
        if isinstance(found, Exception):
            raise found
        return found


TOLD = ({"k": "told", "at": [3]}, [])


def inbox_of(channel: Says, stale: Callable[[int], None] = lambda number: None) -> Inbox:
    link = Link(channel, 0, lambda: False)
    return Inbox(link, "client0", 1 << 20, ("told",), 3, stale)


def test_what_has_no_end_is_not_heard_for_ever() -> None:
    channel = Says()
    inbox = inbox_of(channel)
    with pytest.raises(ProtocolError, match="bytes of client0; more came, and no end"):
        any(inbox.hear() for _ in range(HEARD_MOST + 1))
    assert channel.heard == HEARD_MOST


def test_a_flood_of_one_member_is_heard_a_part_at_a_time_where_others_are_waited_for() -> None:
    channel, left = Says(), dict[int, str]()
    rounds: Any = SimpleNamespace(_server=SimpleNamespace(channel=channel), left=left)
    inbox = inbox_of(channel)
    assert not Rounds._is_heard(rounds, 0, inbox)
    assert (channel.heard, left) == (AT_ONCE, {})
    while not left:
        assert not Rounds._is_heard(rounds, 0, inbox)
    assert "no end" in left[0]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([ProtocolError("expected a map; bytes came"), TOLD], "expected a map; bytes came"),
        ([({"k": "up", "at": [3]}, [memoryview(bytes(2 << 20))]), TOLD], "at most 1048576 bytes of client0"),
    ],
    ids=["no message", "too much"],
)
def test_what_is_wrong_in_an_update_is_said_at_its_end(messages: list[Any], says: str) -> None:
    """And not before: no later message is taken for a part of it."""
    inbox = inbox_of(Says(*messages))
    assert [inbox.hear() for _ in messages] == [False, True]
    with pytest.raises(ProtocolError, match=says):
        inbox.all()


def test_an_update_of_an_earlier_round_is_told_once_however_many_pieces_it_has() -> None:
    stale: list[int] = []
    pieces = [({"k": "up", "at": at}, []) for at in ([2], [2, 1], [2, 2])]
    inbox = inbox_of(Says(*pieces, ({"k": "up", "at": [3]}, []), TOLD), stale.append)
    while not inbox.hear():
        pass
    assert stale == [2]
    link = inbox.all()
    assert link.first == {"k": "up", "at": [3]}
    assert [link.next()[0]["k"] for _ in range(2)] == ["up", "told"]


@pytest.mark.parametrize("mode", ["synchronous", "semi-synchronous"])
def test_a_last_figure_that_is_none_loses_no_adapter(mode: str, tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, rounds=1, mode=mode)

    def wild(trainer: Any) -> None:
        real = trainer._tell

        def tell(number: int, figures: list[float]) -> None:
            real(number, [math.nan] * len(figures) if number else figures)

        trainer._tell = tell

    finished(run_threads(plan, changes={0: wild}))
    assert adapter_of(plan.folders[-1])


@pytest.mark.parametrize("poisoned", [1, 3])
def test_a_round_with_too_few_sound_updates_leaves_the_state_as_it_was(
    poisoned: int, tiny: Any, tmp_path: Path
) -> None:
    """Krum of five members, of whom one sends what is none in `poisoned` rounds of four."""
    plan = federated(tiny("llama")[1], tmp_path, method="krum", clients=[{}] * 5, rounds=4, liars=1)
    part = stranger(plan, lambda number, said, values: spoil(values, np.nan) if number < poisoned else None)

    def poisons(channel: Any) -> None:
        with contextlib.suppress(AssertionError):  # it waits for a server that has ended the job
            part(channel)

    outcomes = run_threads(plan, ranks={0: poisons})
    if poisoned == 3:  # nothing would ever come of it
        assert "expected 5 updates or more" in str(next(o.error for o in outcomes if o.error is not None))
        return
    rows = steps_of(finished(outcomes)[-1])
    assert [row.get("void", 0.0) for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert "residual" not in rows[0]
    assert adapter_of(plan.folders[-1])


@pytest.mark.parametrize(("job", "node"), [(0, 3), (3, 0), (500, 3), (3, 500)])
def test_a_member_that_says_it_has_many_rows_counts_as_the_least_bound(
    job: int, node: int, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """10^12 rows are 3, and the log names the member and counts."""
    made = []
    for name, says in (("lies", 10**12), ("honest", 3)):
        plan = federated(
            tiny("llama")[1], tmp_path / name, weight_most=job, node_weight_most=node, rounds=2, eval_rows=0
        )
        part = stranger(plan, lambda number, said, values, says=says: said.update(weight=says))
        with caplog.at_level(logging.WARNING):
            finished(run_threads(plan, ranks={0: part}))
        made.append(adapter_of(plan.folders[-1]))
    for name in made[0]:
        np.testing.assert_array_equal(made[0][name], made[1][name])
    found = [record for record in reasons(caplog, "weight bounded") if record.member == "client0"]
    assert [(r.round, r.said, r.counted, r.times) for r in found] == [(0, 10**12, 3, 1), (1, 10**12, 3, 2)]


def test_a_nodes_bound_is_a_setting_of_its_profile() -> None:
    entries = personal_lora.edged_aggregators({"weight_most": 700})
    assert {entry.weight_most for entry in entries} == {700}
    for settings, says in (
        ({"weight_least": 1}, "no setting plugin.personal_lora.weight_least; known: weight_most"),
        ({"weight_most": "many"}, "weight_most: expected rows from 0"),
        ({"weight_most": -1}, "weight_most: expected rows from 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            personal_lora.edged_aggregators(settings)


def test_a_masked_job_must_keep_the_nodes_bound_itself(tiny: Any, tmp_path: Path) -> None:
    """The server sees no weight, so the job's own bound must be within the node's."""
    plan = federated(
        tiny("llama")[1], tmp_path, clients=({}, {}, {}), masked=True, weight_most=9, node_weight_most=8
    )
    error = next(outcome.error for outcome in run_threads(plan) if "profile" in str(outcome.error))
    assert "expected weight_most of at most 8 in a masked job" in str(error)
