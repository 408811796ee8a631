"""The 1.1B shape in Q4_0 under a quarter of its file's size for the whole worker, against all memory.

Real daemons, one thread, 512 tokens of context, the same prompt and tokens. The worker's resident size,
interpreter, tokenizer and cache included, is sampled from outside while it generates, and its peak since
its start is the kernel's own count: both must stay below the budget, and the tokens must be equal. The
file that weights are read from again is in the page cache unless memory is short.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import psutil
from _models import model
from _nodes import Place, running
from _record import Record, quick

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node
from edged.cli.generating import REQUEST

TOKENS = quick(4, 32)
SAMPLE_S = 0.005
SETTINGS = "[jobs]\ncontext = 512"


def main(out: Path | None = None) -> dict[str, Any]:
    record, path = Record("budget", out), model("1.1b")
    if record.has("window"):
        return record.done()
    budget = quick(150 << 20, path.stat().st_size // 4)
    places = {
        "roomy": Place("roomy", settings=SETTINGS),
        "tight": Place("tight", settings=SETTINGS, memory=f"{budget}B"),
    }
    found = {}
    for name, place in places.items():  # one after the other: they would share the machine's caches
        with running([place]) as [node]:
            found[name] = _watched(node, add_model(node, path))
    tokens = [row.pop("tokens") for row in found.values()]
    if tokens[0] != tokens[1]:
        raise AssertionError("a window changed the tokens")
    if found["tight"]["peak"] > budget:
        raise AssertionError(f"a worker held {found['tight']['peak']} bytes, its budget is {budget}")
    record.put(
        "window",
        file_bytes=path.stat().st_size,
        budget_bytes=budget,
        tokens_equal=len(tokens[0]),
        tpot_ratio=round(found["tight"]["tpot_ms"] / found["roomy"]["tpot_ms"], 3),
        **found,
    )
    return record.done()


def _watched(node: Node, name: str) -> dict[str, Any]:
    """A job that checks the engine, and one whose workers are watched from their start to its end."""
    asked = {"model": name, "prompt": "The sea " * 60, "raw": True, "n": TOKENS, "temperature": 0.0}
    request = REQUEST | asked | {"ignore_eos": True, "strategy": "local", "nodes": None}
    node.ask("generate", request | {"n": 1})
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
