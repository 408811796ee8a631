"""Four real nodes: one more than the model's KV heads allow, so two stages of two."""

from __future__ import annotations

from pathlib import Path

from support import WORK, Nodes

NAMES = ("laptop", "jetson", "phone", "tablet")
ASKED = {"model": "smol", "prompt": "Why is the sky blue?", "n": 24, "temperature": 0.0, "ignore_eos": True}


def test_stages_of_tensor_groups_give_the_tokens_of_one_node(nodes: Nodes, smol: Path) -> None:
    group = nodes.group(*NAMES, plugins=WORK)
    laptop = group[0]
    laptop.add(smol, "smol")
    exact = ASKED | {"numerics": "exact"}
    alone = laptop.call("generate", exact | {"strategy": "local"})
    hybrid = exact | {"strategy": "hybrid", "nodes": list(NAMES)}
    measured = laptop.call("generate", hybrid)
    assert measured["plan"]["strategy"] == "hybrid"
    assert [role["stage"] for role in measured["plan"]["roles"]] == [0, 0, 1, 1]
    assert measured["tokens"] == alone["tokens"]
    uneven = laptop.call("generate", hybrid | {"shares": [2.0, 1.0, 1.0, 2.0]})
    roles = uneven["plan"]["roles"]
    assert [role["heads"] for role in roles] == [[0, 6], [6, 9], [0, 3], [3, 9]]
    assert [role["layers"] for role in roles] == [[0, 15], [0, 15], [15, 30], [15, 30]]
    assert uneven["tokens"] == alone["tokens"]
    proposed = laptop.call("plan", {"model": "smol", "nodes": list(NAMES), "strategy": "auto"})
    assert "hybrid" in {each["strategy"] for each in proposed["candidates"]}
