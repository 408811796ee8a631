"""What travels between two ranks that train: small words, frames, and values in pieces.

Every message says its kind, step and place; one that is not the next of the schedule is a ProtocolError.
Waiting looks at `is_stopped` every half second, since a peer may take minutes for a batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edged import Channel, ProtocolError

from .sizes import pieces

LOOK_S = 0.5


class Stopped(Exception):
    """The worker was told to stop: the trainer returns, and the last checkpoint stands."""


class Link:
    """Our end of the way to rank `other`."""

    def __init__(self, channel: Channel, other: int, is_stopped: Callable[[], bool]) -> None:
        self.other, self._channel, self._is_stopped = other, channel, is_stopped

    def send(self, kind: str, place: Sequence[int], words: Mapping[str, Any], frames: Sequence[Any]) -> None:
        """`place`: step, micro-batch and the like, which the other end expects to be these."""
        self._channel.send(self.other, {"k": kind, "at": list(place), **words}, frames)

    def next(self) -> tuple[dict[str, Any], list[memoryview]]:
        """Whatever comes."""
        while not self._channel.poll(self.other, LOOK_S):
            if self._is_stopped():
                raise Stopped
        return self._channel.receive(self.other, LOOK_S)

    def receive(self, kind: str, place: Sequence[int]) -> tuple[dict[str, Any], list[memoryview]]:
        header, frames = self.next()
        if header.get("k") != kind or header.get("at") != list(place):
            got = f"{str(header.get('k'))[:16]} {str(header.get('at'))[:40]}"
            raise ProtocolError(f"expected {kind} {list(place)} of rank {self.other}, got {got}")
        return header, frames

    def send_values(
        self, kind: str, place: Sequence[int], words: Mapping[str, Any], values: np.ndarray
    ) -> None:
        """F32 values in messages of at most a piece each, the first with `words`, the others numbered."""
        joined = memoryview(np.ascontiguousarray(values, "<f4").reshape(-1)).cast("B")
        ends = list(itertools.accumulate(pieces(joined.nbytes), initial=0))
        for number, (first, last) in enumerate(itertools.pairwise(ends)):
            at = [*place, number] if number else place
            self.send(kind, at, {} if number else words, [joined[first:last]] if last > first else [])

    def receive_values(
        self,
        kind: str,
        place: Sequence[int],
        count_of: Callable[[Mapping[str, Any]], int],
        name: str,
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The words and values of `send_values`, `count_of` the words many, each of them finite.
        ProtocolError otherwise, with the other's name."""
        said, frames = self.receive(kind, place)
        count = count_of(said)
        values = np.empty(count, "<f4")
        joined, at = values.view(np.uint8), 0
        for number, size in enumerate(pieces(4 * count)):
            if number:
                _, frames = self.receive(kind, [*place, number])
            if [frame.nbytes for frame in frames] != ([size] if size else []):
                raise ProtocolError(
                    f"expected {kind} of {name} in frames of {size} bytes, for {count} values"
                )
            for frame in frames:  # one, or none of no values
                joined[at : at + size] = np.frombuffer(frame, np.uint8)
            at += size
        values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise ProtocolError(f"expected {kind} of {name} in finite values; some are not")
        return said, values


class Peeking(Link):
    """A link whose next message can be looked at before it is taken."""

    def __init__(self, link: Link) -> None:
        super().__init__(link._channel, link.other, link._is_stopped)
        self._first: deque[tuple[dict[str, Any], list[memoryview]]] = deque()

    def next(self) -> tuple[dict[str, Any], list[memoryview]]:
        return self._first.popleft() if self._first else super().next()

    def peek(self) -> dict[str, Any]:
        """The header of what comes next."""
        if not self._first:
            self._first.append(super().next())
        return self._first[0][0]

    @property
    def is_waiting(self) -> bool:
        """Is there something already?"""
        return bool(self._first) or self._channel.poll(self.other, 0.0)


class Gathered(Link):
    """Messages that came already, looked at as if they came now. `first`: the header of the first of them."""

    def __init__(self, link: Link, messages: Iterable[tuple[dict[str, Any], list[memoryview]]]) -> None:
        super().__init__(link._channel, link.other, link._is_stopped)
        self._messages = deque(messages)
        self.first = self._messages[0][0] if self._messages else {}

    def next(self) -> tuple[dict[str, Any], list[memoryview]]:
        if not self._messages:
            raise ProtocolError(f"expected more of rank {self.other}")
        return self._messages.popleft()
