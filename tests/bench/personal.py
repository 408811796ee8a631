"""Members with tasks of their own: each alone, all together by five methods, and both at once.

Ten clients of Natural Instructions, one task each, and a server; half of the clients have few rows. `local`
is a personal adapter that is drawn to nothing, trained for as many steps; `fdlora` weighs a personal adapter
and the common one. It trains both, each for as many steps as the other methods train their one: `fdlora, same
steps` has half of them for each, so that a member computes as much as in any other row. Of each method: the
held-out loss over all clients, Rouge-L of what `edged generate --adapter` says to held-out rows, the largest
residual, and bytes of a round and member, predicted and sent. Personalised shall beat global on 70 % of
clients, and global local where there is little data.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
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
RICH = quick(("0342",), ("0342", "0008", "0131", "0065", "0272"))
POOR = quick(("0093",), ("0093", "0083", "0338", "0092", "0305"))
POOR_ROWS = 8
METHODS = quick(("fedavg",), ("fedavg", "flora", "flexlora", "ffa", "fdlora"))
SAME_STEPS = "fdlora, same steps"
ROUNDS, STEPS = quick(1, 4), quick(1, 4)
ASKED = quick(1, 2)  # held-out rows of each client that are answered
ANSWER_TOKENS = quick(4, 24)
COMMON = {
    "model": MODEL,
    "rounds": ROUNDS,
    "local_steps": STEPS,
    "batch_size": quick(1, 2),
    "max_length": 128,
    "learning_rate": 2e-3,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "eval_every": 0,
    "eval_rows": quick(2, 100),
    "personal_steps": ROUNDS * STEPS,
}
ALONE = {
    "personal": "ditto",
    "personal_pull": 0.0,
    "personal_steps": STEPS,
}  # as many steps, drawn to nothing
HALVES = {"local_steps": STEPS // 2, "personal_steps": ROUNDS * STEPS // 2}


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("personal", out)
    if not ROWS.is_dir():
        record.put("base", skipped=f"no rows at {ROWS}; set EDGED_ROWS")
        return record.done()
    names = [*RICH, *POOR]
    with (
        tempfile.TemporaryDirectory() as folder,
        running([place("server"), *map(place, names)]) as nodes,
    ):
        server, *clients = nodes
        model = add_model(server, model_file())
        rows = {name: _rows(name) for name in names}
        for client, own in zip(clients, rows.values(), strict=True):
            offer(client, "own", own, Path(folder))
        asked = [_held_out(own)[:ASKED] for own in rows.values()]
        for method in METHODS:
            if not record.has(method):
                _method(record, method, model, server, clients, asked)
        if "fdlora" in METHODS and not record.has(SAME_STEPS):
            _method(record, SAME_STEPS, model, server, clients, asked)
    if not record.has("comparison"):
        _compare(record, names)
    return record.done()


def _method(
    record: Record,
    row: str,
    model: str,
    server: Node,
    clients: Sequence[Node],
    asked: Sequence[Sequence[dict[str, Any]]],
) -> None:
    """One job; with the first method each client's adapter of its own, too."""
    method, is_first = row.partition(",")[0], row == METHODS[0]
    settings = COMMON | {
        "method": method,
        "clients": [{"node": client.name, "data": "own"} for client in clients],
        "server": {"node": server.name},
        "adapter": row.replace(", ", "-").replace(" ", "-"),
    }
    changes = ALONE if is_first else HALVES if row == SAME_STEPS else {}
    document, _ = train(server, "federated", settings | changes)
    last, first = document["evals"][-1], document["evals"][0]
    every = range(len(clients))
    if is_first:
        said = [_rouge(client, model, None, rows) for client, rows in zip(clients, asked, strict=True)]
        losses = [first[f"loss_{rank}"] for rank in every]
        record.put("base", held_out_loss=round(first["loss"], 4), losses=losses, rouge_l=_mean(said))
        _put_own(record, "local", model, settings["adapter"], last, clients, asked)
    if method == "fdlora":
        _put_own(record, f"{row}, personal", model, settings["adapter"], last, clients, asked)
    log = document["rounds_log"]
    sent = sum(sum(row[way].values()) for row in log for way in ("bytes_up", "bytes_down"))
    said = [_rouge(server, model, document["adapter"], rows) for rows in asked]
    record.put(
        row,
        held_out_loss=round(last["loss"], 4),
        losses=[last[f"loss_{rank}"] for rank in every],
        rouge_l=_mean(said),
        residual=max(row["residual"] for row in log),
        bytes_a_round_and_member=round(sent / len(log) / len(clients)),
        bytes_sent=document["bytes_sent"],
        bytes_predicted=document["plan"]["predicted"]["bytes_sent"],
    )


def _put_own(
    record: Record,
    row: str,
    model: str,
    adapter: str,
    last: Mapping[str, float],
    clients: Sequence[Node],
    asked: Sequence[Sequence[dict[str, Any]]],
) -> None:
    """Of the adapters that stayed with their members."""
    said = [
        _rouge(client, model, f"{adapter}-personal", rows)
        for client, rows in zip(clients, asked, strict=True)
    ]
    losses = [last[f"own_loss_{rank}"] for rank in range(len(clients))]
    record.put(row, held_out_loss=round(last["own_loss"], 4), losses=losses, rouge_l=_mean(said))


def _compare(record: Record, names: Sequence[str]) -> None:
    found = {name: record.get(name) for name in ("local", *METHODS)}
    best = min(METHODS, key=lambda name: found[name]["held_out_loss"])
    poor = range(len(RICH), len(names))
    more: dict[str, Any] = {}
    if "fdlora" in METHODS:
        one = min(
            (name for name in METHODS if name != "fdlora"), key=lambda name: found[name]["held_out_loss"]
        )
        pairs = {
            "personal_better": ("fdlora, personal", "fdlora"),  # twice the steps, as the method has it
            "personal_better_same_steps": (f"{SAME_STEPS}, personal", one),  # than the best of the others
        }
        for key, (own, common) in pairs.items():
            losses = [record.get(row)["losses"] for row in (own, common)]
            more[key] = round(sum(a < b for a, b in zip(*losses, strict=True)) / len(names), 2)
        more["personal_target"] = 0.7
    record.put(
        "comparison",
        best_global=best,
        global_better_with_little_data=round(
            sum(found[best]["losses"][i] < found["local"]["losses"][i] for i in poor) / len(POOR), 2
        ),
        poor_global=statistics.fmean(found[best]["losses"][i] for i in poor),
        poor_local=statistics.fmean(found["local"]["losses"][i] for i in poor),
        **more,
    )


def _rows(client: str) -> list[str]:
    """Those with an answer; of a client with little data its first few to train on."""
    lines = [
        line for line in (ROWS / f"client-{client}.jsonl").read_text().splitlines() if _of(line)["output"]
    ]
    held_out = [line for line in lines if _of(line).get("split") == "test"]
    trained = [line for line in lines if _of(line).get("split") != "test"]
    return [*(trained[:POOR_ROWS] if client in POOR else trained), *held_out]


def _held_out(rows: Sequence[str]) -> list[dict[str, Any]]:
    return [row for row in map(_of, rows) if row.get("split") == "test"]


def _of(line: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(line)
    return found


def _mean(said: Sequence[float]) -> float:
    return round(statistics.fmean(said), 4)


def _rouge(node: Node, model: str, adapter: str | None, rows: Sequence[dict[str, Any]]) -> float:
    """Of greedy answers, as the rows were trained: instruction, a blank line, input."""
    found = []
    with node.client() as client:
        for row in rows:
            question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
            asked = REQUEST | {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "n": ANSWER_TOKENS,
                "temperature": 0.0,
                "adapter": adapter,
                "strategy": "local",
            }
            text = str(client.call("generate", asked, silence_s=SILENCE_S)["text"])
            found.append(rouge_l(text, row["output"]))
    return statistics.fmean(found)
