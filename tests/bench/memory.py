"""What a worker holds, measured from outside: with the whole model, and at two equal tensor ranks.

The 1.1B shape in Q4_0, one thread, after a generation of a few tokens. `private` is anonymous memory
(RssAnon), which nobody shares; at two ranks it is at most 0.58 of one node's.

The loading rows are of a process that does nothing else: `over` is how far the peak (VmHWM) while it
loaded stood above what it held before and the weights it loaded. One tensor may lie beside them, so the
target is the largest tensor's bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from _models import model
from _nodes import Place, generate, running
from _record import Record, quick, ratios, spread
from gguf import GGUFReader

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node

ROUNDS, TOKENS, TEXT = quick(1, 3), 6, " sea" * 16
ALONE, RANKS = "one node", ("rank 0 of 2", "rank 1 of 2")
LOADING = {"loading all": (1, 0), "loading rank 0 of 2": (2, 0), "loading rank 1 of 2": (2, 1)}
LOAD_S = 600.0
TARGET = 0.58
FIELDS = {"private": "RssAnon", "file": "RssFile", "rss": "VmRSS", "peak": "VmHWM"}
Held = dict[str, list[dict[str, int]]]  # bytes by FIELDS, of each round


def main(out: Path | None = None) -> dict[str, Any]:
    record, path = Record("memory", out), model("1.1b")
    if not record.has(ALONE, *RANKS):
        held: Held = {row: [] for row in (ALONE, *RANKS)}
        for number in range(1, ROUNDS + 1):
            for rows, plan in (((ALONE,), "local"), (RANKS, "tensor")):
                found = _held(path, plan, [Place(f"node{rank}") for rank in range(len(rows))])
                for row, each in zip(rows, found, strict=True):
                    held[row].append(each)
            for row in held:
                _put(record, row, held, number)
    if not record.has(*LOADING):
        largest = max(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
        for row, (ranks, rank) in LOADING.items():
            found = [_loaded(path, ranks, rank) for _ in range(ROUNDS)]
            over = [each["peak"] - each["before"] - each["weights"] for each in found]
            record.put(
                row,
                rounds=ROUNDS,
                weights_bytes=found[0]["weights"],
                over_bytes=spread(over),
                target=largest,
            )
    return record.done()


def _loaded(path: Path, ranks: int, rank: int) -> dict[str, int]:
    """What loading took in a process of its own."""
    script = Path(__file__).with_name("_runner_load.py")
    command = [sys.executable, str(script), str(path), str(ranks), str(rank)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=LOAD_S, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _put(record: Record, row: str, held: Held, rounds: int) -> None:
    mine = held[row]
    record.put(
        row,
        is_partial=rounds < ROUNDS,
        rounds=rounds,
        **{f"{name}_bytes": spread([each[name] for each in mine]) for name in FIELDS},
        ratio=ratios([each["private"] for each in mine], [each["private"] for each in held[ALONE]]),
        target=None if row == ALONE else TARGET,
    )


def _held(path: Path, plan: str, places: Sequence[Place]) -> list[dict[str, int]]:
    """What each node's worker holds after a generation."""
    with running(places) as nodes:
        name = add_model(nodes[0], path)
        generate(nodes[0], name, plan, nodes, TOKENS, text=TEXT)
        return [_of_worker(node) for node in nodes]


def _of_worker(node: Node) -> dict[str, int]:
    children = psutil.Process(node.process.pid).children(recursive=True)
    (worker,) = (child for child in children if "edged.worker" in child.cmdline())
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) * 1024 for name, key in FIELDS.items()}
