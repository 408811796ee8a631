"""Trainings on real nodes: what they answer, what they refuse, how they are stopped and gone on with."""

from __future__ import annotations

import pytest
import training_rig as rig
from support import Node, Nodes

for _name in rig.NEEDED:
    pytest.importorskip(_name, reason="needs the extra train: make install")

PHONE, CLOUD, DESK = "phone", "cloud", "desk"


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> list[Node]:
    """Paired nodes, each with the same rows as `sums`; the model is the phone's."""
    folder = tmp_path_factory.mktemp("files")
    rig.write_tiny(folder / "tiny.gguf")
    made = shared_nodes.group(PHONE, CLOUD, DESK, plugins=rig.TRAINS)
    for node in made:
        rig.add_rows(node, rig.write_rows(folder / "rows.jsonl"))
        node.add(folder / "tiny.gguf", rig.MODEL)
    return made


def test_label_sharing(trio: list[Node]) -> None:
    phone, cloud, desk = trio
    document = rig.finetune(phone, rig.asked(rig.table([(PHONE, "sums")], CLOUD)))
    print(document)
    assert 0
