"""The server of federated rounds with 1,000 clients, 20 % of them away in each round, beside Flower's server.

FedAvg over SmolLM2 135M's q and v at r = 8: 460,800 F32 values down and up for each client that trains; the
others are drawn anew in every round. `ours` is personal_lora's own server with the residual's meter, which is
part of its loop, and `ours without the residual` is that without; `flower` is flwr's gRPC server, client
manager, `Server.fit_round` and FedAvg, of the version named below, as its `start_server` puts them together.
Each server is a process; all of its clients are one other process, send the same serialised bytes, and share
one encrypted link over loopback: CURVE here, TLS there. Rounds of all three are taken in turns, the first of
each left out. Both servers' BLAS has one thread. `ratio` is updates a second over Flower's. Target: 2.

The memory rows are a server's peak (ru_maxrss) after two rounds, less what it held before the first; `ratio`
is over that of the fewest clients. One link holds at most 64 messages at each end, so what a thousand links
would hold in their queues is not in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _peer import Peer
from _record import QUICK, Record, quick, ratios, spread

HERE = Path(__file__).parent
FLOWER = "flwr==1.42.0"
VENV = Path.home() / ".cache" / "edged" / "bench" / FLOWER.replace("==", "-")
CLIENTS, FRACTION = quick(12, 1000), 0.8
ROUNDS = quick(1, 3)
MEMORY = quick((12,), (100, 300, 1000))
TARGET = 2.0
OURS, BARE, THEIRS = "ours", "ours without the residual", "flower"


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("federation", out)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes that are started here
    if not record.has(OURS, BARE, THEIRS):
        _speed(record)
    for is_measured in (True, False):
        _memory(record, is_measured)
    return record.done()


def _speed(record: Record) -> None:
    flower = _flower()
    rates: dict[str, list[float]] = {OURS: [], BARE: []} | ({THEIRS: []} if flower else {})
    spent: dict[str, list[float]] = {name: [] for name in rates}
    with ExitStack() as stack:
        rounds: dict[str, Any] = {
            OURS: stack.enter_context(_ours(CLIENTS, True)),
            BARE: stack.enter_context(_ours(CLIENTS, False)),
        }
        if flower:
            rounds[THEIRS] = stack.enter_context(_theirs(flower, CLIENTS))
        for number in range(ROUNDS + 1):
            for name, one in rounds.items():
                seconds, processor, _, updates = one.round(number)
                if number:  # the first is of connections and caches, and ours sends no adapter in it
                    rates[name].append(updates / seconds)
                    spent[name].append(1000 * processor / updates)
            for name in rates if number else ():
                _put(record, name, rates, spent, number)
    if not flower:
        record.put(THEIRS, skipped=f"{FLOWER} is not installed; a run that is not quick installs it")


def _put(
    record: Record, name: str, rates: dict[str, list[float]], spent: dict[str, list[float]], rounds: int
) -> None:
    record.put(
        name,
        is_partial=rounds < ROUNDS,
        rounds=rounds,
        clients=CLIENTS,
        updates_s=spread(rates[name]),
        processor_ms=spread(spent[name]),
        ratio=ratios(rates[name], rates[THEIRS]) if THEIRS in rates else None,
        target=TARGET if name == OURS else None,
    )


def _memory(record: Record, is_measured: bool) -> None:
    what = "" if is_measured else " without the residual"
    grown: list[int] = []
    for clients in MEMORY:
        row = f"memory of {clients} clients{what}"
        if not record.has(row):
            with _ours(clients, is_measured) as ours:
                before = ours.held()
                for number in range(2):
                    _, _, peak, _ = ours.round(number)
            more = int(peak) - before
            record.put(row, before_bytes=before, more_bytes=more, ratio=round(more / (grown or [more])[0], 3))
        grown.append(record.get(row)["more_bytes"])


class _Pair:
    """A server's process, and that of all of its clients."""

    def __init__(self, server: Peer, clients: Peer, has_both: bool) -> None:
        self._server, self._clients, self._has_both = server, clients, has_both

    def round(self, number: int) -> Sequence[float]:
        """Seconds, wall and processor's, the most memory so far, updates."""
        self._server.ask("round", number)
        if not self._has_both:  # its clients answer whenever they are asked
            found: list[float] = self._server.answer("round")
            return found
        self._clients.ask("round", number)
        return [*self._server.answer("round"), self._clients.answer("round")]

    def held(self) -> int:
        return int(self._server.call("held"))


@contextmanager
def _ours(clients: int, is_measured: bool) -> Iterator[_Pair]:
    program = str(HERE / "_runner_rounds.py")
    with Peer(program, "server") as server, Peer(program, "members") as members:
        key = members.call("start", *server.call("open"))
        server.ask("start", key, clients, FRACTION, is_measured)
        members.call("open")
        job = server.answer("start")
        server.ask("greet")
        members.call("greet", clients, *job)
        server.answer("greet")
        yield _Pair(server, members, has_both=True)
        server.call("end")
        members.call("end")


@contextmanager
def _theirs(python: str, clients: int) -> Iterator[_Pair]:
    program = str(HERE / "_runner_flower.py")
    with Peer(program, "server", python=python) as server, Peer(program, "clients", python=python) as all_:
        all_.call("start", *server.call("start", clients, FRACTION), clients)
        if not server.call("meet", clients):
            raise RuntimeError(f"expected {clients} clients to join Flower's server in time")
        yield _Pair(server, all_, has_both=False)
        server.call("end")


def _flower() -> str:
    """Its Python, in an environment of its own, made where it is missing; "" in a quick run without it."""
    python = VENV / "bin" / "python"
    if not python.exists():
        if QUICK:
            return ""
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    installed = subprocess.run([str(python), "-c", "import flwr"], check=False, stderr=subprocess.DEVNULL)
    if installed.returncode:
        if QUICK:
            return ""
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", FLOWER], check=True)
    return str(python)
