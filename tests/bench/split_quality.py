"""What split training learns: three clients of Natural Instructions and a server, beside central training.

Each client has a task of its own, and its rows stay with it. `split`: label-sharing at cut 3, one pass over
all clients' rows a step, adapters averaged every 10 steps. `central`: the same steps on one node that has all
rows, with as many of them in a batch. For each: the held-out loss of the rows with split "test" and, of some
of them, Rouge-L of what `edged generate --adapter` says, greedily; `base` is the model without an adapter.
The held-out loss must fall, Rouge-L rise, both within 5 % of central training. Skips without the rows.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _nodes import SILENCE_S, running
from _record import ROOT, Record, quick
from _training import MODEL, offer, place, train
from edged_plugins._tensors.rows import rouge_l

from edged.cli.demo import add_model, model_file
from edged.cli.demo_nodes import Node
from edged.cli.generating import REQUEST

ROWS = Path(os.environ.get("EDGED_ROWS") or ROOT.parent / "shared" / "data" / "natural-instructions")
CLIENTS = quick(("0342", "0008"), ("0342", "0008", "0131"))
STEPS = quick(2, 40)
BATCH = quick(1, 4)
ASKED = quick(1, 20)  # held-out rows of each client that are answered
ANSWER_TOKENS = quick(4, 32)
COMMON = {
    "model": MODEL,
    "steps": STEPS,
    "max_length": 128,
    "learning_rate": 2e-3,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "eval_every": 0,
    "eval_rows": quick(2, 90),  # all there are, so that both ways are judged by the same
    "checkpoint_every": 1000,
}


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("split_quality", out)
    if not ROWS.is_dir():
        record.put("split", skipped=f"no rows at {ROWS}; set EDGED_ROWS")
        return record.done()
    if all(record.has(row) for row in ("base", "split", "central", "comparison")):
        return record.done()
    own = {name: _rows(name) for name in CLIENTS}
    with (
        tempfile.TemporaryDirectory() as folder,
        running([place("server", threads=2), *map(place, CLIENTS)]) as nodes,
    ):
        server, *clients = nodes
        name = add_model(server, model_file())
        for client, rows in zip(clients, own.values(), strict=True):
            offer(client, "own", rows, Path(folder))
        offer(server, "all", [row for rows in own.values() for row in rows], Path(folder))
        documents = {"split": _split(server, clients), "central": _central(server)}
        adapters = {"base": None, **{kind: document["adapter"] for kind, document in documents.items()}}
        for kind, adapter in adapters.items():
            asked = [row for rows in own.values() for row in _held_out(rows)[:ASKED]]
            rouge = statistics.fmean(
                rouge_l(_answer(server, name, row, adapter), row["output"]) for row in asked
            )
            document = documents.get(kind, documents["split"])
            loss = document["eval_loss"][0 if kind == "base" else -1]
            more = (
                {} if kind == "base" else {"bytes_sent": document["bytes_sent"], "steps": document["steps"]}
            )
            record.put(kind, held_out_loss=round(loss, 4), rouge_l=round(rouge, 4), rows=len(asked), **more)
    rows = {kind: record.get(kind) for kind in ("base", "split", "central")}
    record.put(
        "comparison",
        loss_fell=rows["split"]["held_out_loss"] < rows["base"]["held_out_loss"],
        rouge_rose=rows["split"]["rouge_l"] > rows["base"]["rouge_l"],
        loss_over_central=round(rows["split"]["held_out_loss"] / rows["central"]["held_out_loss"], 4),
        rouge_over_central=round(rows["split"]["rouge_l"] / max(1e-9, rows["central"]["rouge_l"]), 4),
        target="within 5 % of central",
    )
    return record.done()


def _split(server: Node, clients: Sequence[Node]) -> dict[str, Any]:
    settings = COMMON | {
        "clients": [{"node": client.name, "data": "own"} for client in clients],
        "server": {"node": server.name},
        "cut": 3,
        "batch_size": BATCH,
        "schedule": "client-batch",
        "average_every": 10,
        "adapter": "split",
    }
    return train(server, "split", settings)[0]


def _central(server: Node) -> dict[str, Any]:
    settings = {"data": "all", "batch_size": BATCH * len(CLIENTS), "adapter": "central"}
    return train(server, "local", COMMON | settings)[0]


def _rows(client: str) -> list[str]:
    """Those with an answer: a few tasks have rows without one, which no training takes."""
    lines = (ROWS / f"client-{client}.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["output"]]


def _held_out(rows: Sequence[str]) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, rows) if row.get("split") == "test"]


def _answer(node: Node, model: str, row: dict[str, Any], adapter: str | None) -> str:
    """Greedily, as the rows were trained: instruction, a blank line, input."""
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    asked = REQUEST | {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "n": ANSWER_TOKENS,
        "temperature": 0.0,
        "adapter": adapter,
        "strategy": "local",
    }
    with node.client() as client:
        return str(client.call("generate", asked, silence_s=SILENCE_S)["text"])
