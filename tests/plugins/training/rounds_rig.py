"""Federated jobs over tiny models, for `rig.run_threads` and its processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edged_plugins import personal_lora, zeroth_order
from edged_plugins.personal_lora._trainer import load
from rig import Planned, described, write_rows

from edged import EngineError, NodeView, Training, TrainingSpec

AGGREGATORS = {
    entry.name: entry for entry in (*personal_lora.edged_aggregators({}), *zeroth_order.edged_aggregators({}))
}
LOADS = {name: entry.load for name, entry in AGGREGATORS.items()}
JOINS = {name: (entry.joins, entry.replays) for name, entry in AGGREGATORS.items() if entry.joins}
LOCALS = {name: entry.local for name, entry in AGGREGATORS.items() if entry.local}
WHOLES = {name: entry.whole for name, entry in AGGREGATORS.items() if entry.whole}
ADAPTER_KEYS = ("r", "alpha", "target_modules")
TRAINING: Training = personal_lora.edged_trainings(AGGREGATORS)[0]


def federated(
    path: Path,
    folder: Path,
    *,
    rows: Sequence[Path] = (),
    clients: Sequence[Mapping[str, Any]] = ({}, {}),
    submitter: str = "server",
    node_weight_most: int = 0,
    **table: Any,
) -> Planned:
    """A job over the model file at `path`; `clients` have what their tables say, and rows of their own."""
    model = described(path)
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows) or [
        write_rows(folder / f"rows{i}.jsonl", count=6 + 3 * i, seed=i) for i in range(len(clients))
    ]
    names = [f"client{i}" for i in range(len(clients))]
    settings: dict[str, Any] = {
        "model": "tiny",
        "method": "fedavg",
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "r": 4,
        "alpha": 8.0,
        "max_length": 32,
        "eval_rows": 8,
        "target_modules": ["c_attn"] if model.architecture == "gpt2" else ["q_proj", "v_proj"],
        "clients": [
            {"node": name, "data": "rows"} | dict(client) for name, client in zip(names, clients, strict=True)
        ],
        "server": {"node": "server"},
    } | table
    if settings.get("parameters") == "all":  # there is no adapter to describe
        settings = {key: value for key, value in settings.items() if key not in ADAPTER_KEYS}
    every = dict.fromkeys([submitter, *names, "server"])
    plan = TRAINING.plan(TRAINING.check(settings), model, [NodeView(name, name) for name in every])
    assert not plan.refused_because
    specs = tuple(
        TrainingSpec(
            "job",
            plan.settings,
            plan.roles,
            rank,
            str(rows[rank]) if plan.data[rank] else "",
            str(folder / f"rank-{rank}"),
            plan.collector,
            "tiny",
            "0" * 64,
            aggregators=LOADS,
            locals=LOCALS,
            joins=JOINS,
            wholes=WHOLES,
            weight_most=node_weight_most,
        )
        for rank in range(len(plan.roles))
    )
    return Planned(plan, model, path, specs, load, TRAINING.cost)


def breaks_before(round: int) -> Callable[[Any], None]:
    """A change of a trainer: it fails where that round of its begins."""

    def change(trainer: Any) -> None:
        real = trainer.round

        def until(number: int, report: Any) -> None:
            if number == round:
                raise EngineError("it breaks here")
            real(number, report)

        trainer.round = until

    return change
