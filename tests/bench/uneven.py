"""Two tensor ranks of which one is three times slower: an even split against uneven shares.

The slow node is in a cgroup with a third of a processor; where nobody may make one, it shares a processor
with two busy processes. Time per token with shares 3:1, and with those that edged chooses by the speeds it
measured under that handicap, over the time of the even split, round by round: at most 0.7. 1.1B, Q4_0.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _models import model
from _nodes import SILENCE_S, Place, generate, mean_tpot_ms, running
from _quota import quota
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node

SLOWER = 3
SHARES: dict[str, tuple[float, float] | None] = {"even": (1, 1), "3:1": (3, 1), "measured": None}
ROUNDS, TOKENS, PROMPT = quick(2, 7), quick(6, 32), 32
TARGET = 0.7


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("uneven", out)
    if record.has(*SHARES):
        return record.done()
    with _places() as (how, places), running(places) as nodes:
        name = add_model(nodes[0], model("1.1b"))
        _measure_speeds(nodes[0], name)
        documents = {row: _generate(nodes, name, row) for row in SHARES}  # load all
        times: dict[str, list[float]] = {row: [] for row in SHARES}
        for number in range(1, ROUNDS + 1):
            for row in SHARES:
                times[row].append(mean_tpot_ms(_generate(nodes, name, row)))
            for row in SHARES:
                record.put(
                    row,
                    is_partial=number < ROUNDS,
                    rounds=number,
                    slowed_by=how,
                    heads=[role["heads"][1] - role["heads"][0] for role in documents[row]["plan"]["roles"]],
                    memory_bytes=[role["memory_bytes"] for role in documents[row]["plan"]["roles"]],
                    tpot_ms=spread(times[row]),
                    ratio=ratios(times[row], times["even"]),
                    target=None if row == "even" else TARGET,
                )
    return record.done()


def _generate(nodes: Sequence[Node], name: str, row: str) -> dict[str, Any]:
    return generate(nodes[0], name, "tensor", nodes, TOKENS, PROMPT, SHARES[row])


def _measure_speeds(node: Node, name: str) -> None:
    """Planning has each member measure itself, the slow one at a third of its speed."""
    with node.client() as client:
        client.call("plan", {"model": name, "strategy": "auto"}, silence_s=SILENCE_S)


@contextlib.contextmanager
def _places() -> Iterator[tuple[str, list[Place]]]:
    """How the second node is slowed down, and both nodes' places."""
    with contextlib.ExitStack() as stack:
        try:
            tasks = stack.enter_context(quota("slow", 1 / SLOWER))
        except OSError:
            stack.enter_context(_busy(core=1, count=SLOWER - 1))
            pinned = [Place(f"node{core}", prefix=("taskset", "-c", str(core))) for core in (0, 1)]
            yield f"{SLOWER - 1} busy processes on its core", pinned
        else:
            yield "cgroup quota", [Place("fast"), Place("slow", tasks=tasks)]


@contextlib.contextmanager
def _busy(core: int, count: int) -> Iterator[None]:
    command = ("taskset", "-c", str(core), sys.executable, "-c", "while True: pass")
    load = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()
