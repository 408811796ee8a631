"""Seeded faults against trainings that run; `make chaos` has the long ones.

Whatever is killed, frozen or restarted, the job ends by itself, and its adapter is that of a run which
nothing disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import training_rig as rig
from faults import Faults
from support import Node, Nodes, wait_no_workers, wait_online

NAMES = ("phone", "cloud", "desk")  # client, server, coordinator
STEP_S = 0.05


@pytest.fixture
def trio(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    rig.install_abacus(tmp_path / "plugin", monkeypatch)
    made = nodes.group(*NAMES, plugins=rig.ABACUS)
    rig.give(made, tmp_path)
    yield made
    wait_no_workers(*(node for node in made if node.process is not None))


def survive(trio: list[Node], folder: Path, faults: Faults, count: int) -> None:
    """A job with `count` faults, one after the other, each when it has gone on for some steps."""
    desk, steps = trio[2], 40 * (count + 1)
    job = rig.begun(desk, rig.abacus(["phone"], "cloud", step_s=STEP_S, steps=steps, checkpoint_every=2))
    reached = 0
    while faults.count < count:
        stream = rig.followed(desk, job)
        reached = stream.until("step", step=min(reached + faults.pause(), steps - 2))["step"]
        stream.vanish()
        faults.strike()
        wait_online(trio)
    document = rig.followed(desk, job).end()
    told = {row[0] for row in rig.steps_told(desk, job)}
    assert sorted(set(range(steps)) - told) == []
    assert len(document["loss"]) == steps
    assert rig.numbers_of(desk, document["adapter"]) == rig.expected(folder / "abacus.jsonl", 1, steps)
    assert rig.row_of(desk, job)["state"] == "done"
    print(f"\n{count} faults: {dict(faults.done)}; epochs: {document['plan']['epoch']}")


def test_three_faults_change_nothing(trio: list[Node], tmp_path: Path) -> None:
    survive(trio, tmp_path, Faults(trio, 5, ("worker", "daemon")), 3)


@pytest.mark.slow
def test_a_frozen_worker_is_noticed_by_its_silence(trio: list[Node], tmp_path: Path) -> None:
    survive(trio, tmp_path, Faults(trio[:2], 1, ("freeze",)), 1)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_many_faults_change_nothing(trio: list[Node], tmp_path: Path, seed: int) -> None:
    survive(trio, tmp_path, Faults(trio, seed, ("worker", "worker", "daemon")), 10)
