"""One node against llama.cpp: decode after 128 tokens and prefill of 128, by model, weight type, threads.

Two processes live side by side and are measured in turns: edged's engine as a worker loads it, with the
settings it chooses for OpenMP, and llama.cpp with its own. `ratio` is our time over llama.cpp's, round by
round; the target is at most 1.05. Our times include drawing the token, llama.cpp's nothing but its decode.
The last row goes through `edged generate`'s daemon and worker, one thread, 1.1B: at most 1.10.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import psutil
from _models import SMALL, model
from _nodes import Place, generate, running
from _peer import Peer, engine
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model

MODELS = quick((SMALL,), (SMALL, "1.1b", "3b"))
WEIGHT_TYPES = quick(("Q4_0",), ("Q4_0", "Q4_K_M", "Q8_0", "F16"))
THREADS = quick((1,), (1, 2))
ROUNDS = quick({SMALL: 2, "1.1b": 2}, {SMALL: 15, "1.1b": 9, "3b": 3})
STEPS = quick({SMALL: 4, "1.1b": 4}, {SMALL: 48, "1.1b": 24, "3b": 12})
PROMPT = 128
TARGET, GENERATE_TARGET = 1.05, 1.10
LARGE_BYTES = 16e9  # free memory for two processes with 6.4 GB of weights each, and their copies in flight
PHASES = ("decode", "prefill")


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("engine", out)
    with engine("ours") as ours, engine("llama") as llama:
        for name in MODELS:
            for weight_type in WEIGHT_TYPES:
                for threads in THREADS:
                    _measure(record, ours, llama, name, weight_type, threads)
    if not record.has("1.1b Q4_0 1 thread generate"):
        _measure_generate(record)
    return record.done()


def _measure(record: Record, ours: Peer, llama: Peer, name: str, weight_type: str, threads: int) -> None:
    head = f"{name} {weight_type} {threads} thread{'s' if threads > 1 else ''}"
    rows = [f"{head} {phase}" for phase in PHASES]
    if record.has(*rows):
        return
    if (name, weight_type) == ("3b", "F16") and psutil.virtual_memory().available < LARGE_BYTES:
        for row in rows:
            record.put(
                row, skipped=f"needs {LARGE_BYTES:.0f} bytes of free memory for 6.4 GB of weights twice"
            )
        return
    path = str(model(name, weight_type))
    peers = (ours, llama)
    for peer in peers:
        peer.call("load", path, threads, 1)
        peer.call("decode", PROMPT, 2)
    times: dict[str, tuple[list[float], list[float]]] = {phase: ([], []) for phase in PHASES}
    for number in range(ROUNDS[name]):
        order = (0, 1) if number % 2 else (1, 0)  # neither is always the one that runs second
        for which in order:
            steps = peers[which].call("decode", PROMPT, STEPS[name])
            times["decode"][which].append(statistics.median(steps))
        for which in order:
            times["prefill"][which].append(peers[which].call("prefill", PROMPT))
    for row, phase in zip(rows, PHASES, strict=True):
        mine, other = times[phase]
        record.put(row, ms=spread(mine), llama_ms=spread(other), ratio=ratios(mine, other), target=TARGET)


def _measure_generate(record: Record) -> None:
    """Through daemon and worker: the median time between tokens as the coordinator sees them."""
    path, rounds, steps = model("1.1b"), ROUNDS["1.1b"], STEPS["1.1b"]
    with running([Place("alone")]) as (node,), engine("llama") as llama:
        name = add_model(node, path)
        llama.call("load", str(path), 1, 1)
        llama.call("decode", PROMPT, 2)
        generate(node, name, "local", [node], 4)
        mine, other = [], []
        for _ in range(rounds):
            mine.append(generate(node, name, "local", [node], steps, PROMPT)["measured"]["tpot_ms"])
            other.append(statistics.median(llama.call("decode", PROMPT, steps)))
    record.put(
        "1.1b Q4_0 1 thread generate",
        ms=spread(mine),
        llama_ms=spread(other),
        ratio=ratios(mine, other),
        target=GENERATE_TARGET,
    )
