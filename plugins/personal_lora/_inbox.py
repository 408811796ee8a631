"""What one member says of a round, or of a push: message by message up to the last, and within bounds.

What is wrong in it is known when it is whole, so that it costs this member this update and no other message
is taken for a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edged import ProtocolError

from .._training.link import Gathered, Link

MESSAGES_MOST = 1000  # of an update: values travel in pieces
HEARD_MOST = 2 * MESSAGES_MOST  # of one that is heard to its end and not kept
DRAINED_MOST = 16  # likewise, in times of the most bytes


def is_stale(header: Mapping[str, Any], number: int) -> bool:
    """Is it of an earlier round?"""
    at = header.get("at")
    return isinstance(at, list) and bool(at) and type(at[0]) is int and at[0] < number


class Inbox:
    """`most`: bytes that are kept of what `name` says. `ends`: the kinds of a last message.

    `number`: the round; what is of an earlier one is left out, and `tell_stale` hears of each update of such.
    None: of any. `last`: the header of the last message, when it came.
    """

    def __init__(
        self,
        link: Link,
        name: str,
        most: int,
        ends: tuple[str, ...] = ("told",),
        number: int | None = None,
        tell_stale: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.number = number
        self.last: Mapping[str, Any] = {}
        self._link, self._name, self._most, self._ends, self._tell_stale = link, name, most, ends, tell_stale
        self._messages: list[tuple[dict[str, Any], list[memoryview]]] = []
        self._heard, self._size, self._fault = 0, 0, ""

    def hear(self) -> bool:
        """Take the next message; is it the last? ProtocolError where there will be none."""
        if self._heard >= HEARD_MOST or self._size >= DRAINED_MOST * self._most:
            raise ProtocolError(f"{self._too_much}, and no end")
        self._heard += 1
        try:
            header, frames = self._link.next()
        except ProtocolError as error:
            self._spoil(str(error))
            return False
        self._size += sum(frame.nbytes for frame in frames)
        if self._size > self._most or self._heard > MESSAGES_MOST:
            self._spoil(self._too_much)
        if self.number is not None and is_stale(header, self.number):
            if header.get("k") == "up" and len(header["at"]) == 1:
                self._tell_stale(header["at"][0])
            return False
        if not self._fault:
            self._messages.append((header, frames))
        if header.get("k") in self._ends:
            self.last = header
        return bool(self.last)

    def all(self) -> Gathered:
        """What came. ProtocolError where it was too much, or not all of it was messages."""
        if self._fault:
            raise ProtocolError(self._fault)
        return Gathered(self._link, self._messages)

    @property
    def _too_much(self) -> str:
        return f"expected an update of at most {self._most} bytes of {self._name}; more came"

    def _spoil(self, fault: str) -> None:
        self._fault = self._fault or fault
        self._messages.clear()
