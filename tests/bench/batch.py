"""Many sequences on one node in one batch: 1 to 32, the 1.1B shape in Q4_0, one thread.

`gain` is the tokens a second over one sequence's, round by round: at least 2.2 at 8 and 2.8 at 16.
`ratio` is our time for a step over that of llama.cpp's own batch with as many sequence ids, in turns in
one run: at most 1.05. Each sequence stands at a prompt of 32 tokens of its own.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from _models import model
from _peer import engine
from _record import Record, quick, ratios, spread

SIZES = quick((1, 2), (1, 2, 4, 8, 16, 32))
ROUNDS, STEPS = quick(2, 7), quick(3, 8)
PROMPT = 32
GAINS = {8: 2.2, 16: 2.8}
TARGET = 1.05
NAMES = ("ours", "llama")


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("batch", out)
    if record.has(*(_row(size) for size in SIZES)):
        return record.done()
    path = str(model("1.1b"))
    with engine("ours") as ours, engine("llama") as llama:
        peers = dict(zip(NAMES, (ours, llama), strict=True))
        for peer in peers.values():
            peer.call("load", path, 1, max(SIZES))
        times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in NAMES}
        for number in range(1, ROUNDS + 1):
            for size in SIZES:
                for name in NAMES if number % 2 else NAMES[::-1]:  # neither always runs second
                    steps = peers[name].call("batch", size, PROMPT, STEPS)
                    times[name][size].append(statistics.median(steps))
            for size in SIZES:
                _put(record, size, times, number)
    return record.done()


def _row(size: int) -> str:
    return f"{size} sequence{'s' if size > 1 else ''}"


def _put(record: Record, size: int, times: dict[str, dict[int, list[float]]], rounds: int) -> None:
    ours, llama = times["ours"], times["llama"]
    record.put(
        _row(size),
        is_partial=rounds < ROUNDS,
        rounds=rounds,
        step_ms=spread(ours[size]),
        llama_step_ms=spread(llama[size]),
        gain=ratios([size * time for time in ours[1]], ours[size]),
        gain_target=GAINS.get(size),
        llama_gain=ratios([size * time for time in llama[1]], llama[size]),
        ratio=ratios(ours[size], llama[size]),
        target=TARGET,
    )
