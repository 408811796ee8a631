"""Training without gradients: a member's memory beside that of inference, and the losses of real clients.

Memory: the peak of a member's process (`_runner_seeds`) over that of a process which only evaluates, the same
model, adapter, rows and threads; of `fedkseed` and `mezo` at most 1.2. `fedavg`, whose members keep what a
backward pass needs, stands beside them. `ratio` is of the whole process and of its steps alone, whichever is
larger; each round runs all kinds one after another.

Losses: three clients of Natural Instructions, one task each, and a server, all of them daemons; the held-out
loss of all and of each client before the first round and after the last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _nodes import running
from _record import ROOT, Record, quick, spread
from _training import MODEL, offer, place, texts, train

from edged.cli.demo import add_model, model_file
from edged.cli.demo_nodes import Node

BLIND = ("fedkseed", "mezo")
ALONE, KINDS = "inference", ("inference", *BLIND, "fedavg")
SHAPES = quick(((1, 32),), ((4, 128), (1, 64)))  # rows, tokens of each
MEMORY_ROUNDS = quick(1, 3)
STEPS = 1
TARGET = 1.2
RUN_S = 900.0
ROWS = Path(os.environ.get("EDGED_ROWS") or ROOT.parent / "shared" / "data" / "natural-instructions")
CLIENTS = ("0338", "0235", "0153")  # whose answers are labels: their slopes agree from row to row
COMMON = {
    "model": MODEL,
    "rounds": quick(1, 4),
    "local_steps": quick(1, 10),
    "batch_size": 1,
    "max_length": 144,
    "target_modules": ["v_proj"],  # where the loss is steepest for its curvature: few steps are to show it
    "r": 2,
    "alpha": 16.0,
    "perturbation": 2.0**-7,
    "eval_every": 0,
    "eval_rows": quick(3, 30),
}
RATES = {"fedkseed": 4e-4, "mezo": 4e-4}
Peaks = dict[str, list[dict[str, int]]]  # of each round, by kind


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("seeds", out)
    with tempfile.TemporaryDirectory() as folder:
        for batch, length in SHAPES:
            if not record.has(*(_row(kind, batch, length) for kind in KINDS)):
                _memory(record, Path(folder), batch, length)
        if not record.has(*BLIND):
            _losses(record, Path(folder))
    return record.done()


def _row(kind: str, batch: int, length: int) -> str:
    return f"memory, {kind}, {batch} x {length}"


# --- memory ---------------------------------------------------------------------------------------


def _memory(record: Record, folder: Path, batch: int, length: int) -> None:
    rows = folder / "texts.jsonl"
    rows.write_text("\n".join(texts(4 * batch, 2 * length)) + "\n")
    found: Peaks = {kind: [] for kind in KINDS}
    for number in range(1, MEMORY_ROUNDS + 1):
        for kind in KINDS[:: 1 if number % 2 else -1]:
            found[kind].append(_run(kind, rows, batch, length))
        for kind in KINDS:
            _put(record, kind, found, batch, length)


def _run(kind: str, rows: Path, batch: int, length: int) -> dict[str, int]:
    program = str(Path(__file__).with_name("_runner_seeds.py"))
    command = [sys.executable, program, kind, str(model_file()), str(rows)]
    command += ["--batch", str(batch), "--length", str(length), "--steps", str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=RUN_S)
    made: dict[str, int] = json.loads(done.stdout)
    return made


def _put(record: Record, kind: str, found: Peaks, batch: int, length: int) -> None:
    mine, plain = found[kind], found[ALONE]
    record.put(
        _row(kind, batch, length),
        is_partial=len(mine) < MEMORY_ROUNDS,
        rounds=len(mine),
        **{
            f"{name}_mb": spread([each[f"{name}_bytes"] / 1e6 for each in mine])
            for name in ("loaded", "peak")
        },
        ratio=spread(
            [
                max(a[name] / b[name] for name in ("peak_bytes", "steps_peak_bytes"))
                for a, b in zip(mine, plain, strict=True)
            ]
        ),
        target=TARGET if kind in BLIND else None,
    )


# --- losses ---------------------------------------------------------------------------------------


def _losses(record: Record, folder: Path) -> None:
    if not ROWS.is_dir():
        for method in BLIND:
            record.put(method, skipped=f"no rows at {ROWS}; set EDGED_ROWS")
        return
    with running([place("server"), *map(place, CLIENTS)]) as nodes:
        server, *clients = nodes
        add_model(server, model_file())
        for client, name in zip(clients, CLIENTS, strict=True):
            offer(client, "own", _rows(name), folder)
        for method in BLIND:
            if not record.has(method):
                _job(record, method, server, clients)


def _job(record: Record, method: str, server: Node, clients: Sequence[Node]) -> None:
    settings = COMMON | {
        "method": method,
        "learning_rate": RATES[method],
        "clients": [{"node": client.name, "data": "own"} for client in clients],
        "server": {"node": server.name},
        "adapter": method,
    }
    document, _ = train(server, "federated", settings)
    first, last = document["evals"][0], document["evals"][-1]
    log, every = document["rounds_log"], range(len(clients))
    sent = sum(sum(row[way].values()) for row in log for way in ("bytes_up", "bytes_down"))
    record.put(
        method,
        rounds=len(log),
        steps=len(log) * settings["local_steps"],
        learning_rate=settings["learning_rate"],
        held_out_loss_before=round(first["loss"], 4),
        held_out_loss=round(last["loss"], 4),
        losses_before=[round(first[f"loss_{rank}"], 4) for rank in every],
        losses=[round(last[f"loss_{rank}"], 4) for rank in every],
        bytes_a_round_and_member=round(sent / len(log) / len(clients)),
        member_mb=[round(document["measured"]["memory_bytes"][each.node_id] / 1e6) for each in clients],
    )


def _rows(client: str) -> list[str]:
    """Those with an answer."""
    lines = (ROWS / f"client-{client}.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["output"]]
