"""The server of a federated job, or all of its members: `_runner_rounds.py server` and `... members`.

The server is personal_lora's own trainer over FedAvg, unchanged but for the most clients that a job's file
may name. Its members are of one process, and share one link: `Shared` writes into each header whose message
it is.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from _serve import serve
from edged_plugins import personal_lora
from edged_plugins.personal_lora import _job, _messages, _rank, _server

from edged import TrainingSpec
from edged.channel import End, ZmqChannel

GROUP, MEMBERS, SERVER = "bench", 0, 1  # ranks on the link that all members share
R, TARGETS = 8, ("q_proj", "v_proj")
BLOCKS, HIDDEN, HEADS = 30, 576, 192  # SmolLM2 135M: a hidden state, and what all key-value heads take of it
MODEL = "0" * 64
PATIENCE_S = 60.0
WEIGHT = 10  # rows of every member
OTHER = "m"  # of a header: whose message it is


class Shared:
    """A `Channel` of as many ranks as there are members, over a link to the process that plays them all."""

    def __init__(self, channel: ZmqChannel, rank: int, size: int) -> None:
        self.rank, self.size, self._channel = rank, size, channel
        self._came: dict[int, deque[tuple[dict[str, Any], list[memoryview]]]] = {}

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    def send(self, to: int, header: Any, frames: Any = ()) -> None:
        self._channel.send(MEMBERS, {**header, OTHER: to}, frames)

    def poll(self, source: int, timeout_s: float) -> bool:
        """Messages come in the order in which their members are asked for; others are put aside."""
        while not self._came.get(source):
            if not self._channel.poll(MEMBERS, timeout_s):
                return False
            header, frames = self._channel.receive(MEMBERS, timeout_s)
            self._came.setdefault(header.pop(OTHER), deque()).append((header, frames))
        return True

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        if not self.poll(source, timeout_s):
            raise TimeoutError(f"expected a message of member {source} within {timeout_s:g} s")
        return self._came[source].popleft()


class Blocks:
    """As much of a model as a server asks for: the shapes of its layers, and what an adapter begins with."""

    family = "llama"
    source = SimpleNamespace(path="")

    def linears(self, targets: Any) -> dict[str, tuple[int, int]]:
        rows = {"q_proj": HIDDEN, "v_proj": HEADS}
        return {f"model.layers.{i}.self_attn.{t}": (rows[t], HIDDEN) for i in range(BLOCKS) for t in targets}

    def lora_start(self, r: int, targets: Any, seed: int) -> dict[str, tuple[Any, Any]]:
        chance = np.random.default_rng(seed)
        return {
            name: (
                chance.standard_normal((r, columns), np.float32) / np.float32(math.sqrt(columns)),
                np.zeros((rows, r), np.float32),
            )
            for name, (rows, columns) in self.linears(targets).items()
        }


class Unmeasured:
    """In place of the residual's meter."""

    compute_s = 0.0

    def __enter__(self) -> Unmeasured:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, update: Any) -> None:
        pass

    def of(self, downloads: Any) -> float:
        return math.nan


class Server:
    """Rank 1 of the link; it listens."""

    def open(self) -> list[Any]:
        self._link = ZmqChannel(SERVER, 2, ("127.0.0.1",), range(1))
        port = self._link.listen([MEMBERS])[MEMBERS]
        return [self._link.public_key.hex(), port]

    def start(self, key: str, clients: int, fraction: float, is_measured: bool) -> list[str]:
        """Meet the members' process; the hash of the job that they greet with."""
        self._link.open(GROUP, {MEMBERS: End(bytes.fromhex(key), "127.0.0.1", 0)})
        _job.CLIENTS_MAX = max(_job.CLIENTS_MAX, clients)  # type: ignore[misc] # of a file; this is none
        if not is_measured:
            _server.Residual = Unmeasured  # type: ignore[assignment,misc]
        names = tuple(_job.Client(f"client{i}", "rows") for i in range(clients))
        job = _job.Job(
            method="fedavg",
            clients=names,
            server="server",
            rounds=1000,
            fraction=fraction,
            r=R,
            target_modules=TARGETS,
            eval_every=0,
        )
        settings = _job.to_table(job)
        self._folder = tempfile.TemporaryDirectory()
        loads = {entry.name: entry.load for entry in personal_lora.edged_aggregators({})}
        spec = TrainingSpec(
            *("job", settings, (), clients, "", str(Path(self._folder.name)), clients, "model", MODEL),
            threads=2,
            aggregators=loads,
        )
        self._trainer = _server.Server(spec, Blocks(), Shared(self._link, clients, clients + 1))
        return [_rank.job_sha256(spec.settings), MODEL]

    def greet(self) -> None:
        self._trainer._shake_hands()

    def round(self, number: int) -> list[float]:
        """Seconds of a round, wall and processor; bytes of the most memory so far; what was refused."""
        told: dict[str, float] = {}
        began, before = time.perf_counter(), time.process_time()
        self._trainer.round(number, lambda kind, at, values: told.update(values))
        spent = [time.perf_counter() - began, time.process_time() - before]
        if "refused" in told:
            raise RuntimeError(f"expected every update to count; {told['refused']:g} did not")
        return [*spent, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]

    def held(self) -> int:
        """Bytes of the most memory so far."""
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def end(self) -> None:
        self._link.close()
        self._folder.cleanup()


class Members:
    """Rank 0 of the link; it dials, and plays all members: each sends the same bytes."""

    def start(self, key: str, port: int) -> str:
        self._link = ZmqChannel(MEMBERS, 2, ("127.0.0.1",), range(1))
        self._end = End(bytes.fromhex(key), "127.0.0.1", port)
        shapes = list(Blocks().linears(TARGETS).values())
        count = _messages.values_of("AB", R, shapes)
        self._values = np.random.default_rng(0).standard_normal(count, np.float32).tobytes()
        self._up = _messages.up(0, WEIGHT, count, 0)
        figures = dict.fromkeys(_messages.FIGURES, 1.0)
        self._told = np.array(list(figures.values()), "<f8").tobytes()
        return self._link.public_key.hex()

    def open(self) -> None:
        self._link.open(GROUP, {SERVER: self._end})

    def greet(self, clients: int, job: str, model: str) -> None:
        self._clients = clients
        for _ in range(clients):
            self._link.receive(SERVER, PATIENCE_S)
        for rank in range(clients):
            self._link.send(SERVER, {**_messages.hello(job, model), OTHER: rank})

    def round(self, number: int) -> int:
        """Take all downloads, then send the updates of those that train; how many those are."""
        drawn = []
        for _ in range(self._clients):
            header, _ = self._link.receive(SERVER, PATIENCE_S)
            if not header.get("rests"):
                drawn.append(header[OTHER])
        for rank in drawn:
            self._link.send(SERVER, {**self._up, "at": [number], OTHER: rank}, [self._values])
            self._link.send(SERVER, {"k": "told", "at": [number], OTHER: rank}, [self._told])
        return len(drawn)

    def end(self) -> None:
        self._link.close()


if __name__ == "__main__":
    serve({"server": Server, "members": Members}[sys.argv[1]]())
