"""Rounds that do not wait for everybody (`mode = "semi-synchronous"`): both ends' part of them.

A round asks the members that can be asked, waits for them as long as earlier rounds say (`_rounds.cohort`),
and closes with those whose updates came. Who left, or came too late, costs its own update and nothing else.
A late one is heard to its end in a later round and refused; until then its member is not asked again, since
it would fall behind for good. The updates are added in the order of ranks, whenever they came.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edged import DeviceState, EngineError, Member, NodeView, PeerError, ProtocolError

from .._rounds.cohort import Choice, Entrant, Rules, Waiting, choose, unable
from .._training.link import Peeking
from ._cohort import need_of, wanted_of
from ._inbox import Inbox
from ._job import Job

POLL_S = 0.05  # on one member's link, while others may come meanwhile
ALIVE_S = 5.0  # between two signs of life of a server that waits
LAST_TIMES = 2.0  # the end waits so many deadlines: of what a member loads then it keeps something
REASON_CHARS = 33  # of a figure's name, which says why a member was left out
AT_ONCE = 64  # messages of one member between two looks at the others and at the clock
ENDS = ("told", "cannot")  # of what a member says in a round
LATE = "its update came too late"
LEFT = "it left in mid round"
REFUSED = "its update was refused"
Report = Callable[[str, int, Mapping[str, float]], None]


def key_of(rank: int, reason: str) -> str:
    """A figure's name that says why a rank was left out: words of a reason, as far as there is room."""
    short = "_".join(re.findall(r"[a-z0-9]+", reason.lower()))
    if len(short) > REASON_CHARS:
        short = short[: REASON_CHARS + 1].rpartition("_")[0]
    return f"out_{rank}_{short or 'it_says_not_why'}"


class Rounds:
    """The server's side. `server`: the trainer, whose links, figures and refusals it uses."""

    def __init__(self, server: Any, clock: Callable[[], float] = time.monotonic) -> None:
        job: Job = server.job
        self._server, self._job, self.clock = server, job, clock
        self._waiting = Waiting(job.wait_least_s, job.wait_most_s, job.wait_spread, job.quorum)
        self._offsets: dict[int, dict[int, float]] = {}  # by round and rank: seconds until an update came
        self._owes: dict[int, Inbox] = {}  # asked in an earlier round, and not heard to the end
        self._began: dict[int, float] = {}  # of the rounds that somebody owes an update of
        self.left: dict[int, str] = {}  # ranks that have no part any more; written by another thread
        self.left_out: dict[int, str] = {}  # of this round, and why
        self.arrived: dict[int, Inbox] = {}
        self._sit_out: set[int] = set()  # who said of this round that it cannot

    # --- whom a round asks --------------------------------------------------------------------------

    def cohort(self, number: int, report: Report) -> set[int]:
        """The ranks that a round asks: those drawn of all that can be asked. EngineError (quorum) where they
        stay too few."""
        began = said = self.clock()
        while True:
            self._drain()
            choice = self._choice(number)
            if len(choice.chosen) >= need_of(self._job):
                break
            self.left_out = {rank: self._reason(rank, why) for rank, why in choice.left_out.items()}
            if not self._owes or self.clock() - began >= self._job.wait_most_s:
                raise self._too_few(number, len(choice.chosen), "can be asked")
            self._server.look()
            self._server.channel.poll(next(iter(self._owes)), POLL_S)
            said = self._tell_alive(said, number, report)
        self.left_out = {rank: self._reason(rank, why) for rank, why in choice.left_out.items()}
        self._began[number] = self.clock()
        return set(choice.chosen)

    def _choice(self, number: int) -> Choice:
        clients = self._job.clients
        entrants = [
            Entrant(rank, NodeView(str(rank), clients[rank].node, online=self._is_free(rank)))
            for rank in range(len(clients))
        ]
        return choose(entrants, number, self._job.seed, self._job.fraction, Rules())

    def _is_free(self, rank: int) -> bool:
        return rank not in self.left and rank not in self._owes and self._takes(rank)

    def _takes(self, rank: int) -> bool:
        """Would its link take a message at once? A channel that cannot say is one whose links always do."""
        takes: Callable[[int], bool] = getattr(self._server.channel, "takes", lambda rank: True)
        return takes(rank)

    def _reason(self, rank: int, said: str) -> str:
        if rank in self.left:
            return "it is away"
        if rank in self._owes:
            return f"it still trains round {self._owes[rank].number}"
        return said

    def send(self, rank: int, send: Callable[[], int]) -> int | None:
        """The bytes of a member's download; None where it cannot be reached, which costs it its part."""
        if not self._takes(rank):
            self.left_out[rank] = LEFT
            return None
        try:
            return send()
        except PeerError as error:
            self.left.setdefault(rank, str(error))
            self.left_out[rank] = LEFT
            return None

    # --- how long it waits --------------------------------------------------------------------------

    def wait(self, number: int, cohort: Sequence[Member], report: Report) -> list[Member]:
        """Those of the cohort whose updates came in time, which `arrived` has. EngineError (quorum): at the
        ceiling, so that an epoch in which devices cannot train is not followed at once by the next."""
        pending = self._pending(number, cohort)
        history = [list(offsets.values()) for offsets in self._offsets.values()]
        deadline_s = self._waiting.deadline_s(history)
        self._offsets[number] = {}
        began = said = self._began[number]
        while True:
            self._hear(number, pending, began)
            arrived, elapsed = len(self.arrived), self.clock() - began
            if not pending and arrived >= need_of(self._job):
                break
            verdict = self._waiting.verdict(arrived, wanted_of(self._job), elapsed, deadline_s)
            if not pending and not self._sit_out:  # who left does not come back in this epoch
                verdict = "fail"
            if verdict == "fail":
                raise self._too_few(number, arrived, "sent an update")
            if verdict == "close":
                break
            said = self._pause(number, next(iter(pending), cohort[0].rank), said, report)
        for rank, inbox in pending.items():
            self.left_out[rank] = LATE
            self._owes[rank] = inbox
            self._offsets[number][rank] = math.inf
        self._forget_rounds()
        return [member for member in cohort if member.rank in self.arrived]

    def last(self, number: int, members: Sequence[Member], report: Report) -> list[int]:
        """The ranks that answered what the last round made; the others are not waited for any longer."""
        pending = self._pending(number, members)
        began = said = self.clock()
        history = [list(offsets.values()) for offsets in self._offsets.values()]
        limit_s = LAST_TIMES * self._waiting.deadline_s(history)
        self._offsets[number] = {}
        while pending and self.clock() - began < limit_s:
            self._hear(number, pending, began)
            if pending:
                said = self._pause(number, next(iter(pending)), said, report)
        return sorted(self.arrived)

    def _pending(self, number: int, members: Sequence[Member]) -> dict[int, Inbox]:
        self.arrived, self._sit_out = {}, set()
        return {
            member.rank: self._server.inbox(number, member.rank, ENDS)
            for member in members
            if member.rank not in self.left and member.rank not in self.left_out
        }

    def _hear(self, number: int, pending: dict[int, Inbox], began: float) -> None:
        """Take what is there, and strike out who came, cannot, or left."""
        for rank, inbox in list(pending.items()):
            if rank in self.left:  # what came before it left counts no more: the order of both is chance
                self.left_out[rank] = LEFT
            elif not self._is_heard(rank, inbox):
                if rank not in self.left:
                    continue
                self.left_out[rank] = LEFT
            elif inbox.last["k"] == "cannot":
                self.left_out[rank] = str(inbox.last.get("because"))[:100]
                self._sit_out.add(rank)
            else:
                self.arrived[rank] = inbox
                self._offsets[number][rank] = self.clock() - began
            del pending[rank]

    def _is_heard(self, rank: int, inbox: Inbox) -> bool:
        """To its end, by what is there now? Who has no end has left."""
        try:
            for _ in range(AT_ONCE):
                if not self._server.channel.poll(rank, 0.0):
                    return False
                if inbox.hear():
                    return True
        except ProtocolError as error:
            self.left.setdefault(rank, str(error))
        return False

    def _pause(self, number: int, rank: int, said: float, report: Report) -> float:
        self._server.look()
        self._server.channel.poll(rank, POLL_S)
        return self._tell_alive(said, number, report)

    def _tell_alive(self, said: float, number: int, report: Report) -> float:
        now = self.clock()
        if now - said < ALIVE_S:
            return said
        report("alive", number, {})
        return now

    def _drain(self) -> None:
        """Hear late updates to their end, and refuse them."""
        for rank, inbox in list(self._owes.items()):
            if rank in self.left:
                del self._owes[rank]
            elif self._is_heard(rank, inbox):
                del self._owes[rank]
                number = inbox.number
                if number in self._offsets:
                    self._offsets[number][rank] = self.clock() - self._began[number]
                late = ProtocolError(f"expected an update of round {number} while it was open; it is stale")
                self._server.refuse(number, rank, late)

    def _forget_rounds(self) -> None:
        """What no deadline looks at any more."""
        for number in sorted(self._offsets)[: -self._waiting.rounds]:
            del self._offsets[number]
        owed = {inbox.number for inbox in self._owes.values()}
        self._began = {n: at for n, at in self._began.items() if n in self._offsets or n in owed}

    def _too_few(self, number: int, count: int, what: str) -> EngineError:
        why = "; ".join(f"{self._server.name(rank)}: {said}" for rank, said in sorted(self.left_out.items()))
        return EngineError(
            f"round {number}: expected {need_of(self._job)} members; {count} {what}"
            + (f" ({why[:500]})" if why else ""),
            remedy="bring them back, or lower `quorum`, or raise `wait_most_s`",
            code="quorum",
        )

    def figures(self, told: Mapping[int, Any]) -> dict[str, float]:
        """Of the report of a round: who was left out, and why."""
        out = dict(self.left_out)
        out |= {rank: REFUSED for rank in self.arrived if rank not in told}
        return {key_of(rank, reason): 1.0 for rank, reason in sorted(out.items()) if rank not in told}


# --- the member's side ------------------------------------------------------------------------------


def asked(link: Peeking, step: int, rounds: int) -> Iterator[int]:
    """The rounds from `step` on that a member is asked in, until the end comes. ProtocolError where a
    download is of none of these."""
    least = step
    while True:
        at = link.peek().get("at")
        number = at[0] if isinstance(at, list) and len(at) == 1 else None
        if type(number) is not int or not least <= number <= rounds:
            raise ProtocolError(f"expected a round from {least} to {rounds}, got {str(at)[:40]}")
        if number == rounds:
            return
        yield number
        least = number + 1


class OwnDevice:
    """What a member knows of its own device, and whether that can train now."""

    def __init__(self, rules: Rules, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules, self._clock = rules, clock
        self._state = DeviceState()
        self._used_at: float | None = None  # when it was last seen in use

    def hear(self, state: DeviceState) -> None:
        """A new reading, on any thread."""
        if state.in_use:
            self._used_at = self._clock()
        self._state = state

    def cannot(self) -> str:
        """Why it cannot train now, or ""."""
        idle_s = None if self._used_at is None else self._clock() - self._used_at
        return unable(Entrant(0, NodeView("", "", device=self._state), idle_s), self._rules)
