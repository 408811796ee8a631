"""What a connection of a channel costs: measured by exchanges, in which both sides send and take at once."""

from __future__ import annotations

import dataclasses
import itertools
import time

from .types import Channel, LinkCost

SMALL_BYTES, SMALL_TIMES = 64, 9
LARGE_BYTES, LARGE_TIMES = 256 << 10, 6  # the first drains what a shaped link's bucket lets through at once
SLOW_S = 0.25  # an exchange that takes so long is no noise: two are enough
EXCHANGE_S = 60.0  # for one; 40 kbit/s pass
BURST_BYTES, BURST_TIMES = 16 << 10, 5  # more than a token's sum or hop has
PAUSE_S = 0.02  # in which a token bucket fills again, from 6.5 Mbit/s on


def measure_link(channel: Channel, other: int, wait_s: float) -> LinkCost:
    """Measure the connection to rank `other`, which does the same within `wait_s`.

    The least time of a few counts: what else the machine does may add to it, never take away.
    """
    channel.exchange([other], bytes(SMALL_BYTES), wait_s)
    small = _exchange_s(channel, other, SMALL_BYTES, SMALL_TIMES)
    large = _exchange_s(channel, other, LARGE_BYTES, LARGE_TIMES)
    return LinkCost(small, LARGE_BYTES / max(large - small, 1e-6))


def measure_burst(channel: Channel, other: int, link: LinkCost) -> LinkCost:
    """`link`, with what passes at once after a pause; rank `other` measures at the same time."""
    small = _exchange_s(channel, other, SMALL_BYTES, BURST_TIMES, PAUSE_S)  # waking up is in both
    burst = _exchange_s(channel, other, BURST_BYTES, BURST_TIMES, PAUSE_S)
    at_once = BURST_BYTES - SMALL_BYTES - (burst - small) * link.bytes_s
    return dataclasses.replace(link, burst_bytes=min(max(at_once, 0.0), BURST_BYTES))


def _exchange_s(channel: Channel, other: int, size: int, times: int, pause_s: float = 0.0) -> float:
    """Seconds of an exchange after a pause: the least mean of two in a row.

    One alone says little. A side that begins later by d waits for d less, and begins the next one earlier by
    d: on a link of latency L the times go L + d, L - d, L + d, ... A frame's first byte says that its sender
    found the one before slow: both ends read both, and stop with that exchange.
    """
    seen: list[float] = []
    is_slow = False
    for _ in range(times):
        frame = bytes([is_slow]) + bytes(size - 1)
        if pause_s:
            time.sleep(pause_s)  # as long as a rank computes between two sums, or longer
        begun = time.perf_counter()
        (answer,) = channel.exchange([other], frame, EXCHANGE_S)
        seen.append(time.perf_counter() - begun)
        if is_slow or answer[0]:
            break
        is_slow = seen[-1] > SLOW_S
    steady = seen[1:] if len(seen) > 2 else seen
    return min(sum(pair) / 2 for pair in itertools.pairwise(steady))
