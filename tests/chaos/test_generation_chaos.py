"""Seeded faults against a generation: no token is lost, doubled or changed; `make chaos` has many."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from support import GUARD_S, WORK, Document, Node, Nodes, drain, wait_no_workers, wait_online

NAMES = ("laptop", "jetson", "phone")
ASKED: Document = {
    "model": "smol",
    "prompt": "Tell me a story.",
    "temperature": 0.8,
    "seed": 5,
    "ignore_eos": True,
    "numerics": "exact",
    "nodes": list(NAMES),
}


EACH = 100  # tokens from one fault to the next, about


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, smol: Path) -> list[Node]:
    nodes = shared_nodes.group(*NAMES, plugins=WORK, jobs={"worker_idle": "1s"})
    nodes[0].add(smol, "smol")
    return nodes


def strike(trio: list[Node], chance: random.Random) -> str:
    """Kill a worker, or the daemon, of a node that computes; the coordinator's is one of them."""
    busy = [node for node in trio if node.workers()]
    node, kind = chance.choice(busy), chance.choice(("worker", "daemon"))
    if kind == "worker":
        for worker in node.workers():
            worker.kill()
    else:
        node.kill()
        node.start().wait_ready()
    return f"{kind} of {node.name}"


def survive(trio: list[Node], strategy: str, seed: int, count: int) -> None:
    """A generation with `count` faults, each after some tokens; who follows it attaches again after each."""
    desk, chance, done = trio[0], random.Random(seed), Counter[str]()
    asked = ASKED | {"strategy": strategy, "n": EACH * (count + 1)}
    plain = desk.call("generate", asked | {"strategy": "local", "nodes": None})
    job = desk.call("generate", asked | {"detach": True})["job_id"]
    for number in range(count):
        seen = follow(desk, job, number * EACH + chance.randint(1, EACH // 2))
        assert seen == plain["tokens"][: len(seen)]
        done[strike(trio, chance)] += 1
        wait_online(trio)
    with desk.client() as client:
        document = drain(client.stream("jobs.show", {"job": job, "follow": True}, silence_s=GUARD_S))
    assert document["tokens"] == plain["tokens"]
    assert document["text"] == plain["text"]
    wait_no_workers(*trio)
    told = [
        (row["at_token"], round(row["detect_ms"]), round(row["resume_ms"] or 0))
        for row in document["measured"]["recoveries"]
    ]
    print(f"\n{strategy}, {count} faults: {dict(done)}; at token, noticed after, went on after, ms: {told}")


def follow(node: Node, job: str, most: int) -> list[int]:
    """The first tokens of a job, at least so many."""
    tokens: list[int] = []
    with node.client() as client:
        events = client.stream("jobs.show", {"job": job, "follow": True}, silence_s=GUARD_S)
        while len(tokens) < most:
            event = next(events)
            if event["event"] == "token":
                assert event["index"] == len(tokens)
                tokens += event["tokens"]
    return tokens


@pytest.mark.slow
def test_four_faults_change_nothing(trio: list[Node]) -> None:
    survive(trio, "layers", 3, 4)


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ["layers", "tensor"])
@pytest.mark.parametrize("seed", range(3))
def test_many_faults_change_nothing(trio: list[Node], strategy: str, seed: int) -> None:
    survive(trio, strategy, seed, 12)
