"""A training that was stopped and goes on ends with the adapter of one that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rig import (
    Outcome,
    assert_same_bits,
    finished,
    last_common,
    lora_of,
    planned,
    run_threads,
    stopping_at,
    write_rows,
)

Tiny = Callable[[str], tuple[Any, Path]]
STEPS = 8
STOPS = (1, 4, 7)  # before these steps; checkpoints are made after every second one

JOBS: dict[str, tuple[int, dict[str, Any]]] = {
    "local": (1, {"topology": "local", "dropout": 0.2}),
    "top-k with feedback": (1, {"codec": "topk", "ratio": 5.0, "dropout": 0.2}),
    "u-shape": (1, {"topology": "u-shape", "codec": "topk", "ratio": 5.0, "dropout": 0.2}),
    "pipeline": (
        1,
        {"topology": "pipeline", "stages": 1, "micro_batches": 2, "dropout": 0.2, "codec": "topk"},
    ),
    "sparse": (1, {"sparse": 0.4, "weight_decay": 0.1}),
    "noisy": (1, {"clip": 3.0, "noise": 0.05}),
    "parallel adapters": (1, {"topology": "parallel-adapters", "width": 8}),
    "three in turn": (3, {"schedule": "sequential", "average_every": 3, "dropout": 0.2}),
    "three at once": (3, {"schedule": "client-batch", "average_every": 3, "codec": "topk"}),
    "three adapters": (3, {"schedule": "server-hierarchical", "average_every": 3, "dropout": 0.2}),
    "three adapters, u-shape": (3, {"topology": "u-shape", "schedule": "server-hierarchical"}),
    "three adapters, sparse": (2, {"schedule": "server-hierarchical", "average_every": 3, "sparse": 0.4}),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(job: str, tiny: Tiny, tmp_path: Path) -> None:
    clients, table = JOBS[job]
    rows = [write_rows(tmp_path / f"rows{i}", 7 + i, 1, seed=i) for i in range(clients)]
    settings = {"rows": rows, "steps": STEPS, "checkpoint_every": 2, "eval_every": 3, **table}
    path = tiny("llama")[1]
    whole, broken = (planned(path, tmp_path / name, **settings) for name in ("whole", "broken"))
    for folder in (*whole.folders, *broken.folders) if "noise" in table else ():
        folder.mkdir(parents=True)
        (folder / "noise.secret").write_bytes(bytes(32))  # the same in both
    expected = finished(run_threads(whole))

    def check_evaluations(outcomes: Sequence[Outcome]) -> set[int]:
        """Whatever was evaluated is what the whole run found there; the steps."""
        for one, other in zip(outcomes, expected, strict=True):
            assert one.evals.items() <= other.evals.items()
        return {step for outcome in outcomes for step in outcome.evals}

    step, stopping = 0, [outcome.rank for outcome in expected if outcome.survey["keeps"]]
    evaluated: set[int] = set()
    for number, stop in enumerate(STOPS):
        stopped = finished(
            run_threads(broken, step, changes={stopping[number % len(stopping)]: stopping_at(stop)})
        )
        evaluated |= check_evaluations(stopped)
        step = last_common(stopped)
        assert stop - 2 <= step <= stop
    ended = finished(run_threads(broken, step))
    assert_same_bits(lora_of(ended), lora_of(expected))
    for one, other in zip(ended, expected, strict=True):
        assert_same_bits(one.lora, other.lora) if one.lora else None
    assert evaluated | check_evaluations(ended) == {0, 3, 6, STEPS}
