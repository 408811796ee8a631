"""The life of a training job on real nodes, played with an abacus: accepted, followed, lost, gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import training_rig as rig
from support import Node, Nodes, wait_no_workers, wait_online

PHONE, CLOUD, DESK = "phone", "cloud", "desk"


@pytest.fixture(scope="module")
def patched() -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def trio(
    shared_nodes: Nodes, rows: Path, tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch
) -> list[Node]:
    rig.install_abacus(tmp_path_factory.mktemp("plugin"), patched)
    made = shared_nodes.group(PHONE, CLOUD, DESK, plugins=rig.ABACUS)
    rig.give(made, rows)
    return made


def test_abacus(trio: list[Node], rows: Path) -> None:
    phone, cloud, desk = trio
    document = rig.finetune(phone, rig.abacus([PHONE], CLOUD))
    assert rig.numbers_of(phone, document["adapter"]) == rig.expected(rows / "abacus.jsonl", 1, 4)
    document = rig.finetune(desk, rig.abacus([PHONE], CLOUD, steps=7))
    assert rig.numbers_of(desk, document["adapter"]) == rig.expected(rows / "abacus.jsonl", 1, 7)
    assert document["measured"]["beads"] == 2.0  # the most that a rank says it spends
    assert "wires" not in document["measured"]
    print(document)
