"""Three real nodes: the plan is searched for in a process of its own, and what the profile names chooses."""

from __future__ import annotations

from pathlib import Path

from support import WORK, Nodes

ASKED = {"model": "smol", "prompt": "Why is the sky blue?", "n": 4, "temperature": 0.0, "ignore_eos": True}


def test_a_plan_over_three_nodes_is_searched_priced_and_explained(nodes: Nodes, smol: Path) -> None:
    laptop, *_ = nodes.group("laptop", "jetson", "phone", plugins=(*WORK, "energy"))
    laptop.add(smol, "smol")
    proposed = laptop.call("plan", {"model": "smol", "strategy": "auto", "explain": True})
    said = " ".join(proposed["explanation"])
    assert "exact search gave no answer" not in said
    assert "(chosen)" in said
    priced = [c for c in proposed["candidates"] if c["refused_because"] is None]
    assert {"local", "remote", "layers", "tensor"} <= {c["strategy"] for c in priced}
    assert all(c["predicted"]["tpot_ms"] > 0 for c in priced)
    named = [c for c in proposed["candidates"] if c["refused_because"] is not None]
    assert all(c["broken_rule"] for c in named)
    assert all(c["broken_rule"] is None for c in priced)
    loads = {c["strategy"]: c["predicted"]["load_ms"] for c in priced}
    assert 0 < loads["local"] < loads["remote"]  # which has to fetch the file first
    layers = [c for c in priced if c["strategy"] == "layers"]
    pairs = {tuple(sorted(role["name"] for role in c["roles"])) for c in layers}
    assert pairs - {("jetson", "laptop"), ("jetson", "laptop", "phone")} or len(layers) > 2
    for policy in ("adaptive", "bandit", "battery-balance", "round-robin"):
        assert len(laptop.call("generate", ASKED | {"policy": policy})["tokens"]) == 4
    metrics = laptop.call("status")["metrics"]
    assert metrics["edged_plan_jobs_total"] == 4
    assert metrics["edged_plan_tpot_error_ratio"] >= 0
    refused = laptop.error("generate", ASKED | {"policy": "greedy"})
    assert "no policy 'greedy'; loaded: adaptive, bandit, battery-balance, " in str(refused)
