"""Split training with SmolLM2: against one node, against the plain way, in memory, and on a slow link.

`pipeline`: samples a second of two one-thread nodes over those of one one-thread node, the same job of
16 x 128 tokens in 8 micro-batches, loss on every position; at least 1.5. With equal stages it could be
2 x 8 / 9 = 1.78.
`one node`: seconds of a step of 4 x 128 tokens of the plain loop (`_runner_plain`: transformers and peft)
over those of a local job; at least 1.
`memory`: the client's peak at cut 3 of 30 over that of the plain loop on the same batch; at most 0.4.
`codecs`: 100 steps of 2 x 64 tokens over 10 Mbit/s each way (namespaces, a token bucket; needs root): steps a
second and the mean loss of the last ten, beside those of f32.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _network import network
from _nodes import running
from _record import Record, quick, ratios, spread
from _training import MODEL, offer, place, texts, train

from edged.cli.demo import add_model, model_file
from edged.cli.demo_nodes import Node

ROUNDS = quick(1, 3)
PLAIN_ROUNDS = quick(1, 7)  # of short runs
STEPS = quick(2, 3)  # of a round; the first warms up and does not count
MBIT = 10
CODECS = quick(("f32", "int8"), ("f32", "int8", "adatopk"))
LINK_STEPS = quick(2, 100)
SHORT = {"eval_rows": 0, "eval_every": 0, "loss_on": "all", "checkpoint_every": 1000}


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("split", out)
    with tempfile.TemporaryDirectory() as folder:
        if not record.has("pipeline", "one node, 1 thread", "memory"):
            with running([place("first"), place("second")]) as nodes:
                add_model(nodes[0], model_file())
                offer(nodes[0], "rows", list(texts(64, 140)), Path(folder))
                if not record.has("pipeline"):
                    _pipeline(record, nodes)
                _plain(record, nodes[0], Path(folder), 1)
                if not record.has("memory"):
                    _memory(record, nodes, Path(folder))
        if not record.has("one node, 2 threads"):
            with running([place("alone", threads=2)]) as nodes:
                add_model(nodes[0], model_file())
                offer(nodes[0], "rows", list(texts(64, 140)), Path(folder))
                _plain(record, nodes[0], Path(folder), 2)
        if not all(record.has(f"{MBIT} Mbit/s {codec}") for codec in CODECS):
            _codecs(record, Path(folder))
    return record.done()


def _pipeline(record: Record, nodes: Sequence[Node]) -> None:
    size = {"model": MODEL, "steps": STEPS, "batch_size": quick(2, 16), "micro_batches": quick(2, 8)} | SHORT
    alone = size | {"clients": [{"data": "rows"}]}
    together = size | {
        "topology": "pipeline",
        "clients": [{"node": "first", "data": "rows"}],
        "server": {"node": "second"},
        "cut": "auto",
    }
    rates: dict[str, list[float]] = {"local": [], "split": []}
    cut = None
    for number in range(ROUNDS):
        for kind, settings in (("local", alone), ("split", together))[:: 1 if number % 2 else -1]:
            document, steps = train(nodes[0], kind, settings)
            rates[kind].append(size["batch_size"] / _step_s(steps))
            cut = document["plan"]["cut"] if kind == "split" else cut
        record.put(
            "pipeline",
            is_partial=number + 1 < ROUNDS,
            rounds=number + 1,
            cut=cut,
            samples_per_s=spread(rates["local"]),
            pipeline_samples_per_s=spread(rates["split"]),
            gain=ratios(rates["split"], rates["local"]),
            target=1.5,
            bound=1.78,
        )


def _plain(record: Record, node: Node, folder: Path, threads: int) -> None:
    row = f"one node, {threads} thread{'s' if threads > 1 else ''}"
    if record.has(row):
        return
    settings = {"model": MODEL, "steps": STEPS, "clients": [{"data": "rows"}]} | SHORT
    ours, plain = [], []
    for number in range(PLAIN_ROUNDS):
        for kind in ("ours", "plain")[:: 1 if number % 2 else -1]:
            if kind == "ours":
                ours.append(_step_s(train(node, "local", settings)[1]))
            else:
                plain.append(_step_s(_run_plain(folder, threads)[0]))
        record.put(
            row,
            is_partial=number + 1 < PLAIN_ROUNDS,
            rounds=number + 1,
            step_s=spread(ours),
            plain_step_s=spread(plain),
            ratio=ratios(plain, ours),
            target=1.0,
        )


def _memory(record: Record, nodes: Sequence[Node], folder: Path) -> None:
    settings = {
        "model": MODEL,
        "steps": STEPS,
        "clients": [{"node": "first", "data": "rows"}],
        "server": {"node": "second"},
        "cut": 3,
    } | SHORT
    document, _ = train(nodes[0], "split", settings)
    client = document["measured"]["memory_bytes"][nodes[0].node_id]
    _, plain = _run_plain(folder, 1)
    predicted = document["plan"]["predicted"]["memory_bytes"]
    record.put(
        "memory",
        client_bytes=client,
        client_predicted_bytes=predicted[nodes[0].node_id],
        server_bytes=document["measured"]["memory_bytes"][nodes[1].node_id],
        server_predicted_bytes=predicted[nodes[1].node_id],
        plain_bytes=plain,
        ratio=round(client / plain, 3),
        target=0.4,
    )


def _codecs(record: Record, folder: Path) -> None:
    """Each codec on the same rows and seeds, one after another over the same two nodes."""
    with network(2) as cable:
        places = [
            place(name, prefix=cable.prefix(i), interface=cable.address(i))
            for i, name in enumerate(("phone", "cloud"))
        ]
        with running(places) as nodes:
            add_model(nodes[0], model_file())
            offer(nodes[0], "rows", list(texts(256, 70, seed=1)), folder)
            _train_on(nodes, "f32", 1)  # the model travels before the link is slow
            cable.limit(MBIT)
            for codec in CODECS:
                if record.has(f"{MBIT} Mbit/s {codec}"):
                    continue
                document, steps = _train_on(nodes, codec, LINK_STEPS)
                last = document["loss"][-10:]
                put = {
                    "steps_per_s": round(1 / _step_s(steps), 3),
                    "loss": round(statistics.fmean(last), 4),
                    "first_loss": round(document["loss"][0], 4),
                    "bytes_a_step": round(document["bytes_sent"] / LINK_STEPS),
                    "predicted_bytes_a_step": round(document["plan"]["predicted"]["bytes_sent"] / LINK_STEPS),
                }
                if codec != "f32":
                    base = record.get(f"{MBIT} Mbit/s f32")
                    put["speed_ratio"] = round(put["steps_per_s"] / base["steps_per_s"], 2)
                    put["loss_ratio"] = round(put["loss"] / base["loss"], 3)
                record.put(f"{MBIT} Mbit/s {codec}", **put)


def _train_on(nodes: Sequence[Node], codec: str, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings = {
        "model": MODEL,
        "steps": steps,
        "batch_size": 2,
        "max_length": 64,
        "clients": [{"node": nodes[0].name, "data": "rows"}],
        "server": {"node": nodes[1].name},
        "cut": 3,
        "codec": codec,
        "ratio": 10.0,
    } | SHORT
    return train(nodes[0], "split", settings)


def _run_plain(folder: Path, threads: int) -> tuple[list[dict[str, Any]], int]:
    """Its steps and the peak of its memory, on rows of 4 x 128 tokens."""
    rows = folder / "plain.json"
    rows.write_text(
        json.dumps([[[100 + (s + r + t) % 900 for t in range(128)] for r in range(4)] for s in range(STEPS)])
    )
    program = str(Path(__file__).with_name("_runner_plain.py"))
    command = [sys.executable, program, str(model_file()), str(rows), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    *steps, memory = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return steps, memory["peak_bytes"]


def _step_s(steps: Sequence[dict[str, Any]]) -> float:
    """Of the median step, without the first, which warms up."""
    return statistics.median(step["seconds"] for step in steps[1:] or steps)
