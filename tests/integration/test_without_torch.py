"""Federated rounds where some nodes have no PyTorch: they evaluate losses with the engine that serves."""

from __future__ import annotations

import pytest
import training_rig as rig
from support import Document, Node, Nodes, pair_all

from edged import EdgedError

for _name in rig.NEEDED:
    pytest.importorskip(_name, reason="needs the extra train: make install")

DESK, PHONE, HUB = "desk", "phone", "hub"
PLUGINS = (*rig.TRAINS, "personal_lora", "zeroth_order", "shard")
HIDES = '''
import importlib.machinery
import sys


class Without(importlib.machinery.PathFinder):
    """As if these were not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "transformers", "peft")
        return None if hidden else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
'''


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> list[Node]:
    """Paired nodes, of which the first alone has PyTorch; the model and some rows are its own."""
    folder = tmp_path_factory.mktemp("files")
    rig.write_tiny(folder / "tiny.gguf")
    (folder / "sitecustomize.py").write_text(HIDES)
    hidden = ("env", f"PYTHONPATH={folder}")
    budget = {"memory": "2GiB"}
    [desk] = shared_nodes.start(DESK, plugins=PLUGINS, budget=budget)
    others = shared_nodes.start(PHONE, HUB, plugins=PLUGINS, budget=budget, prefix=hidden)
    made = [desk, *others]
    pair_all(made)
    for first, node in enumerate(made[:2]):
        rig.add_rows(node, rig.write_rows(folder / f"rows{first}.jsonl", first))
    desk.add(folder / "tiny.gguf", rig.MODEL)
    return made


def job(**changes: object) -> Document:
    settings = {
        "model": rig.MODEL,
        "method": "fedkseed",
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 2,
        "max_length": 48,
        "learning_rate": 1e-3,
        "r": 2,
        "alpha": 4.0,
        "eval_rows": 4,
        "clients": [{"node": DESK, "data": "sums"}, {"node": PHONE, "data": "sums"}],
        "server": {"node": HUB},
    }
    return rig.asked(settings | changes, "federated")


def test_members_and_a_server_without_pytorch_make_an_adapter(trio: list[Node]) -> None:
    document = rig.finetune(trio[0], job(adapter="seeded"))
    assert [row["round"] for row in document["rounds_log"]] == [0, 1]
    phone = trio[1].node_id
    for row in document["rounds_log"]:
        assert set(row["members"]) == {trio[0].node_id, phone}
        assert 0 < row["bytes_up"][phone] < 18 << 10
    kinds = {row["kind"] for row in document["egress"] if row["from"] == phone}
    assert "part" not in kinds
    asked = {"model": rig.MODEL, "prompt": "Add", "n": 4, "temperature": 0.0, "adapter": "seeded"}
    assert trio[0].call("generate", asked | {"raw": True, "strategy": "local"})["tokens"]
    assert "torch" not in trio[1].log_tail()


def test_a_node_without_pytorch_gets_an_adapter_that_it_asked_for(trio: list[Node]) -> None:
    """Its own model and rows, and the others do the work."""
    document = rig.finetune(trio[2], job(server={"node": HUB}, adapter="hubs"))
    assert document["adapter"] == "hubs"
    asked = {"model": rig.MODEL, "prompt": "Add", "n": 4, "temperature": 0.0, "adapter": "hubs"}
    assert trio[2].call("generate", asked | {"raw": True, "strategy": "local"})["tokens"]


def test_gradients_on_a_node_without_pytorch_are_refused_by_its_name(trio: list[Node]) -> None:
    with pytest.raises(
        EdgedError, match="phone has shard and not torch_blocks, and takes no part in a job of fedavg"
    ):
        rig.finetune(trio[0], job(method="fedavg"))
