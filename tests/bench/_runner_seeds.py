"""One member of a federated job in a process of its own, or inference alone: the peak of its memory.

    _runner_seeds.py METHOD MODEL ROWS --batch 4 --length 128

METHOD: a federated job's, whose local steps the member does as in a job of one round; its server is `Script`,
which says what a server of that method says before the first update. "inference": the same model and adapter,
and what `edged` does to evaluate rows, forward passes over the same batches without gradients.

One JSON line: `loaded_bytes`, resident when the model is there; `peak_bytes`, the most from the process's
start, reading the model included; `steps_peak_bytes`, the most after that, for which Linux's record of the
peak begins anew (/proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from edged_plugins import personal_lora, zeroth_order
from edged_plugins._training.loss import summed, tensors_of
from edged_plugins._training.rows import Rows
from edged_plugins.personal_lora import _messages
from edged_plugins.personal_lora._job import check_federated, read
from edged_plugins.personal_lora._trainer import load
from edged_plugins.torch_blocks._engine import open_blocks

from edged import Role, TrainingSpec

ENTRIES = {
    entry.name: entry for entry in (*personal_lora.edged_aggregators({}), *zeroth_order.edged_aggregators({}))
}
MEMBER, SERVER = 0, 1
RATE = 1e-7  # of no steps that matter: what is looked at is memory


class Script:
    """A server's end of one round and of the end, which only speaks; what a member sends is counted."""

    rank, size = MEMBER, 2

    def __init__(self, method: str, seeds: int, hello: Mapping[str, Any]) -> None:
        self.bytes_sent = 0
        self._said: deque[tuple[dict[str, Any], list[memoryview]]] = deque([(dict(hello), [])])
        for number in (0, 1):
            self._down(method, seeds, number)

    def _down(self, method: str, seeds: int, number: int) -> None:
        has_table = method == "fedkseed"
        start = "none" if has_table else "AB"
        words = _messages.down(number, start, "", 0, 0, int(has_table))
        self._said.append((words, []))
        if has_table:
            table = np.zeros(seeds, "<f4")
            named = {"k": "extras", "at": [number], "arrays": [["table", "f4", [seeds]]]}
            self._said.append((named, [memoryview(table.tobytes())]))

    def send(self, to: int, header: Mapping[str, Any], frames: Any = ()) -> None:
        self.bytes_sent += sum(memoryview(frame).nbytes for frame in frames)

    def poll(self, source: int, timeout_s: float) -> bool:
        return True

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        return self._said.popleft()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    is_member = chosen.method != "inference"
    settings = check_federated(
        ENTRIES,
        {
            "method": chosen.method if is_member else "fedavg",
            "rounds": 1,
            "local_steps": chosen.steps,
            "batch_size": chosen.batch,
            "max_length": chosen.length,
            "learning_rate": RATE,
            "loss_on": "all",
            "eval_rows": 0,
            "clients": [{"node": "member", "data": "rows"}],
            "server": {"node": "server"},
        },
    )
    run = _member if is_member else _inference
    print(json.dumps(run(settings, chosen)), flush=True)


def _inference(settings: Mapping[str, Any], chosen: Any) -> dict[str, int]:
    job, blocks = read(settings), open_blocks(str(chosen.model))
    rows = Rows.read(str(chosen.rows), blocks.tokenizer, job, 0)
    span = blocks.span(0, blocks.layers, embed=True, head=True, dtype=job.weights)
    span.add_lora(r=job.r, alpha=job.alpha, targets=job.target_modules, seed=job.seed)
    span.train(False)
    loaded = _loaded()
    with torch.no_grad():
        for step in range(2 * chosen.steps):  # a slope is of two losses
            ids, labels = tensors_of(rows.batch(step // 2))
            summed(span, span(ids), labels).item()
    return loaded | _peaks(loaded)


def _member(settings: Mapping[str, Any], chosen: Any) -> dict[str, int]:
    role = Role(MEMBER, "member", MEMBER, (0, 1), (0, 1), (0, 1), (0, 1), 1.0, 0)
    job = read(settings)
    with tempfile.TemporaryDirectory() as folder:
        spec = TrainingSpec(
            "bench",
            settings,
            (role, role),
            MEMBER,
            str(chosen.rows),
            folder,
            SERVER,
            "bench",
            "0" * 64,
            aggregators={name: entry.load for name, entry in ENTRIES.items()},
            locals={name: entry.local for name, entry in ENTRIES.items() if entry.local},
        )
        member = load(
            spec, open_blocks(str(chosen.model)), cast(Any, None)
        )  # its channel greets by what it says
        member.channel = Script(job.method, int(job.options.get("seeds", 0)), member.hello())
        loaded = _loaded()
        member.run(0, lambda kind, step, values: None, lambda: False)
        assert not member.channel._said, "the member heard all that a server says"
    return loaded | _peaks(loaded)


def _loaded() -> dict[str, int]:
    """Resident bytes, and the peak so far; the record of the peak begins anew."""
    found = {"loaded_bytes": _status("VmRSS"), "load_peak_bytes": _status("VmHWM")}
    Path("/proc/self/clear_refs").write_text("5")
    return found


def _peaks(loaded: Mapping[str, int]) -> dict[str, int]:
    steps = _status("VmHWM")
    return {"steps_peak_bytes": steps, "peak_bytes": max(steps, loaded["load_peak_bytes"])}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
