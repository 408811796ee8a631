"""One one-thread node against two: time per token of the 1.1B shape in Q4_0, in one interleaved run.

Real daemons, real workers, encrypted channels, over loopback. `ratio` is one node's median divided by
the plan's, round by round: above 1 the plan is faster. Two nodes share this machine's memory and caches,
which two machines would not. `bytes_per_token` counts the prompt's bytes too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _shared import random_model, save, spread

from edged.cli.demo import add_model, pair, wait_online
from edged.cli.demo_nodes import Node, answers, running, wait_until
from edged.cli.generating import REQUEST

PLANS = ("local", "tensor", "layers")
ROUNDS = 7
TOKENS = 48
PROMPT = "The sea " * 60  # 120 tokens and more


def main(out: Path | None = None) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with running(("first", "second"), threads=1) as nodes:
        wait_until("to answer", nodes, answers)
        pair(nodes[0], nodes[1])
        wait_online(nodes)
        model = add_model(nodes[0], random_model("1.1b"))
        for plan in PLANS:  # load all, so that no round measures a start
            _generate(nodes, model, plan)
        times: dict[str, list[dict[str, Any]]] = {plan: [] for plan in PLANS}
        for _ in range(ROUNDS):
            for plan in PLANS:
                times[plan].append(_generate(nodes, model, plan))
            rows = [_row(plan, times) for plan in PLANS]
            made = save(out, "parallel", rows)
    return made


def _generate(nodes: list[Node], model: str, plan: str) -> dict[str, Any]:
    asked = {"model": model, "prompt": PROMPT, "raw": True, "n": TOKENS, "temperature": 0.0}
    chosen = None if plan == "local" else [node.name for node in nodes]
    request = REQUEST | asked | {"ignore_eos": True, "strategy": plan, "nodes": chosen}
    measured: dict[str, Any] = nodes[0].ask("generate", request)["measured"]
    return measured


def _row(plan: str, times: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    mine, one = times[plan], times["local"]
    ratios = [a["tpot_ms"] / b["tpot_ms"] for a, b in zip(one, mine, strict=False)]
    prefill = [a["ttft_ms"] / b["ttft_ms"] for a, b in zip(one, mine, strict=False)]
    return {
        "plan": plan,
        "nodes": 1 if plan == "local" else 2,
        "tpot_ms": spread([m["tpot_ms"] for m in mine]),
        "ttft_ms": spread([m["ttft_ms"] for m in mine]),
        "ratio": spread(ratios),
        "ttft_ratio": spread(prefill),
        "bytes_per_token": round(mine[-1]["bytes_sent"] / TOKENS),
    }
