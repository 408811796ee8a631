"""Seeded faults against federated rounds with tensors: 50 of them, in five jobs of unlike methods.

Whoever is killed, member, server or the node that asked, in whatever part of a round: the job ends by itself
with the bytes of a run that nothing disturbed, and each round counts each member once.
"""

from __future__ import annotations

from typing import Any

import pytest
import training_rig as rig
from faults import Faults
from support import Document, Node, Nodes, wait_no_workers, wait_online

for _name in rig.NEEDED:
    pytest.importorskip(_name, reason="needs the extra train: make install")

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
NAMES = ("phone", "jetson", "cloud", "desk")  # two members, a server, and who asks
PLUGINS = (*rig.TRAINS, "personal_lora", "zeroth_order", "shard")
FAULTS, BETWEEN = 10, (1, 3)  # rounds from one to the next
ROUNDS = 100  # some pass while a node comes back and is asked again
WITHIN_S = 0.5
METHODS: dict[str, Document] = {
    "flora": {},
    "fedadam": {"personal": "ditto", "personal_steps": 2},
    "fdlora": {"personal_steps": 2},
    "flexlora": {},
    "fedkseed": {"learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def four(shared_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> list[Node]:
    folder = tmp_path_factory.mktemp("files")
    rig.write_tiny(folder / "tiny.gguf")
    made = shared_nodes.group(*NAMES, plugins=PLUGINS, budget={"memory": "2GiB"})
    for first, node in enumerate(made[:2]):
        rig.add_rows(node, rig.write_rows(folder / f"rows{first}.jsonl", first))
    made[3].add(folder / "tiny.gguf", rig.MODEL)
    return made


def job(method: str, **changes: Any) -> Document:
    settings = {
        "model": rig.MODEL,
        "method": method,
        "rounds": ROUNDS,
        "local_steps": 6,
        "batch_size": 2,
        "max_length": 48,
        "learning_rate": 0.01,
        "r": 2,
        "alpha": 4.0,
        "eval_rows": 4,
        "clients": [{"node": name, "data": "sums"} for name in NAMES[:2]],
        "server": {"node": NAMES[2]},
    }
    return rig.asked(settings | METHODS[method] | changes, "federated")


@pytest.mark.parametrize("method", METHODS)
def test_ten_faults_change_no_byte_and_no_update_counts_twice(four: list[Node], method: str) -> None:
    desk, seed = four[3], list(METHODS).index(method)
    calm = rig.finetune(desk, job(method, adapter=f"{method}-calm"))
    faults = Faults(four, seed, ("worker", "worker", "daemon"), BETWEEN, WITHIN_S)
    lossy_job, reached = rig.begun(desk, job(method, adapter=f"{method}-lossy")), 0
    rounds = len(calm["loss"])
    while faults.count < FAULTS:
        stream = rig.followed(desk, lossy_job)
        reached = stream.until("step", step=min(reached + faults.pause(), rounds - 2))["step"]
        stream.vanish()
        faults.strike()
        wait_online(four)
    lossy = rig.followed(desk, lossy_job).end()
    for key in ("loss", "eval_loss", "steps"):
        assert lossy[key] == calm[key]
    for log in (lossy["rounds_log"], calm["rounds_log"]):
        assert [row["round"] for row in log] == list(range(rounds))
    for one, other in zip(lossy["rounds_log"], calm["rounds_log"], strict=True):
        assert one["members"] == other["members"]
    made = rig.adapter_files(desk, lossy["adapter"])
    assert made == rig.adapter_files(desk, calm["adapter"])
    for member in four[:2]:
        if f"{method}-calm-personal" in {row["name"] for row in member.call("adapters.ls")["adapters"]}:
            own = rig.adapter_files(member, f"{method}-lossy-personal")
            assert own == rig.adapter_files(member, f"{method}-calm-personal")
    wait_online(four)
    wait_no_workers(*four)
    print(f"\n{method}: {FAULTS} faults: {dict(faults.done)}; epochs: {lossy['plan']['epoch']}")
