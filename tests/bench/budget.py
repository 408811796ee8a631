"""The 1.1B shape in Q4_0 under a quarter of its file's size for the whole worker, against all memory.

Real daemons, one thread, 512 tokens of context, the same prompt and tokens. The worker's resident size,
interpreter, tokenizer and cache included, is sampled from outside while it generates, and its peak since
its start is the kernel's own count: both must stay below the budget, and the tokens must be equal. The
file that weights are read from again is in the page cache unless memory is short. `ratio` is the time per
token with the window over that without, in turns, round by round.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import psutil
from _models import model
from _nodes import Place, generate, running
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node
from edged.cli.generating import REQUEST

ROUNDS, TOKENS, PROMPT = quick(1, 3), quick(4, 32), 64
SAMPLE_S = 0.005
SETTINGS = "[jobs]\ncontext = 512"


def main(out: Path | None = None) -> dict[str, Any]:
    record, path = Record("budget", out), model("1.1b")
    if record.has("window"):
        return record.done()
    budget = quick(150 << 20, path.stat().st_size // 4)
    places = [
        Place("roomy", settings=SETTINGS),
        Place("tight", settings=SETTINGS, memory=f"{budget}B"),
    ]
    rounds: list[dict[str, dict[str, Any]]] = []
    with running(places) as nodes:
        stored = {node.name: add_model(node, path) for node in nodes}
        for node in nodes:  # checks the engine and loads; another prompt, so that no prefix is shared
            generate(node, stored[node.name], "local", nodes, 1, PROMPT)
        for number in range(1, ROUNDS + 1):
            order = nodes if number % 2 else nodes[::-1]  # neither always runs second
            rounds.append({node.name: _watched(node, stored[node.name]) for node in order})
            _put(record, rounds, path, budget)
    return record.done()


def _put(record: Record, rounds: list[dict[str, dict[str, Any]]], path: Path, budget: int) -> None:
    roomy, tight = ([each[name] for each in rounds] for name in ("roomy", "tight"))
    tokens = roomy[0]["tokens"]
    if any(each["tokens"] != tokens for each in (*roomy, *tight)):
        raise AssertionError("a window changed the tokens")
    peak = max(each["peak"] for each in tight)
    if peak > budget:
        raise AssertionError(f"a worker held {peak} bytes, its budget is {budget}")
    times = [[each["tpot_ms"] for each in mine] for mine in (tight, roomy)]
    record.put(
        "window",
        is_partial=len(rounds) < ROUNDS,
        rounds=len(rounds),
        file_bytes=path.stat().st_size,
        budget_bytes=budget,
        planned_bytes=tight[0]["planned"],
        peak_bytes=peak,
        sampled_bytes=max(each["sampled"] for each in tight),
        samples=sum(each["samples"] for each in tight),
        peak_without_bytes=max(each["peak"] for each in roomy),
        tokens_equal=len(tokens),
        tpot_ms=spread(times[0]),
        tpot_without_ms=spread(times[1]),
        ratio=ratios(*times),
    )


def _watched(node: Node, name: str) -> dict[str, Any]:
    """A job whose worker is watched to its end."""
    asked = {"model": name, "prompt": "The sea " * 60, "raw": True, "n": TOKENS, "temperature": 0.0}
    request = REQUEST | asked | {"ignore_eos": True, "strategy": "local", "nodes": None}
    ended = threading.Event()
    sampled: list[int] = []
    peaks: list[int] = []

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            for worker in _workers(node):
                with contextlib.suppress(psutil.Error, OSError, KeyError):  # it ended meanwhile
                    sampled.append(worker.memory_info().rss)
                    peaks.append(_peak(worker.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        document = node.ask("generate", request)
    finally:
        ended.set()
        thread.join()
    return {
        "tokens": document["tokens"],
        "planned": document["plan"]["roles"][0]["memory_bytes"],
        "peak": max(peaks),
        "sampled": max(sampled),
        "samples": len(sampled),
        "tpot_ms": document["measured"]["tpot_ms"],
    }


def _peak(pid: int) -> int:
    """The largest resident size of a process since its start, as the kernel counts it."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _workers(node: Node) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(node.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [child] if "edged.worker" in child.cmdline() else []
    return found
