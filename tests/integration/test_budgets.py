"""Nodes that compute with more weights than their budget holds, watched from outside."""

from __future__ import annotations

import os
from pathlib import Path

from support import WORK, Document, Node, Nodes, pair_all

ASKED = {"model": "smol", "prompt": "Why is the sky blue?", "n": 16, "temperature": 0.0, "ignore_eos": True}
BUDGET = 150 << 20  # SmolLM2 needs about 200 MiB with 512 tokens of context


def peak_bytes(pid: int) -> int:
    """The largest resident size that a process ever had, as the kernel counted it."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def generate(node: Node, asked: Document) -> tuple[Document, list[int]]:
    """A job's document, and the peaks of the node's workers, which stay loaded after it."""
    document = node.call("generate", asked)
    return document, [peak_bytes(worker.pid) for worker in node.workers()]


def test_a_model_that_does_not_fit_runs_within_its_budget_with_the_same_tokens(
    nodes: Nodes, smol: Path
) -> None:
    jobs = {"context": 512}
    roomy = nodes.start("roomy", plugins=WORK, jobs=jobs)[0]
    tight = nodes.start("tight", plugins=WORK, jobs=jobs, budget={"memory": "150MiB"})[0]
    for node in (roomy, tight):
        node.add(smol, "smol")
    expected, [needed] = generate(roomy, ASKED | {"strategy": "local"})
    document, [peak] = generate(tight, ASKED | {"strategy": "local"})
    assert document["tokens"] == expected["tokens"]
    [role] = document["plan"]["roles"]
    assert role["memory_bytes"] <= BUDGET < expected["plan"]["roles"][0]["memory_bytes"]
    assert peak <= BUDGET
    assert peak < needed
    assert not [name for name in os.listdir(tight.home.cache) if not name.endswith(".json")]


def test_a_rank_keeps_to_its_own_budget_beside_one_that_needs_none(nodes: Nodes, smol: Path) -> None:
    jobs = {"context": 512}
    roomy = nodes.start("roomy", plugins=WORK, jobs=jobs)[0]
    tight = nodes.start("tight", plugins=WORK, jobs=jobs, budget={"memory": "136MiB"})[0]
    pair_all([roomy, tight])
    roomy.add(smol, "smol")
    exact = ASKED | {"numerics": "exact"}
    alone = roomy.call("generate", exact | {"strategy": "local"})["tokens"]
    for strategy, shares in (("tensor", [1.0, 2.0]), ("layers", [1.0, 1.0])):
        plan = {"strategy": strategy, "nodes": ["roomy", "tight"], "shares": shares}
        document = roomy.call("generate", exact | plan)
        assert document["tokens"] == alone
        assert document["plan"]["roles"][1]["memory_bytes"] <= 136 << 20
        assert [peak_bytes(worker.pid) <= 136 << 20 for worker in tight.workers()] == [True]
