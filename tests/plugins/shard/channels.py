"""An in-memory Channel, and a group of engines on threads that speak over it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
from edged_plugins.shard._engine import ShardEngine, load

from edged import EngineSpec, PeerError


class MemoryChannel:
    """One rank's end. Headers go through msgpack and frames are copied, as on a real wire."""

    def __init__(self, rank: int, queues: dict[tuple[int, int], queue.Queue[Any]], size: int) -> None:
        self.rank, self.size, self.bytes_sent = rank, size, 0
        self._queues = queues
        self._waiting: dict[int, Any] = {}

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        copies = [bytes(memoryview(f).cast("B")) for f in frames]
        self.bytes_sent += sum(map(len, copies))
        self._queues[self.rank, to].put((msgpack.packb(header), copies))

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        if not self.poll(source, timeout_s):
            raise PeerError(f"nothing came from rank {source}")
        header, frames = self._waiting.pop(source)
        return msgpack.unpackb(header), [memoryview(f) for f in frames]

    def poll(self, source: int, timeout_s: float) -> bool:
        if source not in self._waiting:
            try:
                self._waiting[source] = self._queues[source, self.rank].get(timeout=max(timeout_s, 1e-4))
            except queue.Empty:
                return False
        return True


def connect(size: int) -> list[MemoryChannel]:
    queues = {(a, b): queue.Queue() for a in range(size) for b in range(size) if a != b}
    return [MemoryChannel(rank, queues, size) for rank in range(size)]


@contextlib.contextmanager
def running(specs: Sequence[EngineSpec]) -> Iterator[list[ShardEngine]]:
    """Engines of a plan, rank 0 for the caller to drive, the others following on threads."""
    channels = connect(len(specs))
    engines = [load(spec, channel) for spec, channel in zip(specs, channels, strict=True)]
    ended, errors = threading.Event(), []

    def follow(engine: ShardEngine) -> None:
        try:
            while not ended.is_set():
                engine.follow(0.05)
        except Exception as exc:  # reported to the test below
            errors.append(exc)

    threads = [threading.Thread(target=follow, args=(e,), daemon=True) for e in engines[1:]]
    for thread in threads:
        thread.start()
    try:
        yield engines
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
        for engine in engines:
            engine.close()
    assert not errors, errors
