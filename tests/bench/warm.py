"""The first request after a daemon's start against the second: time to the first token, 1.1B, one thread.

The daemon is started anew each round, with the model in its store and in the page cache. The cold request
starts a worker and loads the weights (`load_ms`); the warm one finds both. `ratio` is cold over warm.
Target: the warm request loads nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from _models import model
from _nodes import Place, generate, start, stop
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model
from edged.cli.demo_nodes import answers, wait_until

ROUNDS, TOKENS = quick(2, 9), 4
PROMPTS = quick((8,), (8, 128))
ROWS = [f"{kind} prompt {count}" for count in PROMPTS for kind in ("cold", "warm")]


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("warm", out)
    if record.has(*ROWS):
        return record.done()
    folder = Path(tempfile.mkdtemp(prefix="edged-bench-"))
    try:
        times: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
        _prepare(folder)
        for number in range(1, ROUNDS + 1):
            for count in PROMPTS:
                cold, warm = _start_once(folder, count)
                times[f"cold prompt {count}"].append(cold)
                times[f"warm prompt {count}"].append(warm)
            _put(record, times, number)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record.done()


def _prepare(folder: Path) -> None:
    """Store the model and have the engine check itself on this machine, once: no part of a start."""
    node = start(folder, Place("alone"))
    try:
        wait_until("to answer", [node], answers)
        generate(node, add_model(node, model("1.1b")), "local", [node], TOKENS)
    finally:
        stop(node)


def _start_once(folder: Path, count: int) -> list[dict[str, Any]]:
    """What the first and the second request of a new daemon measured."""
    node = start(folder, Place("alone"))
    try:
        wait_until("to answer", [node], answers)
        name = str(node.ask("models.ls")["models"][0]["name"])
        return [generate(node, name, "local", [node], TOKENS, count)["measured"] for _ in range(2)]
    finally:
        stop(node)


def _put(record: Record, times: dict[str, list[dict[str, Any]]], rounds: int) -> None:
    for row, measured in times.items():
        cold = times[row.replace("warm", "cold")]
        record.put(
            row,
            is_partial=rounds < ROUNDS,
            rounds=rounds,
            ttft_ms=spread([each["ttft_ms"] for each in measured]),
            load_ms=spread([each["load_ms"] for each in measured]),
            ratio=ratios([each["ttft_ms"] for each in cold], [each["ttft_ms"] for each in measured]),
            load_target_ms=0 if row.startswith("warm") else None,
        )
