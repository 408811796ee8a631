"""The TLS streams of one worker, and how frames move over several of them at once."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Mapping, Sequence

from .certificate import Credential
from .errors import PeerError
from .meeting import Meeting, StreamEnd
from .stream import Stream, context_for

# A peer that is computing its half of a layer is tens of microseconds away; waking up costs as much again.
SPIN_S = 200e-6
# Of a rank on this machine: as long as a layer takes. Two ranks that sleep in turns are one runnable thread
# at a time, and the kernel then leaves both on one core; only ranks that are runnable at once get two.
LOCAL_SPIN_S = 2e-3
WAIT_CAP = 8  # bounds, of one wait in the running mean, so that one bad one is forgotten after a few


class Streams:
    """`listen`, then `open`, then `move`. `spins`: whether a wait may burn the processor first.

    OSError where this system's `ssl` cannot be given a key that stays in memory.
    """

    def __init__(self, own: Credential) -> None:
        context_for(own, own.certificate, is_server=False)  # found out now, before a peer counts on a stream
        self.certificate = own.certificate
        self.spins = True
        self._meeting = Meeting(own)
        self._streams: dict[int, Stream] = {}

    @property
    def bytes_sent(self) -> int:
        """Everything handed to TCP: frames, their prefixes, TLS records and handshakes. On any thread."""
        return sum(stream.bytes_sent for stream in list(self._streams.values()))

    @property
    def sent(self) -> list[tuple[int, int]]:
        """The same by rank."""
        return [(rank, stream.bytes_sent) for rank, stream in list(self._streams.items())]

    def __contains__(self, rank: int) -> bool:
        return rank in self._streams

    def listen(self, ranks: Sequence[int], interfaces: Sequence[str], ports: range) -> dict[int, int]:
        """Listen for each rank that will dial; rank -> port. ConfigError when no port is free."""
        return self._meeting.listen(ranks, interfaces, ports)

    def open(self, ends: Mapping[int, StreamEnd]) -> set[int]:
        """Meet every rank of `ends` that can be met; those that were."""
        self._streams = self._meeting.meet(ends)
        return set(self._streams)

    def drop(self, rank: int) -> None:
        """Do without this rank's stream: the other side does."""
        self._streams.pop(rank).close()

    def close(self) -> None:
        self._meeting.close()
        for stream in self._streams.values():
            stream.close()

    # --- frames ---

    def move(
        self,
        sends: Iterable[tuple[int, memoryview]],
        takes: Iterable[tuple[int, int]],
        timeout_s: float,
    ) -> list[memoryview]:
        """Send a frame to each rank of `sends` and take one of the given size from each of `takes`, all
        at once; the frames taken, each valid until the next from its rank."""
        taken = []
        for rank, size in takes:
            stream = self._streams[rank]
            stream.expect(size)
            taken.append(stream)
        sending = []
        for rank, frame in sends:
            stream = self._streams[rank]
            if not stream.send(frame):
                sending.append(stream)
        taking = [stream for stream in taken if not stream.fill()]
        if sending or taking:
            self._wait(sending, taking, timeout_s)
        return [stream.frame for stream in taken]

    def _wait(self, sending: list[Stream], taking: list[Stream], timeout_s: float) -> None:
        """Until all are done: spin for a bounded time where the ranks are usually quick, then sleep.

        A rank whose waits are longer than the bound in the mean is slept for at once: spinning for it
        gains nothing, and takes the core from whoever it waits for when they share one.
        """
        begun, waited = time.perf_counter(), taking
        spin_s = LOCAL_SPIN_S if all(stream.is_local for stream in (*sending, *taking)) else SPIN_S
        is_quick = self.spins and all(stream.wait_s < spin_s for stream in taking)
        while is_quick and (sending or taking) and time.perf_counter() - begun < spin_s:
            os.sched_yield()
            sending, taking = _go_on(sending, taking)
        while sending or taking:
            left_s = begun + timeout_s - time.perf_counter()
            if left_s <= 0 or not _sleep(sending, taking, left_s):
                raise _silent(sending, taking, timeout_s)
            sending, taking = _go_on(sending, taking)
        wait_s = min(time.perf_counter() - begun, WAIT_CAP * spin_s)
        for stream in waited:
            stream.wait_s += (wait_s - stream.wait_s) / 4


def _go_on(sending: list[Stream], taking: list[Stream]) -> tuple[list[Stream], list[Stream]]:
    """Those that are not done after another try."""
    if sending:
        sending = [stream for stream in sending if not stream.flush()]
    return sending, [stream for stream in taking if not stream.fill()]


def _sleep(sending: list[Stream], taking: list[Stream], timeout_s: float) -> bool:
    """Until one of them can go on; False when none could."""
    wanted: dict[int, int] = {}
    for streams, event in ((sending, select.POLLOUT), (taking, select.POLLIN)):
        for stream in streams:
            wanted[stream.fileno()] = wanted.get(stream.fileno(), 0) | event
    poller = select.poll()
    for number, events in wanted.items():
        poller.register(number, events)
    return bool(poller.poll(max(1, round(timeout_s * 1000))))


def _silent(sending: list[Stream], taking: list[Stream], timeout_s: float) -> PeerError:
    if taking:
        rank = taking[0].rank
        return PeerError(f"rank {rank} sent nothing for {timeout_s:g} s", rank=rank)
    rank = sending[0].rank
    return PeerError(f"rank {rank} took no frame for {timeout_s:g} s", rank=rank)
