"""One of two ranks that exchange frames in a bare loop: `_runner_exchange.py RANK KIND`, pinned to its core.

KIND is a channel's way: `zmq`, `tls` or `tls spinning`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
from _peer import serve

from edged.certificate import new_credential
from edged.channel import End, ZmqChannel
from edged.streams import Streams

GROUP = "bench"
TIMEOUT_S = 30.0
F32_BYTES = 4


class Rank:
    """Rank 0 listens, rank 1 dials."""

    def __init__(self, rank: int, kind: str) -> None:
        os.sched_setaffinity(0, {rank % len(os.sched_getaffinity(0))})
        streams = None if kind == "zmq" else Streams(new_credential(GROUP, rank))
        self._rank, self._other = rank, 1 - rank
        self._spins = kind.endswith("spinning")
        self._channel = ZmqChannel(rank, 2, ("127.0.0.1",), range(1), streams)

    def listen(self) -> list[Any]:
        """This end as the other one dials it."""
        ports = self._channel.listen([self._other] if self._rank == 0 else [])
        port, stream_port = (taken.get(self._other, 0) for taken in (ports, self._channel.stream_ports))
        return [self._channel.public_key.hex(), port, self._channel.certificate.hex(), stream_port]

    def open(self, key: str, port: int, certificate: str, stream_port: int) -> None:
        end = End(bytes.fromhex(key), "127.0.0.1", port, bytes.fromhex(certificate), stream_port)
        self._channel.open(GROUP, {self._other: end})
        self._channel.spin(self._spins)

    def exchange(self, size: int, count: int) -> list[float]:
        """Microseconds of each of `count` exchanges of `size` bytes of float32, the sum included."""
        mine = np.ones(size // F32_BYTES, np.float32)
        total = np.zeros_like(mine)
        spent = []
        for _ in range(count):
            started = time.perf_counter()
            (frame,) = self._channel.exchange([self._other], mine, TIMEOUT_S)
            np.add(mine, np.frombuffer(frame, np.float32), out=total)
            spent.append((time.perf_counter() - started) * 1e6)
        assert total[0] == 2
        return spent


if __name__ == "__main__":
    serve(Rank(int(sys.argv[1]), sys.argv[2]))
