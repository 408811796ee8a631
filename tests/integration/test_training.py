"""Split learning on real nodes, with tensors: what is refused beforehand, and that a loss changes no byte."""

from __future__ import annotations

import random
from typing import Any

import pytest
import training_rig as rig
from support import Node, Nodes, wait_no_workers

for _name in rig.NEEDED:
    pytest.importorskip(_name, reason="needs the extra train: make install")

PHONE, CLOUD, DESK = "phone", "cloud", "desk"


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> list[Node]:
    """Paired nodes, each with the same rows as `sums`; the model is the desk's."""
    folder = tmp_path_factory.mktemp("files")
    rig.write_tiny(folder / "tiny.gguf")
    made = shared_nodes.group(PHONE, CLOUD, DESK, plugins=rig.TRAINS, budget={"memory": "2GiB"})
    for node in made:
        rig.add_rows(node, rig.write_rows(folder / "rows.jsonl"))
    made[2].add(folder / "tiny.gguf", rig.MODEL)
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cut": 4}, "expected a cut from 1 to 3 of this model's 4 blocks; 4 came"),
        ({"topology": "u-shape", "cut": 3}, "expected a cut from 1 to 2"),
        ({"batch_size": 256, "max_length": 4096}, r"phone needs \d+ MiB for blocks 0 to 1 and has 2048 MiB"),
        ({"server": {"node": "nobody"}}, "node 'nobody' is not online; online: cloud, desk, phone"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_anything_starts(
    trio: list[Node], changes: dict[str, Any], says: str
) -> None:
    settings = rig.table([(PHONE, "sums")], CLOUD) | changes
    with pytest.raises(rig.EdgedError, match=says):
        rig.finetune(trio[2], rig.asked(settings))
    assert not any(node.workers() for node in trio)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_a_lost_client_and_a_lost_server_change_no_byte_of_the_adapter(
    trio: list[Node], topology: str
) -> None:
    """Killed at seeded steps, in a seeded order."""
    phone, cloud, desk = trio
    chance = random.Random(topology)
    settings = rig.table([(PHONE, "sums")], CLOUD, steps=60, topology=topology, eval_every=20)
    calm = rig.finetune(desk, rig.asked(settings))
    job = rig.begun(desk, rig.asked(settings))
    for first, struck in zip((2, 30), chance.sample([phone, cloud], 2), strict=True):
        rig.until_step(desk, job, chance.randrange(first, first + 20))
        for worker in struck.workers():
            worker.kill()
    lossy = rig.followed(desk, job).end()
    assert lossy["plan"]["epoch"] == 3
    for key in ("loss", "eval_loss", "steps"):
        assert lossy[key] == calm[key]
    assert rig.adapter_files(desk, lossy["adapter"]) == rig.adapter_files(desk, calm["adapter"])
    wait_no_workers(phone, cloud, desk)
