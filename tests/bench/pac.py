"""Parallel adapters: what an epoch takes that reads kept states, against the first, which computes them.

SmolLM2 in F32 on one node, rows of 128 tokens in batches of 4, at one and two threads; the loss on every
position, or on the answer's last quarter. `ratio` is the first epoch's seconds over those of the second and
third, round by round, and must reach `target`. `bound` is the same ratio of floating-point operations:
blocks, forward only, against head (logits and their gradient) and side network (forward and both gradients);
what an epoch does beside those, such as softmax, AdamW and reading `kept_bytes` from disk, is in no bound.
`freed_bytes`: private memory that the process gave back when the blocks had no more to do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import Record, quick, ratios, spread

from edged import Role, TrainingSpec
from edged.cli.demo import model_file

THREADS, LOSSES = (1, 2), {"all": 2.2, "answer": 3.0}
ROUNDS, BATCH, LENGTH = quick(1, 5), quick(2, 4), quick(16, 128)
ROWS, EPOCHS = 3 * BATCH, 3
ANSWER = LENGTH // 4
SHA = "0" * 64


class _NoChannel:
    """Of a job on one node."""

    rank, size, bytes_sent = 0, 1, 0


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("pac", out)
    rows = {_row(loss, threads): (loss, threads) for loss in LOSSES for threads in THREADS}
    if not record.has(*rows):
        from edged_plugins.torch_blocks._engine import open_blocks  # torch is not loaded without need

        blocks = open_blocks(str(model_file()))
        timed: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
        for number in range(1, ROUNDS + 1):
            for row, (loss, threads) in rows.items():
                timed[row].append(_epochs(blocks, loss, threads))
                _put(record, row, loss, timed[row], number)
    return record.done()


def _row(loss: str, threads: int) -> str:
    return f"loss on {loss}, {threads} thread{'s' if threads > 1 else ''}"


def _put(record: Record, row: str, loss: str, timed: Sequence[dict[str, float]], number: int) -> None:
    first, later = ([each[key] for each in timed] for key in ("first_s", "later_s"))
    record.put(
        row,
        is_partial=number < ROUNDS,
        rounds=number,
        first_s=spread(first),
        later_s=spread(later),
        ratio=ratios(first, later),
        target=LOSSES[loss],
        bound=round(timed[-1]["bound"], 3),
        kept_bytes=int(timed[-1]["kept_bytes"]),
        freed_bytes=spread([each["freed_bytes"] for each in timed]),
        computed_rows=int(timed[-1]["computed_rows"]),
    )


def _epochs(blocks: Any, loss: str, threads: int) -> dict[str, float]:
    """A fresh job: seconds of its first epoch, and of one of the later ones."""
    from edged_plugins.split_learning._job import check_local
    from edged_plugins.split_learning._trainer import load

    steps = EPOCHS * ROWS // BATCH
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("\n".join(f'{{"text": "{number}"}}' for number in range(ROWS)))
        words = {"topology": "parallel-adapters", "data": "rows", "loss_on": "all", "eval_rows": 0}
        sizes = {"batch_size": BATCH, "max_length": LENGTH, "steps": steps}
        whole = (0, blocks.layers), (0, 1), (0, 1), (0, blocks.vocab)
        spec = TrainingSpec(
            "bench",
            check_local(words | sizes),
            (Role(0, "0" * 64, 0, *whole, 1.0),),
            0,
            str(data),
            str(Path(folder) / "job" / "rank-0"),
            0,
            "smollm2",
            SHA,
            threads,
        )
        client = load(spec, blocks, _NoChannel())
        client._training = [_random(client, number, loss) for number in range(ROWS)]  # of the length we want
        took, held = list[float](), list[int]()
        for epoch in range(EPOCHS):
            began = time.perf_counter()
            for step in range(epoch * steps // EPOCHS, (epoch + 1) * steps // EPOCHS):
                client.step(step, lambda kind, step, values: None)
            took.append(time.perf_counter() - began)
            held.append(_private_bytes())
        kept, computed = client.kept.bytes, client.computed_rows
        bound = _bound(client, loss)
        client.close()
    later_s = sum(took[1:]) / (EPOCHS - 1)
    return {
        "first_s": took[0],
        "later_s": later_s,
        "bound": bound,
        "kept_bytes": kept,
        "freed_bytes": held[0] - held[-1],
        "computed_rows": computed,
    }


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


def _random(client: Any, number: int, loss: str) -> Any:
    """A row of random ids, its loss on all of it or on its last part."""
    import numpy as np

    draw = np.random.default_rng(number)
    ids = draw.integers(0, client.blocks.vocab, (1, LENGTH))
    labels = np.where(np.arange(LENGTH) >= (0 if loss == "all" else LENGTH - ANSWER), ids, -100)
    return client._row(ids, labels)


def _bound(client: Any, loss: str) -> float:
    """By floating-point operations of one row's products."""
    blocks, side = client.blocks, sum(parameter.numel() for parameter in client.side.parameters())
    span = blocks.span(0, 1)
    weights = sum(p.numel() for p in span.parameters() if p.ndim > 1) * blocks.layers
    wanted = LENGTH - 1 if loss == "all" else ANSWER
    attention = 4 * LENGTH * LENGTH * blocks.hidden * blocks.layers  # scores and what they weigh
    backbone = 2 * LENGTH * weights + attention
    own = wanted * (4 * blocks.vocab * blocks.hidden + 6 * side)
    return (backbone + own) / own
