"""What a worker holds, measured from outside: with the whole model, and at two equal tensor ranks.

The 1.1B shape in Q4_0, one thread, after a generation of a few tokens. `private` is anonymous memory
(RssAnon), which nobody shares; at two ranks it is at most 0.58 of one node's. `over_rss` is how far the
peak (VmHWM) stood above what is held afterwards; loading may take one tensor more than the shard, so its
target is the largest tensor's bytes.
"""

from __future__ import annotations

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
TARGET = 0.58
FIELDS = {"private": "RssAnon", "file": "RssFile", "rss": "VmRSS", "peak": "VmHWM"}
Held = dict[str, list[dict[str, int]]]  # bytes by FIELDS, of each round


def main(out: Path | None = None) -> dict[str, Any]:
    record, path = Record("memory", out), model("1.1b")
    if not record.has(ALONE, *RANKS):
        largest = max(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
        held: Held = {row: [] for row in (ALONE, *RANKS)}
        for number in range(1, ROUNDS + 1):
            for rows, plan in (((ALONE,), "local"), (RANKS, "tensor")):
                found = _held(path, plan, [Place(f"node{rank}") for rank in range(len(rows))])
                for row, each in zip(rows, found, strict=True):
                    held[row].append(each)
            for row in held:
                _put(record, row, held, number, largest)
    return record.done()


def _put(record: Record, row: str, held: Held, rounds: int, largest: int) -> None:
    mine = held[row]
    record.put(
        row,
        is_partial=rounds < ROUNDS,
        rounds=rounds,
        **{f"{name}_bytes": spread([each[name] for each in mine]) for name in FIELDS},
        ratio=ratios([each["private"] for each in mine], [each["private"] for each in held[ALONE]]),
        target=None if row == ALONE else TARGET,
        over_rss_bytes=spread([each["peak"] - each["rss"] for each in mine]),
        over_rss_target=largest,
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
