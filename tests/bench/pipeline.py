"""Two one-thread stages against one one-thread node that decodes the same sequences in one batch.

Real daemons; as many jobs as sequences, submitted at once. A rate is the tokens of all jobs in the time in
which all of them were decoding, from the last one's first token to the first one's last. `gain` is the
stages' rate over the node's, round by round: at least 1.5 at 8 sequences, 1.25 at 16 and 1.6 at 32. With
t(n) the time of one node's step of n sequences, two stages of n/2 each can gain at most `bound`, which is
t(n)/t(n/2) of the same run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _models import model
from _nodes import SILENCE_S, Place, generate, request, running
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node

SIZES = quick((2,), (8, 16, 32))
TARGETS = {8: 1.5, 16: 1.25, 32: 1.6}
ROUNDS, TOKENS, PROMPT = quick(2, 5), quick(24, 40), 16
Rates = dict[tuple[str, int], list[float]]  # tokens a second by plan and sequences


class TooFewAtOnce(RuntimeError):
    """Some jobs ended before others began: there was no time in which all were decoding."""


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("pipeline", out)
    if all(record.has(_row(size)) for size in SIZES):
        return record.done()
    with running([Place("first"), Place("second")]) as nodes:
        name = add_model(nodes[0], model("1.1b"))
        for plan in ("local", "layers"):
            generate(nodes[0], name, plan, nodes, 4, PROMPT)
        for size in SIZES:
            if not record.has(_row(size)):
                _measure(record, nodes, name, size)
    return record.done()


def _row(size: int) -> str:
    return f"{size} sequences"


def _measure(record: Record, nodes: Sequence[Node], name: str, size: int) -> None:
    wanted = (("local", size // 2), ("local", size), ("layers", size))
    rates: Rates = {each: [] for each in wanted}
    for number in range(1, ROUNDS + 1):
        for plan, count in wanted if number % 2 else wanted[::-1]:  # none always runs last
            try:
                rates[plan, count].append(_rate(nodes, name, plan, count))
            except TooFewAtOnce as error:
                record.put(_row(size), skipped=f"{plan}, {count} sequences: {error}")
                return
        half, whole, stages = (rates[each] for each in wanted)
        record.put(
            _row(size),
            is_partial=number < ROUNDS,
            rounds=number,
            tokens_per_s=spread(whole),
            stages_tokens_per_s=spread(stages),
            gain=ratios(stages, whole),
            target=TARGETS.get(size),
            bound=ratios([2 * rate for rate in half], whole),  # t(n)/t(n/2) with t(n) = n / rate(n)
        )


def _rate(nodes: Sequence[Node], name: str, plan: str, count: int) -> float:
    """Tokens a second of `count` jobs, while all of them decode."""
    times: list[list[float]] = [[] for _ in range(count)]
    failures: list[Exception] = []

    def follow(mine: list[float]) -> None:
        try:
            with nodes[0].client() as client:
                body = request(name, plan, nodes, TOKENS, PROMPT)
                for event in client.stream("generate", body, silence_s=SILENCE_S):
                    if event["event"] == "token":
                        mine += [time.perf_counter()] * len(event["tokens"])
        except Exception as error:  # the outermost frame of this thread: raised below
            failures.append(error)

    jobs = [threading.Thread(target=follow, args=(mine,)) for mine in times]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if failures:
        raise failures[0]
    begin, end = max(mine[0] for mine in times), min(mine[-1] for mine in times)
    made = sum(begin < at <= end for mine in times for at in mine)
    if end <= begin or made < count:
        raise TooFewAtOnce("the jobs did not all run at once")
    return made / (end - begin)
