"""Training jobs for the benchmarks: nodes that can train, rows of a known length, and one job on them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _nodes import Place

from edged.cli.demo_nodes import Node

PLUGINS = ("monitor", "shard", "torch_blocks", "split_learning", "personal_lora", "zeroth_order")
SILENCE_S = 1800.0
WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "a",
    "small",
    "boat",
    "came",
    "home",
    "with",
    "fish",
    "for",
    "many",
    "people",
    "who",
    "waited",
    "on",
    "the",
    "old",
    "stone",
    "bridge",
    "while",
    "two",
    "dogs",
    "ran",
    "along",
    "the",
    "sand",
    "under",
    "a",
    "warm",
    "wind",
    "that",
    "smelled",
    "of",
    "salt",
    "and",
    "bread",
]
MODEL = "smollm2-135m-instruct-q4_1"


def place(name: str, threads: int = 1, prefix: Sequence[str] = (), interface: str = "lo") -> Place:
    return Place(name, tuple(prefix), interface, plugins=PLUGINS, threads=threads)


def texts(count: int, words: int, seed: int = 0) -> Iterator[str]:
    """Rows of plain text, each of more tokens than words: their loss is on every position."""
    drawn = random.Random(seed)
    for _ in range(count):
        yield json.dumps({"text": " ".join(drawn.choices(WORDS, k=words))})


def offer(node: Node, name: str, rows: Sequence[str], folder: Path) -> None:
    """`edged data add` on that node."""
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(rows) + "\n")
    with node.client() as client, file.open("rb") as opened:
        events = client.stream("data.add", {"name": name}, [opened.fileno()], silence_s=60.0)
        _drain(events)


def train(node: Node, kind: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One job to its end: its document, and what it told of each step."""
    body = {"kind": kind, "name": "bench", "settings": dict(settings)}
    steps = []
    with node.client() as client:
        events = client.stream("finetune", body, silence_s=SILENCE_S)
        try:
            while True:
                event = next(events)
                if event.get("event") == "step":
                    steps.append(event)
        except StopIteration as end:
            return end.value, steps


def _drain(events: Iterator[Any]) -> None:
    for _ in events:
        pass
