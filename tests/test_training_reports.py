"""Figures of several ranks become one, whatever some of them have to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged import wire
from edged.figures import mean
from edged.training import Trainings
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
