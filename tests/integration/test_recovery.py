"""A generation goes on when who computed it, or who coordinated it, is killed: the tokens are those of a run
that nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support import (
    GUARD_S,
    WORK,
    Document,
    Node,
    Nodes,
    all_online,
    drain,
    pair_all,
    wait_no_workers,
    wait_online,
)

NAMES = ("laptop", "jetson", "phone")
N = 120
ASKED: Document = {
    "model": "smol",
    "prompt": "Tell me a story.",
    "n": N,
    "temperature": 0.8,
    "seed": 5,
    "ignore_eos": True,
    "numerics": "exact",
}


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, smol: Path) -> list[Node]:
    nodes = shared_nodes.group(*NAMES, plugins=WORK, jobs={"worker_idle": "1s"})
    nodes[0].add(smol, "smol")
    return nodes


@pytest.fixture(scope="module")
def undisturbed(trio: list[Node]) -> Document:
    found = trio[0].call("generate", ASKED | {"strategy": "local"})
    assert len(found["tokens"]) == N
    assert found["measured"]["recoveries"] == []
    return found


def check(document: Document, undisturbed: Document, lost: Node, losses: int = 1) -> None:
    assert document["tokens"] == undisturbed["tokens"]
    assert document["text"] == undisturbed["text"]
    recoveries = document["measured"]["recoveries"]
    assert [row["lost"] for row in recoveries] == [lost.node_id] * losses
    assert all(0 < row["at_token"] < N and row["resume_ms"] > 0 for row in recoveries)
    assert document["plan"]["epoch"] == losses + 1


@pytest.mark.parametrize("what", ["worker", "daemon"])
@pytest.mark.parametrize(
    ("strategy", "names", "victim"),
    [
        ("layers", ("laptop", "jetson", "phone"), "jetson"),
        ("layers", ("jetson", "laptop"), "jetson"),
        ("tensor", ("laptop", "jetson", "phone"), "phone"),
    ],
    ids=["layers", "rank 0", "tensor"],
)
def test_a_generation_survives_a_loss_and_no_token_changes(
    trio: list[Node],
    undisturbed: Document,
    strategy: str,
    names: tuple[str, ...],
    victim: str,
    what: str,
) -> None:
    all_online(trio)
    laptop, lost = trio[0], next(node for node in trio if node.name == victim)
    job = laptop.job(ASKED | {"strategy": strategy, "nodes": list(names)})
    at = random.Random(f"{strategy} {victim} {what}").randint(2, 60)
    seen: list[Any] = []
    while len(seen) < at:
        event = job.next()
        if event["event"] == "token":
            assert event["index"] == len(seen)
            seen += event["tokens"]
    if what == "worker":
        for worker in lost.workers():
            worker.kill()
    else:
        lost.kill()
    document = job.document()
    check(document, undisturbed, lost)
    assert document["tokens"][: len(seen)] == seen
    all_online(trio)
    wait_no_workers(*trio)


def test_the_only_node_s_worker_is_started_again(trio: list[Node], undisturbed: Document) -> None:
    all_online(trio)
    laptop = trio[0]
    job = laptop.job(ASKED | {"strategy": "local"}).until_token()
    for worker in laptop.workers():
        worker.kill()
    check(job.document(), undisturbed, laptop)
    wait_no_workers(*trio)


def test_a_coordinator_that_is_killed_goes_on_from_its_last_token(
    trio: list[Node], undisturbed: Document
) -> None:
    """And whoever attaches again misses nothing."""
    all_online(trio)
    laptop = trio[0]
    job = laptop.job(ASKED | {"strategy": "layers", "nodes": ["laptop", "jetson"]}).until_token()
    laptop.kill()
    laptop.start().wait_ready()
    tokens: list[int] = []
    with laptop.client() as client:
        events = client.stream("jobs.show", {"job": job.job_id, "follow": True}, silence_s=GUARD_S)
        while len(tokens) < N:
            event = next(events)
            if event["event"] == "token":
                assert event["index"] == len(tokens)
                tokens += event["tokens"]
        document = drain(events)
    assert tokens == document["tokens"]
    check(document, undisturbed, laptop)
    wait_online(trio)
    wait_no_workers(*trio)


@pytest.mark.parametrize("recovery", ["fast", "exact"])
def test_quantised_weights_give_the_same_text_where_the_history_goes_as_it_was_made(
    trio: list[Node], recovery: str
) -> None:
    """Layer plans alone, one job at a time. A fast replay rounds otherwise, and may say something else."""
    all_online(trio)
    laptop, jetson = trio[:2]
    asked = ASKED | {"numerics": "fast", "recovery": recovery, "n": 60}
    plain = laptop.call("generate", asked | {"strategy": "layers", "nodes": ["laptop", "jetson"]})
    wait_no_workers(*trio)  # no prefix of it is left
    job = laptop.job(asked | {"strategy": "layers", "nodes": ["laptop", "jetson"]}).until_token()
    for worker in jetson.workers():
        worker.kill()
    document = job.document()
    at = document["measured"]["recoveries"][0]["at_token"]
    assert document["tokens"][:at] == plain["tokens"][:at]
    assert len(document["tokens"]) == 60
    if recovery == "exact":
        assert document["tokens"] == plain["tokens"]
    wait_no_workers(*trio)


def test_nobody_left_is_waited_for_and_said(nodes: Nodes, smol: Path) -> None:
    """The one that has room for the model is away for a while: the job says so, and goes on with it."""
    idle = {"worker_idle": "1s"}
    small = nodes.start("laptop", plugins=WORK, budget={"memory": "16MiB"}, jobs=idle)
    large = nodes.start("jetson", plugins=WORK, budget={"memory": "2GiB"}, jobs=idle)
    laptop, jetson = *small, *large
    pair_all([laptop, jetson])
    laptop.add(smol, "smol")
    asked = ASKED | {"strategy": "remote", "nodes": ["jetson"]}
    plain = laptop.call("generate", asked)
    job = laptop.job(asked).until_token()
    jetson.kill()
    event = job.next()
    while event["event"] != "waiting":
        event = job.next()
    assert event["until"]
    assert event["because"]
    [row] = [row for row in laptop.call("jobs")["jobs"] if row["job_id"] == job.job_id]
    assert (row["state"], row["waits"]["because"]) == ("running", event["because"])
    jetson.start().wait_ready()
    document = job.document()
    assert document["tokens"] == plain["tokens"]
    wait_no_workers(laptop, jetson)
