"""Federated training on real nodes: two members, and a desk that asks for the job and aggregates."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import training_rig as rig
from support import Document, Node, Nodes, drain, wait_no_workers, wait_online, wait_until

for _name in rig.NEEDED:
    pytest.importorskip(_name, reason="needs the extra train: make install")

PHONE, JETSON, DESK = "phone", "jetson", "desk"
HANDSHAKES = 8192  # bytes of three pairs' streams, which no prediction counts
PLUGINS = (*rig.TRAINS, "personal_lora", "zeroth_order", "shard")


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> list[Node]:
    """Paired nodes; the members have unlike rows, the model is the desk's."""
    folder = tmp_path_factory.mktemp("files")
    rig.write_tiny(folder / "tiny.gguf")
    made = shared_nodes.group(PHONE, JETSON, DESK, plugins=PLUGINS, budget={"memory": "2GiB"})
    for first, node in enumerate(made[:2]):
        rig.add_rows(node, rig.write_rows(folder / f"rows{first}.jsonl", first))
    made[2].add(folder / "tiny.gguf", rig.MODEL)
    return made


def job(**changes: Any) -> Document:
    settings = {
        "model": rig.MODEL,
        "method": "flora",
        "rounds": 3,
        "local_steps": 2,
        "batch_size": 2,
        "max_length": 48,
        "learning_rate": 0.01,
        "r": 2,
        "alpha": 4.0,
        "eval_rows": 4,
        "clients": [{"node": PHONE, "data": "sums"}, {"node": JETSON, "data": "sums"}],
        "server": {"node": DESK},
    }
    return rig.asked(settings | changes, "federated")


def adapters(node: Node) -> dict[str, str]:
    """Their scopes by name."""
    return {row["name"]: row["scope"] for row in node.call("adapters.ls")["adapters"]}


def test_members_make_one_adapter_and_every_round_is_told(trio: list[Node]) -> None:
    clients = [{"node": PHONE, "data": "sums", "r": 1}, {"node": JETSON, "data": "sums", "r": 3}]
    document = rig.finetune(trio[2], job(clients=clients, adapter="together"))
    ids = {node.node_id for node in trio[:2]}
    assert [row["round"] for row in document["rounds_log"]] == [0, 1, 2]
    for row in document["rounds_log"]:
        assert 0 <= row["residual"] < 1e-6
        assert set(row["members"]) == set(row["bytes_up"]) == set(row["bytes_down"]) == ids
        assert row["bytes_up"][trio[0].node_id] < row["bytes_up"][trio[1].node_id]
    assert document["loss"] == [row["loss"] for row in document["rounds_log"]]
    assert len(document["eval_loss"]) == 4
    assert document["plan"]["predicted"]["bytes_sent"] == pytest.approx(
        document["bytes_sent"], abs=HANDSHAKES
    )
    assert adapters(trio[2])["together"] == "global"
    [made] = [row for row in trio[2].call("adapters.ls")["adapters"] if row["name"] == "together"]
    told = made["provenance"]
    assert (told["job_id"], told["method"], told["rounds"]) == (document["job_id"], "flora", 3)
    assert {(row["name"], row["rounds"]) for row in told["members"]} == {(PHONE, 3), (JETSON, 3)}
    assert (made["stem"], made["version"]) == ("together", 1)
    assert made["base_sha256"] == trio[2].call("models.ls")["models"][0]["sha256"]
    asked = {"model": rig.MODEL, "prompt": "Add", "n": 4, "temperature": 0.0, "adapter": "together"}
    assert trio[2].call("generate", asked | {"raw": True, "strategy": "local"})["tokens"]


def test_a_personal_adapter_stays_on_its_members_node(trio: list[Node]) -> None:
    document = rig.finetune(trio[2], job(method="fdlora", adapter="mine", personal_steps=4))
    assert document["evals"][-1]["own_loss"] > 0
    for node in trio[:2]:
        wait_until("the adapter to be kept", lambda node=node: "mine-personal" in adapters(node))
        assert adapters(node)["mine-personal"] == "personal"
        assert "mine" not in adapters(node)
        [kept] = [row for row in node.call("adapters.ls")["adapters"] if row["name"] == "mine-personal"]
        told = kept["provenance"]
        assert (told["job_id"], told["method"], told["rounds"]) == (document["job_id"], "fdlora", 3)
    assert "mine-personal" not in adapters(trio[2])


def test_a_member_that_submits_keeps_both_adapters_and_goes_on_for_more_rounds(trio: list[Node]) -> None:
    body = job(method="fedavg", personal="ditto", personal_steps=2, adapter="both", rounds=2)
    document = rig.finetune(trio[0], body)
    assert document["adapter"] == "both"
    wait_until("the adapter to be kept", lambda: "both-personal" in adapters(trio[0]))
    assert adapters(trio[0])["both"] == "global"
    more = job(method="fedavg", personal="ditto", personal_steps=2, adapter="both", rounds=3)
    longer = rig.finetune(trio[0], more | {"resume": document["job_id"]})
    assert longer["loss"][:2] == document["loss"]
    assert len(longer["rounds_log"]) == 3
    phone, jetson, desk = (node.node_id for node in trio)
    for each in (document, longer):  # every byte that was sent is of a kind and way that the page names
        assert sum(row["bytes"] for row in each["egress"]) == each["bytes_sent"]
        assert {row["kind"] for row in each["egress"]} <= kinds_of_the_page()
        up = {row["from"]: row for row in each["egress"] if row["kind"] == "up"}
        assert set(up) == {phone, jetson}
        assert {row["to"] for row in up.values()} == {desk}
        log = {node: sum(row["bytes_up"][node] for row in each["rounds_log"]) for node in up}
        assert {node: row["bytes"] for node, row in up.items()} == log
        assert all(row["messages"] == len(each["rounds_log"]) for row in up.values())
    [shown] = trio[0].call("jobs.show", {"job": document["job_id"], "follow": False})["jobs"]
    assert shown["result"]["egress"] == longer["egress"]


def kinds_of_the_page() -> set[str]:
    """Of docs/security.md, the table of what travels in a federated job."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    return {kind for row in rows for kind in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedkseed", {}),
        ("mezo", {}),
        pytest.param("fwdllm", {"variance_most": 1e6}, marks=pytest.mark.slow),
        pytest.param("ferret", {"coordinates": 16, "learning_rate": 0.01}, marks=pytest.mark.slow),
    ],
)
def test_members_that_send_no_gradients_make_an_adapter_too(
    trio: list[Node], method: str, more: Document
) -> None:
    document = rig.finetune(
        trio[2], job(**{"method": method, "adapter": method, "learning_rate": 1e-4} | more)
    )
    assert document["plan"]["predicted"]["bytes_sent"] == pytest.approx(
        document["bytes_sent"], abs=HANDSHAKES
    )
    if method == "fedkseed":
        assert all(sum(row["bytes_up"].values()) < 1000 for row in document["rounds_log"])


@pytest.mark.slow
def test_a_private_job_says_what_it_spent_and_none_beyond_its_budget_begins(trio: list[Node]) -> None:
    """Noise 4 with epsilon 2 at delta 1e-5 is enough for four rounds."""
    noisy = {"client_clip": 0.1, "client_noise": 4.0, "client_epsilon": 2.0, "adapter": "private"}
    document = rig.finetune(trio[2], job(method="fedavg", **noisy))
    assert document["measured"]["epsilon"] == pytest.approx(1.6980, abs=1e-3)
    assert document["measured"]["delta"] == 1e-5
    adapters = trio[2].call("adapters.ls")["adapters"]
    [kept] = [row for row in adapters if row["name"] == "private"]
    assert kept["provenance"]["epsilon"] == document["measured"]["epsilon"]
    with pytest.raises(rig.EdgedError, match="allows 4 rounds of one client"):
        rig.finetune(trio[2], job(method="fedavg", **(noisy | {"rounds": 5})))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "fedmagic"}, "expected method as one of delayed-nesterov, .*; 'fedmagic' came"),
        ({"mu": 1.0}, "no key 'mu' in a training job"),
        ({"method": "fedprox", "mu": "much"}, "expected a number for mu; 'much' came"),
        ({"method": "fedavg", "clients": [{"node": PHONE, "data": "sums", "r": 1},
                                          {"node": JETSON, "data": "sums"}]},
         "expected one r for all clients: fedavg averages factors; flexlora or flora take unlike ones"),
        ({"server": {"node": PHONE}}, "expected a server that is no client"),
        ({"batch_size": 256, "max_length": 4096, "local_steps": 1}, r"needs \d+ MiB .* and has 2048 MiB"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_starts(
    trio: list[Node], changes: dict[str, Any], says: str
) -> None:
    before = [node.workers() for node in trio]  # one that generated is still warm
    with pytest.raises(rig.EdgedError, match=says):
        rig.finetune(trio[2], job(**changes))
    assert [node.workers() for node in trio] == before


@pytest.mark.slow
def test_revisions_go_on_after_a_killed_member_and_a_killed_server(trio: list[Node]) -> None:
    """Nobody is waited for but the dead, and every revision is told once."""
    wild = rig.begun(trio[2], job(method="fedbuff", rounds=16, local_steps=4, adapter="pushed"))
    for struck, revision in ((trio[0], 3), (trio[2], 8)):
        rig.until_step(trio[2], wild, revision)
        for worker in struck.workers():
            worker.kill()
    document = rig.followed(trio[2], wild).end()
    assert document["plan"]["epoch"] >= 1
    assert [row["round"] for row in document["rounds_log"]] == list(range(16))
    members = {node.node_id for node in trio[:2]}
    assert set().union(*(row["members"] for row in document["rounds_log"])) == members
    assert all(row["residual"] is not None for row in document["rounds_log"])
    assert document["eval_loss"][-1] < document["eval_loss"][0]
    assert adapters(trio[2])["pushed"] == "global"
    wait_online(trio)
    wait_no_workers(*trio)


@pytest.mark.slow
def test_members_prefer_answers_and_rehearse_old_ones(trio: list[Node], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Add {a}.", "chosen": f"{a}", "rejected": f"{a} or not", "rehearsal": a % 3 == 0}
        | ({"split": "test"} if a > 12 else {})
        for a in range(17)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for node in trio[:2]:
        rig.add_rows(node, file, "pairs")
    clients = [{"node": name, "data": "pairs"} for name in (PHONE, JETSON)]
    more = {"method": "fedavg", "objective": "dpo", "rehearsal": 0.5, "eval_rows": 8, "adapter": "preferred"}
    document = rig.finetune(trio[2], job(clients=clients, **more, local_steps=6, personal="ditto"))
    first, last = document["evals"][0], document["evals"][-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["loss"] < first["loss"]
    assert last["rehearsal_loss"] < first["rehearsal_loss"]
    assert last["margin"] > 0
    assert all(0 <= row["accuracy"] <= 1 for row in document["rounds_log"])
    assert document["plan"]["predicted"]["bytes_sent"] == pytest.approx(
        document["bytes_sent"], abs=HANDSHAKES
    )
    assert adapters(trio[2])["preferred"] == "global"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flora", "fdlora", "fedkseed"])
def test_killed_members_and_a_killed_server_change_no_byte(trio: list[Node], method: str) -> None:
    more = {"method": method, "rounds": 12, "local_steps": 4, "personal_steps": 4}
    if method == "fedkseed":
        more["learning_rate"] = 1e-4
    calm = rig.finetune(trio[2], job(**more))
    lossy_job = rig.begun(trio[2], job(**more))
    for struck, round in ((trio[0], 2), (trio[2], 5), (trio[1], 8)):
        rig.until_step(trio[2], lossy_job, round)
        for worker in struck.workers():
            worker.kill()
    lossy = rig.followed(trio[2], lossy_job).end()
    assert lossy["plan"]["epoch"] >= 2
    for key in ("loss", "eval_loss", "steps"):
        assert lossy[key] == calm[key]
    assert [row["members"] for row in lossy["rounds_log"]] == [row["members"] for row in calm["rounds_log"]]
    assert rig.adapter_files(trio[2], lossy["adapter"]) == rig.adapter_files(trio[2], calm["adapter"])
    wait_online(trio)
    wait_no_workers(*trio)


@pytest.mark.slow
def test_a_model_tuned_by_seeds_alone_is_written_added_and_run(trio: list[Node], tmp_path: Path) -> None:
    """All weights: a round is small, what comes out refuses to be an adapter, and as a model it answers."""
    settings = job(method="fedkseed", parameters="all", learning_rate=1e-4, adapter="whole")["settings"]
    for word in ("r", "alpha"):
        del settings[word]
    desk = trio[2]
    document = rig.finetune(desk, rig.asked(settings, "federated"))
    predicted = document["plan"]["predicted"]["bytes_sent"]
    assert predicted == pytest.approx(document["bytes_sent"], abs=HANDSHAKES)
    for row in document["rounds_log"]:
        assert all(
            row["bytes_up"][node.node_id] + row["bytes_down"][node.node_id] < 18 * 1024 for node in trio[:2]
        )
    kinds = {row["name"]: row["kind"] for row in desk.call("adapters.ls")["adapters"]}
    assert kinds["whole"] == "seeds"
    asked = {"prompt": "Add", "n": 4, "temperature": 0.0, "raw": True, "strategy": "local"}
    with pytest.raises(rig.EdgedError, match="is of kind 'seeds'") as refused:
        desk.call("generate", asked | {"model": rig.MODEL, "adapter": "whole"})
    assert "edged adapters write whole --out FILE" in refused.value.remedy
    out = tmp_path / "whole.gguf"
    with open(out, "xb") as file, desk.client() as client:
        written = drain(client.stream("adapters.write", {"name": "whole"}, [file.fileno()], silence_s=60))
    assert written["model"]["bytes"] < out.stat().st_size
    desk.add(out, "whole")
    assert desk.call("generate", asked | {"model": "whole"})["tokens"]


@pytest.mark.slow
def test_a_killed_client_costs_its_own_updates_and_no_epoch(trio: list[Node]) -> None:
    more = {"mode": "semi-synchronous", "method": "fedavg", "rounds": 14, "local_steps": 4}
    warm = {worker.pid for worker in trio[2].workers()}  # of one that generated
    begun = rig.begun(trio[2], job(**more, adapter="left"))
    rig.until_step(trio[2], begun, 2)
    trio[1].kill()  # and its worker with it
    document = rig.followed(trio[2], begun).end()
    assert document["plan"]["epoch"] == 1
    assert document["measured"]["recoveries"] == []
    log, gone = document["rounds_log"], trio[1].node_id
    assert [row["round"] for row in log] == list(range(14))
    assert all(trio[0].node_id in row["members"] for row in log)
    assert gone in log[1]["members"]
    assert gone not in log[-1]["members"]
    assert gone in log[-1]["left_out"]
    assert adapters(trio[2])["left"] == "global"
    trio[1].start().wait_ready()
    wait_online(trio)
    wait_no_workers(*trio[:2])
    wait_until("the job's own workers to end", lambda: {worker.pid for worker in trio[2].workers()} <= warm)
