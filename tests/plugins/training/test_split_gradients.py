"""A split training computes what an unsplit one does, over real sockets between real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Processes, finished, gradients_of, largest_difference, plain_loop, planned, run_threads

Tiny = Callable[[str], tuple[Any, Path]]
EXACT = 1e-6

CUTS = [("label-sharing", cut) for cut in (1, 2, 3)] + [("u-shape", cut) for cut in (1, 2)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("topology", "cut"), CUTS)
def test_a_split_gradient_is_the_unsplit_ones(
    topology: str, cut: int, family: str, tiny: Tiny, processes: Processes, tmp_path: Path
) -> None:
    model, path = tiny(family)
    plan = planned(path, tmp_path, topology=topology, cut=cut, steps=2)
    outcomes = finished(processes.run(plan).outcomes)
    start = {name: value for outcome in outcomes for name, value in outcome.start.items()}
    plain = plain_loop(model, plan, start)
    for step in range(2):  # at the first A has no gradient, since B is zero
        assert largest_difference(gradients_of(outcomes, step), plain.gradients[step]) <= EXACT
    assert max(abs(value).max() for value in plain.gradients[1].values()) > 1e-3


CHAINS: list[dict[str, Any]] = [
    {"topology": "local"},
    {"topology": "label-sharing", "cut": 1},
    {"topology": "label-sharing", "cut": 2, "micro_batches": 3},
    {"topology": "u-shape", "cut": 1},
    {"topology": "pipeline", "cut": [2], "micro_batches": 2},
    {"topology": "pipeline", "stages": 1, "micro_batches": 3},
    {"topology": "pipeline", "stages": 2, "micro_batches": 1},
]


@pytest.mark.parametrize("table", CHAINS, ids=lambda table: "-".join(map(str, table.values())))
def test_twenty_steps_follow_a_plain_loop_on_the_same_batches(
    table: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    model, path = tiny("llama")
    plan = planned(path, tmp_path, steps=20, eval_every=0, checkpoint_every=20, **table)
    outcomes = finished(run_threads(plan))
    start = {name: value for outcome in outcomes for name, value in outcome.start.items()}
    plain = plain_loop(model, plan, start)
    losses = next(outcome.losses for outcome in outcomes if outcome.losses)
    assert losses == pytest.approx(plain.losses, abs=1e-4)
    assert plain.losses[-1] < plain.losses[0]
