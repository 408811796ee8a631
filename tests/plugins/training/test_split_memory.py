"""What a rank is said to take covers what it holds, and grows with what makes it hold more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edged_plugins._training import sizes
from edged_plugins.split_learning import _cost, edged_trainings
from edged_plugins.split_learning._job import read
from edged_plugins.split_learning._places import Places
from rig import Planned, finished, planned, run_threads, write_rows

from edged import ConfigError

Tiny = Callable[[str], tuple[Any, Path]]


def memories(plan: Planned) -> list[int]:
    return [role.memory_bytes for role in plan.plan.roles]


def test_a_stage_holds_the_activations_of_as_many_micro_batches_as_are_under_way(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Of 8 rows in 8 micro-batches over 3 stages: 3, 2 and 1; never more than there are."""
    settings = {"topology": "pipeline", "stages": 1}
    path = tiny("llama")[1]
    one = planned(path, tmp_path, batch_size=1, micro_batches=1, **settings)
    many = planned(path, tmp_path, batch_size=8, micro_batches=8, **settings)
    two = planned(path, tmp_path, batch_size=2, micro_batches=8, **settings)
    model = one.model
    for plan, windows in ((many, (3, 2, 1)), (two, (2, 2, 1))):
        for rank, window in enumerate(windows):
            first, last = plan.plan.roles[rank].layers
            saved = (last - first) * sizes.saved_values(model) + 4 * model.hidden
            assert memories(plan)[rank] - memories(one)[rank] == (window - 1) * 4 * 32 * saved


def test_rows_of_all_clients_are_in_the_servers_memory_alone(tiny: Tiny, tmp_path: Path) -> None:
    rows, path = [write_rows(tmp_path / "rows", 4, 0)] * 3, tiny("llama")[1]
    plans = {
        schedule: planned(path, tmp_path, rows=rows, schedule=schedule)
        for schedule in ("sequential", "client-batch", "server-hierarchical")
    }
    in_turn, together, apart = (memories(plan) for plan in plans.values())
    assert in_turn[:3] == together[:3] == apart[:3]
    fixed = sizes.WORKER_BYTES
    assert together[3] > in_turn[3]
    assert together[3] - fixed < 3 * (in_turn[3] - fixed)
    outcomes = finished(run_threads(plans["server-hierarchical"]))
    assert apart[3] - in_turn[3] >= 3 * 3 * 4 * outcomes[3].survey["adapter_values"]


@pytest.mark.parametrize(
    ("clients", "table"),
    [
        (1, {"micro_batches": 2}),
        (3, {"schedule": "client-batch"}),
        (2, {"topology": "u-shape"}),
        (1, {"topology": "pipeline", "stages": 1, "micro_batches": 2}),
        (1, {"topology": "private-lora"}),
        (1, {"topology": "remote-blocks"}),
        (1, {"topology": "u-shape", "error_feedback": False}),
    ],
)
def test_what_top_k_leaves_out_is_counted(
    clients: int, table: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    rows = [write_rows(tmp_path / f"rows{i}", 7 + i, 0, seed=i) for i in range(clients)]
    plan = planned(
        tiny("llama")[1], tmp_path, rows=rows, codec="topk", steps=4, batch_size=4, eval_rows=0, **table
    )
    held: dict[int, int] = {}

    def noting(trainer: Any) -> None:
        real = trainer.finish

        def finish(report: Any) -> None:
            states = [link.codec.state_dict() for link in trainer._links.values()]
            held[trainer.rank] = sum(4 * kept.numel() for state in states for kept in state.values())
            real(report)

        trainer.finish = finish

    finished(run_threads(plan, changes=dict.fromkeys(range(len(plan.specs)), noting)))
    job = read(plan.plan.settings)
    places = Places(job, plan.plan.roles, plan.model.layers, plan.plan.collector)
    for rank, size in held.items():
        counted = _cost._residual_bytes(job, plan.model, places, rank)
        assert (counted > 0) == (size > 0)
        assert counted >= size
    assert any(held.values()) == job.error_feedback


def test_the_asked_node_counts_as_the_planner_does_and_refuses_what_no_plan_has(
    tiny: Tiny, tmp_path: Path
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, is_apart=True)
    split, local = edged_trainings({})
    assert split.memory is not None
    assert local.memory is not None
    roles, settings = plan.plan.roles, dict(plan.plan.settings)
    assert [split.memory(settings, plan.model, roles, role.rank) for role in roles] == memories(plan)
    alone = planned(tiny("llama")[1], tmp_path, topology="local")
    assert local.memory(alone.plan.settings, plan.model, alone.plan.roles, 0) == memories(alone)[0]
    for wrong, kept in (({"cut": 99}, roles), ({"cut": "auto"}, roles), ({}, roles[:1])):
        with pytest.raises(ConfigError):
            split.memory(settings | wrong, plan.model, kept, 0)
