"""What one all-reduce's exchange costs: frames of a decode step and of a prefill between two processes.

Each is pinned to a core of its own, over loopback, encrypted, in a bare loop, with the sum of both parts
included: ZeroMQ with CURVE, TLS streams that sleep while they wait, and that spin first. Times are
microseconds, the median of each round; `ratio` is ZeroMQ's over the way's. Target: 8 KiB in at most 20
where a way may spin.
"""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import Any

from _peer import Peer
from _record import Record, quick, ratios, spread

PROGRAM = str(Path(__file__).with_name("_runner_exchange.py"))
KINDS = ("zmq", "tls", "tls spinning")
COUNTS = quick({8192: 20, 1 << 20: 2}, {8192: 2000, 1 << 20: 50})  # exchanges in a round, by bytes
ROUNDS = quick(2, 15)
TARGET_US = {("tls spinning", 8192): 20.0}


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("exchange", out)
    if record.has(*(_row(kind, size) for kind in KINDS for size in COUNTS)):
        return record.done()
    with contextlib.ExitStack() as stack:
        pairs = {
            kind: [stack.enter_context(Peer(PROGRAM, str(rank), kind)) for rank in (0, 1)] for kind in KINDS
        }
        for pair in pairs.values():
            ends = [peer.call("listen") for peer in pair]
            _both(pair, "open", *zip(*reversed(ends), strict=True))
        times: dict[tuple[str, int], list[float]] = {(k, size): [] for k in KINDS for size in COUNTS}
        for number in range(1, ROUNDS + 1):
            for size, count in COUNTS.items():
                for kind, pair in pairs.items():
                    _both(pair, "exchange", (size, size), (count // 10 + 1,) * 2)  # wake up both
                    spent = _both(pair, "exchange", (size, size), (count, count))
                    times[kind, size].append(statistics.median(spent[0]))
            for kind, size in times:
                _put(record, kind, size, times, number)
    return record.done()


def _both(pair: list[Peer], what: str, *arguments: tuple[Any, Any]) -> list[Any]:
    """Ask both ranks at once; each argument is (rank 0's, rank 1's)."""
    for rank, peer in enumerate(pair):
        peer.ask(what, *(each[rank] for each in arguments))
    return [peer.answer(what) for peer in pair]


def _row(kind: str, size: int) -> str:
    return f"{kind} {size} bytes"


def _put(
    record: Record, kind: str, size: int, times: dict[tuple[str, int], list[float]], rounds: int
) -> None:
    mine = times[kind, size]
    record.put(
        _row(kind, size),
        is_partial=rounds < ROUNDS,
        rounds=rounds,
        us=spread(mine),
        target_us=TARGET_US.get((kind, size)),
        ratio=ratios(times["zmq", size], mine),
    )
