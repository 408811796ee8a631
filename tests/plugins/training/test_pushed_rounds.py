"""Servers that wait for nobody, over tiny models: who is waited for, what counts, how a job goes on."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins._tensors.adapters import pairs_of, read_peft
from edged_plugins._training.link import Stopped
from edged_plugins.personal_lora import ASYNCHRONOUS
from edged_plugins.personal_lora._asynchronous import REFUSED_MOST
from rig import Outcome, Planned, finished, raised, run_threads
from rounds_rig import federated

from edged import EngineError

METHODS = [entry.name for entry in ASYNCHRONOUS]


def steps_of(outcome: Outcome) -> list[dict[str, float]]:
    return [values for kind, _, values in outcome.reports if kind == "step"]


def pushes_in(values: dict[str, float]) -> set[int]:
    """Ranks whose pushes are in a revision."""
    return {int(key.removeprefix("up_")) for key in values if key.startswith("up_")}


def made_by(plan: Planned) -> dict[str, np.ndarray]:
    config, tensors = read_peft(plan.folders[-1] / "adapter")
    return {name: pair.scale * pair.b @ pair.a for name, pair in pairs_of(config, tensors).items()}


def slower(times: float, trainers: dict[int, Any]) -> dict[int, Any]:
    """Changes that have member 1 wait in each turn for so many counted pushes of member 0."""

    def keep(trainer: Any) -> None:
        trainers[trainer.rank] = trainer

    def change(trainer: Any) -> None:
        keep(trainer)
        real, turn = trainer._steps, trainer.channel._hall.turn

        def steps(*given: Any, **named: Any) -> Any:
            fence = trainers[2].aggregator.core.fence
            goal = fence.turn(0) + times
            while fence.turn(0) < goal:
                trainer.look()
                turn.release()
                time.sleep(0.002)  # others have the turn now: it is slow by theirs, not by a clock
                turn.acquire()
            return real(*given, **named)

        trainer._steps = steps

    return {1: change, 2: keep}


def breaking_at(number: int) -> Any:
    """A change that has a server die before it makes revision `number` + 1."""

    def change(trainer: Any) -> None:
        real = trainer.round

        def until(at: int, report: Any) -> None:
            if at == number:
                raise EngineError("it breaks here")
            real(at, report)

        trainer.round = until

    return change


@pytest.mark.parametrize("method", METHODS)
def test_members_that_nobody_waits_for_make_an_adapter_that_has_learned(
    method: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method=method, rounds=6, local_steps=6)
    server = finished(run_threads(plan))[-1]
    assert [at for kind, at, _ in server.reports if kind == "step"] == list(range(6))
    assert server.evals[6] < server.evals[0]
    assert any(product.any() for product in made_by(plan).values())


@pytest.mark.parametrize("submitter", ["client1", "laptop"])
def test_the_adapter_is_written_where_the_job_was_submitted(
    submitter: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method="fedbuff", submitter=submitter)
    finished(run_threads(plan))
    assert [(folder / "adapter").is_dir() for folder in plan.folders] == [
        rank == plan.plan.collector for rank in range(len(plan.specs))
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_slow_member_stops_no_revision_and_its_pushes_count_when_they_come(
    method: str, tiny: Any, tmp_path: Path
) -> None:
    """Five times as slow: of six pushes one is its own."""
    plan = federated(tiny("llama")[1], tmp_path, method=method, rounds=12, local_steps=1, eval_rows=0)
    trainers: dict[int, Any] = {}
    server = finished(run_threads(plan, changes=slower(5, trainers)))[-1]
    revisions = steps_of(server)
    assert len(revisions) == 12
    fast, late = (trainers[2].aggregator.core.fence.turn(rank) for rank in (0, 1))
    assert fast >= 5 * late > 0
    assert sum(pushes_in(values) == {0} for values in revisions) >= 12 - late
    assert max(values["staleness"] for values in revisions if 1 in pushes_in(values)) > 0


def test_what_a_member_trains_as_the_last_revision_comes_is_given_up(tiny: Any, tmp_path: Path) -> None:
    """It would never push; it has the adapter all the same."""
    plan = federated(tiny("llama")[1], tmp_path, method="delayed-nesterov", dropout=0.1)
    trainers: dict[int, Any] = {}
    server = finished(run_threads(plan, changes=slower(math.inf, trainers)))[-1]
    assert [pushes_in(values) for values in steps_of(server)] == [{0}, {0}]
    assert not trainers[1].model.span.training
    own = trainers[1].model.factors()
    for name, product in made_by(plan).items():
        a, b = next(pair for layer, pair in own.items() if layer.endswith(name) or name.endswith(layer))
        np.testing.assert_allclose(2.0 * b @ a, product, atol=1e-6)


def test_pushes_of_all_in_one_revision_are_federated_averaging(tiny: Any, tmp_path: Path) -> None:
    """A buffer as large as the cohort, one revision, everybody fresh: the bits differ by a difference's
    rounding alone, and the residual is that of plain averaging."""
    path = tiny("llama")[1]
    adapters, residuals = [], []
    for method, more in (("fedavg", {}), ("fedbuff", {"buffer": 2})):
        plan = federated(path, tmp_path / method, method=method, rounds=1, eval_rows=0, **more)
        server = finished(run_threads(plan))[-1]
        assert pushes_in(steps_of(server)[0]) == {0, 1}
        adapters.append(made_by(plan))
        residuals.append(steps_of(server)[0]["residual"])
    for name, product in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], product, rtol=0, atol=1e-6)
    assert residuals[1] == pytest.approx(residuals[0], rel=1e-3)
    assert residuals[0] > 1e-3


def test_delayed_nesterov_tells_no_residual(tiny: Any, tmp_path: Path) -> None:
    """One push in a window is no mean."""
    plan = federated(tiny("llama")[1], tmp_path, method="delayed-nesterov")
    assert all("residual" not in values for values in steps_of(finished(run_threads(plan))[-1]))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_server_goes_on_from_its_state_and_counts_no_push_twice(
    method: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method=method, rounds=4, eval_rows=0)
    kept: dict[str, Any] = {}

    def dying(trainer: Any) -> None:
        breaking_at(2)(trainer)
        save = trainer.checkpoints.save

        def saved(step: int, arrays: Any, words: Any) -> None:
            kept.update({name: array.copy() for name, array in arrays.items()})
            save(step, arrays, words)

        trainer.checkpoints.save = saved

    outcomes = run_threads(plan, changes={2: dying})
    assert str(raised(outcomes)) == "it breaks here"
    assert [out.survey.get("keeps", True) for out in outcomes] == [False, False, True]
    seen: dict[str, Any] = {}

    def watched(trainer: Any) -> None:
        restore = trainer._restore

        def restored(step: int) -> None:
            restore(step)
            seen.update(trainer.state())

        trainer._restore = restored

    again = finished(run_threads(plan, 2, changes={2: watched}, keep="messages"))[-1]
    assert seen.keys() == kept.keys()
    for name, array in kept.items():
        assert array.tobytes() == seen[name].tobytes(), name
    counted = dict(kept["aggregator.turns"].tolist())
    first = {source: header for source, header, _ in reversed(again.received) if header["k"] == "up"}
    for source, header in first.items():  # no turn that counted is pushed again
        assert header.get("turn", 0) >= counted.get(source, 0)
    assert len(steps_of(again)) == 2


def test_a_push_that_must_not_count_costs_itself(tiny: Any, tmp_path: Path) -> None:
    """Sent twice, of a turn or a revision to come, not finite, a loss to come: refused, and others go on."""
    plan = federated(tiny("llama")[1], tmp_path, method="fedbuff", rounds=8, eval_rows=0)
    trainers: dict[int, Any] = {}

    def wild(trainer: Any) -> None:
        real, wrong = trainer._turn, [(0, 0, 0.0), (0, 7, 0.0), (99, 1, 0.0), (0, 1, np.nan)]

        def turn(revision: int, way: Any) -> None:
            real(revision, way)
            size = trainer.flat(trainer._loaded, "AB").size
            if wrong:
                way.send("told", [50], {}, [bytes(64)])
            while wrong:
                at, number, value = wrong.pop(0)
                words = {"weight": 9, "of": size, "turn": number}
                way.send_values("up", [at], words, np.full(size, value, "<f4"))
                way.send("told", [at], {}, [bytes(64)])

        trainer._turn = turn

    changes = {1: wild, 2: lambda trainer: trainers.__setitem__(2, trainer)}
    server = finished(run_threads(plan, changes=changes))[-1]
    assert steps_of(server)[-1]["refused"] >= 5
    refused = trainers[2].aggregator.core.fence.refused
    assert refused["update-replay"] >= 1
    assert refused["update-future"] >= 2
    for product in made_by(plan).values():
        assert np.isfinite(product).all()


def test_a_member_that_only_says_nonsense_is_not_heard_any_longer(tiny: Any, tmp_path: Path) -> None:
    """And the others' pushes make every revision; its word for its rows is bounded by the server's node."""
    plan = federated(
        tiny("llama")[1], tmp_path, method="fedbuff", rounds=6, buffer=1, eval_rows=0, node_weight_most=2
    )

    def wild(trainer: Any) -> None:
        def turn(revision: int, way: Any) -> None:
            for _ in range(3 * REFUSED_MOST):
                way.send("told", [50], {}, [bytes(64)])
            raise Stopped

        trainer._turn = turn

    server = finished(run_threads(plan, changes={1: wild}))[-1]
    rows = steps_of(server)
    assert len(rows) == 6
    assert REFUSED_MOST < rows[-1]["refused"] <= REFUSED_MOST + 2
    assert all("up_1" not in row for row in rows)


def test_slow_members_take_fewer_steps_where_those_are_dynamic(tiny: Any, tmp_path: Path) -> None:
    """Of 10 and of 2 steps a second."""
    plan = federated(
        tiny("llama")[1], tmp_path, method="fedbuff", rounds=6, local_steps=8, eval_rows=0, dynamic_steps=True
    )

    def paced(trainer: Any) -> None:
        real = trainer._pace

        def pace(rank: int) -> None:
            real(rank)
            trainer._speeds[rank] = (10.0, 2.0)[rank]

        trainer._pace = pace

    outcomes = finished(run_threads(plan, changes={2: paced}, keep="messages"))
    asked = [[header for _, header, _ in outcomes[rank].received if "steps" in header] for rank in (0, 1)]
    assert {header["steps"] for header in asked[0]} == {8}
    assert [header["steps"] for header in asked[1]][:: len(asked[1]) - 1] == [8, 1]
    for headers in asked:  # rows go on where the last counted push ended
        assert [header["first"] for header in headers] == [
            sum(header["steps"] for header in headers[:turn]) for turn in range(len(headers))
        ]
