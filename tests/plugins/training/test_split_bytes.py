"""Predicted bytes are those that cross the sockets, counted between the processes by a relay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Processes, finished, planned, write_rows

Tiny = Callable[[str], tuple[Any, Path]]
WITHIN = 0.01

# What a job says; clients beside. A new topology is one row.
JOBS: dict[str, tuple[int, dict[str, Any]]] = {
    "label-sharing": (1, {}),
    "micro-batches": (1, {"micro_batches": 2}),
    "u-shape": (1, {"topology": "u-shape"}),
    "pipeline of two": (1, {"topology": "pipeline", "cut": [2], "micro_batches": 3}),
    "pipeline of three": (1, {"topology": "pipeline", "stages": 1, "micro_batches": 2}),
    "three in turn": (3, {"schedule": "sequential", "average_every": 2}),
    "three at once": (3, {"schedule": "client-batch", "average_every": 3}),
    "three adapters": (3, {"schedule": "server-hierarchical", "average_every": 3}),
    "three in turn, u-shape": (3, {"topology": "u-shape", "average_every": 2}),
    "three at once, u-shape": (3, {"topology": "u-shape", "schedule": "client-batch"}),
    "three adapters, u-shape": (3, {"topology": "u-shape", "schedule": "server-hierarchical"}),
    "f16": (1, {"codec": "f16"}),
    "int8": (1, {"codec": "int8"}),
    "topk": (1, {"codec": "topk", "ratio": 7.0}),
    "topk, pipeline": (1, {"topology": "pipeline", "stages": 1, "codec": "topk", "micro_batches": 2}),
    "adatopk": (1, {"codec": "adatopk", "ratio": 4.0, "topology": "u-shape"}),
    "adatopk, whole": (1, {"codec": "adatopk", "ratio": 1.5}),
    "clipped and noisy": (1, {"clip": 4.0, "noise": 0.1}),
    "submitted elsewhere": (1, {"is_apart": True, "topology": "u-shape"}),
    "sparse": (1, {"sparse": 0.5}),
    "parallel adapters": (1, {"topology": "parallel-adapters", "width": 8}),
    "remote-blocks": (1, {"topology": "remote-blocks"}),
    "prompts": (1, {"topology": "remote-blocks", "tune": "prompts", "cut": 0, "is_apart": True}),
    "private-lora": (1, {"topology": "private-lora", "is_apart": True}),
    "private-lora, int8": (
        1,
        {"topology": "private-lora", "codec": "int8", "target_modules": ["q_proj", "o_proj"]},
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_predicted_bytes_are_those_that_cross_the_sockets(
    job: str, tiny: Tiny, processes: Processes, tmp_path: Path
) -> None:
    clients, table = JOBS[job]
    rows = [write_rows(tmp_path / f"rows{i}", 7 + i, 2 + i, seed=i) for i in range(clients)]
    plan = planned(
        tiny("llama")[1], tmp_path, rows=rows, **{"steps": 4, "eval_every": 3, "checkpoint_every": 4, **table}
    )
    ran = processes.run(plan)
    assert plan.predicted_bytes(finished(ran.outcomes)) == pytest.approx(ran.bytes, rel=WITHIN)
