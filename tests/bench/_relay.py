"""A switch between network namespaces that delays every frame: a link with a round-trip time.

`_relay.py TAP...` opens one TAP device for each node in the namespace it runs in, says `ready`, and passes
Ethernet frames on between them, each `delay_ms` after it came, at most `mbit` a second into each device.
Both start as nothing and are set by lines on standard input: `delay_ms mbit`. Ends at its end of file.
The devices may be moved into other namespaces; they stay connected to this process.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time
from collections.abc import Sequence

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
PR_SET_TIMERSLACK = 29  # prctl(2): by default a timer may be 50 microseconds late
FRAME_MAX = 65_536
QUEUE_MAX = 8192  # frames on their way, as a real link holds no more than its buffers
BURST = 64  # frames read from one device before the others have their turn


class Relay:
    """The switch: which device an address was seen at, and the frames on their way by due time."""

    def __init__(self, names: Sequence[str]) -> None:
        self._taps = [_open(name) for name in names]
        self._seen: dict[bytes, int] = {}  # hardware address -> descriptor; as many as devices
        self._due: list[tuple[float, int, int, bytes]] = []
        self._free_at = dict.fromkeys(self._taps, 0.0)
        self._count = 0
        self._delay_s = self._seconds_a_byte = 0.0

    def run(self) -> None:
        settings = sys.stdin.fileno()
        while True:
            wait = max(0.0, self._due[0][0] - time.perf_counter()) if self._due else None
            ready, _, _ = select.select([*self._taps, settings], [], [], wait)
            if settings in ready and not self._set():
                return
            for tap in ready:
                if tap != settings:
                    self._take(tap)
            self._deliver()

    def _set(self) -> bool:
        line = os.read(sys.stdin.fileno(), 256)
        if not line:
            return False
        delay_ms, mbit = map(float, line.split()[-2:])
        self._delay_s, self._seconds_a_byte = delay_ms / 1000, 8 / (mbit * 1e6) if mbit else 0.0
        return True

    def _take(self, tap: int) -> None:
        """Frames that a node has sent, each put on its way to the one or all others."""
        for _ in range(BURST):
            try:
                frame = os.read(tap, FRAME_MAX)
            except BlockingIOError:
                return
            now = time.perf_counter()
            self._seen[frame[6:12]] = tap
            to = self._seen.get(frame[:6])
            for other in self._taps if to is None else (to,):
                if other != tap and len(self._due) < QUEUE_MAX:
                    begin = max(now, self._free_at[other])
                    self._free_at[other] = begin + len(frame) * self._seconds_a_byte
                    self._count += 1
                    due = self._free_at[other] + self._delay_s
                    heapq.heappush(self._due, (due, self._count, other, frame))

    def _deliver(self) -> None:
        now = time.perf_counter()
        while self._due and self._due[0][0] <= now:
            _, _, tap, frame = heapq.heappop(self._due)
            try:
                os.write(tap, frame)
            except OSError:  # the device is down or full: a link loses frames then
                continue


def _open(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    relay = Relay(sys.argv[1:])
    print("ready", flush=True)
    relay.run()
