"""Figures of several ranks become one, whatever some of them have to say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged import wire
from edged.figures import mean
from edged.training import BACK_S, Trainings
from edged.training_run import TrainingRun
from edged.types import TrainingPlan

LOSS = {"loss": 2.5, "targets": 7.0}
TWO = TrainingPlan({}, reporters=(0, 1), steps=9)


class Told:
    """A training of which two ranks tell the loss, and what came of their reports."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, str, dict[str, float]]] = []
        self.trainings = object.__new__(Trainings)
        self.trainings._store = cast("Any", SimpleNamespace(add_step=self._add))
        nothing = cast("Any", None)
        self.run = TrainingRun("j", nothing, nothing, {}, 0.0, finished=nothing)  # a future needs a loop

    def _add(self, job: str, step: int, kind: str, values: dict[str, float]) -> None:
        self.kept.append((step, kind, values))

    def report(self, rank: int, kind: str, **values: float) -> None:
        body = wire.Trained("j", 0, rank, kind, 3, values)
        self.trainings._report(self.run, TWO, body)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_without_rows_of_its_own_lets_the_others_loss_be_told(silent: int) -> None:
    told = Told()
    for rank in (0, 1):
        told.report(rank, "eval", **({"loss": 0.0, "targets": 0.0} if rank == silent else LOSS))
    assert told.run.evals == {3: LOSS | {"seconds": 0.0}}
    assert [event["event"] for event in told.run.told] == ["eval"]


def test_of_no_rows_at_all_no_evaluation_is_told() -> None:
    told = Told()
    for rank in (0, 1):
        told.report(rank, "eval", loss=0.0, targets=0.0)
    assert (told.run.evals, told.run.told, told.kept, told.run.reports) == ({}, [], [], {})


def test_a_step_without_targets_is_told_all_the_same() -> None:
    told = Told()
    for rank in (0, 1):
        told.report(rank, "step", loss=0.0, targets=0.0)
    assert told.run.losses == {3: 0.0}


def test_losses_are_weighed_by_their_targets() -> None:
    found = mean([LOSS, {"loss": 1.0, "targets": 3.0}, {"loss": float("nan"), "targets": 0.0}])
    assert found["loss"] == pytest.approx((2.5 * 7 + 1.0 * 3) / 10)
    assert found["targets"] == 10


# --- ranks that left ------------------------------------------------------------------------------


class Away:
    """A training that rank 1 has left, and what its node seems to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.online, self.refuses, self.answers = 1000.0, True, "", True
        told = Told()
        self.told, self.run = told, told.run
        roles = [SimpleNamespace(node_id=name) for name in ("phone", "jetson")]
        self.group = cast("Any", SimpleNamespace(away={1: "it left"}, refused=set(), load_ms=1.0))
        self.group.load = SimpleNamespace(roles=roles, optional={0, 1})
        told.trainings._viewer = cast("Any", SimpleNamespace(views=self._views))
        told.trainings._peers = cast(
            "Any", SimpleNamespace(is_online=lambda node_id: self.online, name_of=lambda node_id: node_id)
        )
        monkeypatch.setattr("edged.training.time", SimpleNamespace(monotonic=lambda: self.now))

    async def _views(self, measure: bool) -> list[Any]:
        return [SimpleNamespace(node_id="jetson", refuses=self.refuses)] if self.answers else []

    def look(self, after_s: float) -> tuple[int, ...]:
        self.now += after_s
        asyncio.run(self.told.trainings._look_who_is_back(self.run, self.group))
        return self.run.returning


def test_a_node_that_is_back_for_long_enough_is_to_take_part_again(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(monkeypatch)
    assert away.look(0.0) == ()
    away.answers = False  # a busy node that is silent once is no node that went
    assert away.look(BACK_S - 1) == ()
    assert away.look(1.0) == (1,)


@pytest.mark.parametrize(("online", "refuses"), [(False, ""), (True, "its battery is low")])
def test_a_node_that_goes_again_is_waited_for_anew(
    online: bool, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(monkeypatch)
    away.look(0.0)
    away.online, away.refuses = online, refuses
    assert away.look(BACK_S) == ()
    away.online, away.refuses = True, ""
    assert away.look(1.0) == ()
    assert away.look(BACK_S) == (1,)


def test_loading_that_takes_long_is_worth_a_longer_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(monkeypatch)
    away.group.load_ms = 60_000.0
    away.look(0.0)
    assert away.look(119.0) == ()
    assert away.look(1.0) == (1,)


def test_a_rank_that_failed_by_itself_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(monkeypatch)
    away.run.failed_ranks.add(1)
    away.look(0.0)
    assert away.look(BACK_S) == ()


def test_a_rank_whose_node_is_there_and_says_no_is_not_asked_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = Away(monkeypatch)
    away.group.refused.add(1)
    away.look(0.0)
    assert away.look(BACK_S) == ()
