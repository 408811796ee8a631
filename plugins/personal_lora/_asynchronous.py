"""A server that waits for nobody, and members that push to it: the round loop of asynchronous methods.

A member loads a revision, trains, sends what that added, and gets the newest revision at once. A step of the
job is a revision. Who trains when is not repeated by a job that goes on: its state is, bit for bit, and the
fence lets no push count twice. Members keep nothing: the server says which of their rows are next.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edged import ConfigError, EdgedError, EngineError, PolicyViolation, ProtocolError, Update
from edged import Member as Sender

from .._rounds.asynchronous import REPLAY, local_steps
from .._training.link import Link, Peeking, Stopped
from . import _messages, _mode
from ._inbox import Inbox
from ._member import Member
from ._mode import STEPS_MOST
from ._rank import Report, own_words
from ._residual import Residual
from ._server import DIFFERS, Server

log = logging.getLogger(__name__)
NAP_S = 0.02  # of a server to which nobody has said anything: short against local steps
REFUSED_MOST = 16  # pushes of each member, without one that counts: then no revision will ever be
TURNS_MOST = 1 << 40


class PushedServer(Server):
    """`Server` whose rounds end with a revision, whoever made it."""

    def build(self) -> None:
        super().build()
        self._ranks = itertools.cycle(range(self.server))
        self._came: dict[int, Inbox] = {rank: self._inbox(rank) for rank in range(self.server)}
        self._steps_done = np.zeros(self.server, np.int64)  # by rank, of pushes that counted
        self._steps: dict[int, int] = {}  # that are on their way
        self._given: dict[int, float] = {}  # when
        self._speeds: dict[int, float] = {}  # steps a second, with what travels
        self._evals: dict[int, tuple[int, dict[str, float]]] = {}  # the newest of each, and its revision
        self._evals_told = -1
        self._in_vain: Counter[int] = Counter()  # refused since the last push that counted, by rank
        self._unheard: set[int] = set()  # ranks of which too many were
        self._down: Counter[int] = Counter()  # bytes, by rank, since the last revision

    # --- a revision ---------------------------------------------------------------------------------

    def round(self, number: int, report: Report) -> None:
        """Take pushes until there is revision `number` + 1."""
        began = time.monotonic()
        told: list[tuple[int, int, dict[str, float]]] = []  # rank, staleness, figures
        if not self._given:
            for member in self.members:
                if member.rank not in self._unheard:
                    self._give(member)
        with Residual() as meter:
            while self.aggregator.revision == number:
                rank = self._next()
                if rank is None:
                    continue
                pushed = self._take(rank, meter, report)
                if pushed is not None:
                    told.append((rank, number - pushed[0], pushed[1]))
            with self.computing():
                self._packing.forget()
                residual = meter.of([(m, self.aggregator.download(m)) for m in self.members[:1]])
        self.count_computed(meter.compute_s)
        if self.aggregator.revision < self.job.rounds:
            self._give(self.members[told[-1][0]])
        report("step", number, self._figures(number, told, residual) | {"seconds": time.monotonic() - began})
        self._down.clear()

    def _figures(
        self, number: int, told: list[tuple[int, int, dict[str, float]]], residual: float
    ) -> dict[str, float]:
        """Of a revision: sums and means over the pushes in it."""
        targets = sum(figures["targets"] for _, _, figures in told)
        values = {
            "loss": sum(figures["loss"] for _, _, figures in told) / max(1.0, targets),
            "targets": targets,
            "tokens": sum(figures["tokens"] for _, _, figures in told),
            "staleness": sum(staleness for _, staleness, _ in told) / len(told),
        }
        if math.isfinite(residual):
            values["residual"] = residual
        values |= {f"down_{rank}": float(self._down[rank]) for rank in range(self.server)}
        for rank, _, figures in told:
            values[f"up_{rank}"] = values.get(f"up_{rank}", 0.0) + figures["sent"]
        if self._refused:
            values["refused"] = float(sum(self._refused.values()))
        if not math.isfinite(values["loss"]):
            raise EngineError(f"revision {number}: expected finite losses of its members", code="nan-loss")
        return values

    def _next(self) -> int | None:
        """A rank all of whose push or evaluation is here. One message of each at a time is heard, so that a
        member with a slow link is not waited for; None after a short sleep where there was none."""
        self.look()
        heard = False
        for _ in range(self.server):
            rank = next(self._ranks)
            if rank not in self._unheard and self.channel.poll(rank, 0.0):
                heard = True
                try:
                    if self._came[rank].hear():
                        return rank
                except ProtocolError as error:  # it has no end
                    self._ignore(rank, error)
        if not heard:
            self.channel.poll(next(rank for rank in self._ranks if rank not in self._unheard), NAP_S)
        return None

    def _take(self, rank: int, meter: Residual, report: Report) -> tuple[int, dict[str, float]] | None:
        """A push that counted: the revision that it began at, and its figures. None where it was refused, or
        was an evaluation. Its member has got the newest then, but where this made a revision."""
        number, member, is_push = self.aggregator.revision, self.members[rank], True
        try:
            inbox, self._came[rank] = self._came[rank], self._inbox(rank)
            link = inbox.all()
            is_push, began = link.first["k"] != "told", revision_of(link.first.get("at"), self.name(rank))
            if not is_push:
                if began > number:
                    raise ProtocolError(f"expected losses up to revision {number}; those of {began} came")
                self._evaluated(began, rank, self._told(link, began), report)
                return None
            update, figures = self._read(link, began, member)
            with self.computing():
                counted = self.aggregator.counted(update) if self.job.method == _mode.FEDBUFF else None
                self.aggregator.add(update)
                if counted is not None:
                    meter.add(counted)
        except (ConfigError, PolicyViolation, ProtocolError) as error:
            is_heard = self._refuse_of(rank, error)
            if is_push and is_heard and error.code != REPLAY:  # its member waits for the answer to another
                self._give(member)
            return None
        self._in_vain[rank] = 0
        self._pace(rank)
        if self.aggregator.revision == number:
            self._give(member)
        return began, figures

    def _refuse_of(self, rank: int, error: EdgedError) -> bool:
        """Count it; is the member heard any longer? PolicyViolation where nobody is."""
        self.refuse(self.aggregator.revision, rank, error)
        self._in_vain[rank] += 1
        if self._in_vain[rank] <= REFUSED_MOST:
            return True
        self._ignore(rank, error)
        return False

    def _ignore(self, rank: int, error: EdgedError) -> None:
        """Hear nothing more of a member. PolicyViolation where nobody else is left."""
        log.warning(
            "member not heard any more", extra={"member": self.name(rank), "reason": str(error)[:300]}
        )
        self._unheard.add(rank)
        if len(self._unheard) == self.server:
            raise PolicyViolation(
                f"expected pushes that count; of every member the last {REFUSED_MOST} were refused",
                remedy="look at the log of the server's node, which names them",
            ) from error

    def goes_on_without(self, other: int, error: EdgedError) -> bool:
        """A member that trains another model is not heard."""
        if error.code not in DIFFERS:
            return False
        if len(self._unheard) + 1 == self.server:
            return False  # nobody is left
        self._foreign[other] = ProtocolError(str(error))
        self.refuse(0, other, error)
        self._ignore(other, error)
        return True

    def hears(self, rank: int) -> bool:
        return rank not in self._unheard

    def _inbox(self, rank: int) -> Inbox:
        """For a push or an evaluation of any revision."""
        return Inbox(self.link(rank), self.name(rank), self._most)

    def _read(self, link: Link, began: int, member: Sender) -> tuple[Update, dict[str, float]]:
        """ProtocolError where it is no push."""
        name = self.name(member.rank)
        count = _messages.values_of("AB", member.r, self.shapes)

        def count_of(header: Mapping[str, Any]) -> int:
            if type(header.get("of")) is not int or header["of"] != count:
                raise ProtocolError(f"expected {count} values of {name}'s adapter; {header.get('of')} came")
            return count

        header, values = link.receive_values("up", [began], count_of, name)
        turn = header.get("turn")
        if type(turn) is not int or not 0 <= turn <= TURNS_MOST:
            raise ProtocolError(f"expected the turn of {name}'s push; {str(turn)[:20]} came")
        weight = self.job.clients[member.rank].weight or header.get("weight")
        if type(weight) is not int or weight < 1:
            raise ProtocolError(f"expected a number of rows above 0 of {name}; {str(weight)[:20]} came")
        weight = self._weights.counted(weight, member.rank, name, began)
        given = self.unflat(values, "AB", member.r)
        factors = {layer: (pair["A"], pair["B"]) for layer, pair in given.items()}
        update = Update(member, began, float(weight), factors, {"turn": turn})
        return update, self._told(link, began)

    def _pace(self, rank: int) -> None:
        """What a counted push says of its member's speed: by our clock, which no member sets."""
        steps, since = self._steps.pop(rank), time.monotonic() - self._given[rank]
        self._steps_done[rank] += steps
        self._speeds[rank] = steps / max(since, 1e-6)

    def _give(self, member: Sender) -> None:
        """The newest revision, to begin the next turn at."""
        rank, revision, job = member.rank, self.aggregator.revision, self.job
        packed = self._packing.whole(self.aggregator.download(member), member.r)
        steps = job.local_steps
        if job.options["dynamic_steps"] and rank in self._speeds:
            steps = min(STEPS_MOST, local_steps(steps, self._speeds)[rank])
        words = _messages.down(revision, packed.start, "", 0, packed.values.size, 0)
        words |= _messages.turn_words(self.aggregator.turn(member), int(self._steps_done[rank]), steps)
        before = self.bytes_sent
        self.link(rank).send_values("down", [revision], own_words(words), packed.values)
        self._down[rank] += self.bytes_sent - before
        self._steps[rank], self._given[rank] = steps, time.monotonic()

    def _evaluated(self, began: int, rank: int, figures: dict[str, float], report: Report) -> None:
        """Tell the held-out loss of all members when each has told of this revision or a newer one."""
        self._evals[rank] = (began, figures)
        if len(self._evals.keys() | self._unheard) == self.server:
            oldest = min(revision for revision, _ in self._evals.values())
            if oldest > self._evals_told:
                self._evals_told = oldest
                self._tell_eval(oldest, {rank: told for rank, (_, told) in self._evals.items()}, report)

    # --- checkpoints --------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        return super().state() | {"steps_done": self._steps_done.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        super().set_state(state)
        self._steps_done = state["steps_done"].astype(np.int64).reshape(self.server)


class Cut(Exception):
    """The last revision is there: what this member trains now will not count."""


class PushingMember(Member):
    """`Member` that goes on with whatever is newest."""

    def build(self) -> None:
        super().build()
        self._evaluated_at, self._may_be_cut = -1, False

    def count(self) -> dict[str, Any]:
        return super().count() | {"keeps": False}

    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        try:
            self._shake_hands()
            link = self._links[self.server] = Peeking(self.link(self.server))
            while (revision := self._coming(link)) < self.job.rounds:
                self._turn(revision, link)
            self.finish(report)
        except Stopped:
            return

    def _coming(self, link: Peeking) -> int:
        """The revision of the next download. ProtocolError where it is none of this job's."""
        name = self.name(self.server)
        revision = revision_of(link.peek().get("at"), name)
        if revision > self.job.rounds:
            raise ProtocolError(f"expected up to {self.job.rounds} revisions of {name}; {revision} came")
        return revision

    def _turn(self, revision: int, link: Peeking) -> None:
        """Load, train, push."""
        turn, first, steps = _words_of(link.peek(), self.name(self.server))
        before = self.bytes_sent
        if self._load(revision) is None:
            raise ProtocolError(f"expected a revision from {self.name(self.server)}; a rest came")
        self._may_be_cut = True
        try:
            if self._is_newly_due(revision):
                with self.computing():
                    evaluated = self._evaluate()
                self._evaluated_at = revision
                self._tell(revision, [0.0, 0.0, 0.0, 0.0, *evaluated, 0.0, 0.0])
            with self.computing():
                trained = self._steps(f"turn {turn}", range(first, first + steps))
        except Cut:
            return
        finally:
            self._may_be_cut = False
        added = self.flat(self.model.factors(), "AB") - self.flat(self._loaded, "AB")
        words = _messages.up(revision, self.weight, added.size, 0) | {"turn": turn}
        self.link(self.server).send_values("up", [revision], own_words(words), added)
        self._tell(revision, [*trained, 0.0, 0.0, 0.0, float(self.bytes_sent - before)])

    def _is_newly_due(self, revision: int) -> bool:
        every, last = self.job.eval_every, self._evaluated_at
        if last < 0:
            return revision == 0 or bool(every)
        return bool(every) and revision // every > last // every

    def look(self) -> None:
        super().look()
        if self._may_be_cut and self._links[self.server].is_waiting:  # only a last revision comes unasked
            raise Cut


def revision_of(at: Any, name: str) -> int:
    if not isinstance(at, list) or not at or type(at[0]) is not int or not 0 <= at[0] <= TURNS_MOST:
        raise ProtocolError(f"expected a revision from {name}; {str(at)[:40]} came")
    return at[0]


def _words_of(header: Mapping[str, Any], name: str) -> tuple[int, int, int]:
    """Turn, number of its first local step, and how many."""
    turn, first, steps = (header.get(word) for word in ("turn", "first", "steps"))
    is_whole = all(type(word) is int for word in (turn, first, steps))
    if not (is_whole and 0 <= turn <= TURNS_MOST and 0 <= first <= TURNS_MOST and 1 <= steps <= STEPS_MOST):
        raise ProtocolError(
            f"expected turns up to {TURNS_MOST} and 1 to {STEPS_MOST} steps from {name}; "
            f"{str((turn, first, steps))[:60]} came"
        )
    return turn, first, steps
