"""The server of a federated job: it sends each member what to start from, takes updates, and aggregates.

It measures what the aggregator made against what it was given (`_residual`), and never loads the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from edged import (
    ConfigError,
    Download,
    EdgedError,
    EngineError,
    Member,
    PeerError,
    PolicyViolation,
    ProtocolError,
    Update,
)

from .._training.link import Gathered, Link
from . import _messages, _seen
from ._client_noise import Account, Private
from ._cohort import cohort_of
from ._inbox import Inbox
from ._masked import MaskedServer, terms_of, unmasked
from ._packing import Packing
from ._rank import THIN_UP, Arrays, Rank, Report, own_words, resolve, write_adapter
from ._residual import Residual
from ._semi import Rounds
from ._weights import Weights
from ._whole import give, take

log = logging.getLogger(__name__)
UPDATE_SLACK = 1 << 20  # bytes of an update beside its values
DIFFERS = ("model-differs", "job-differs")  # of a handshake
VOID_MOST = 3  # rounds on end whose updates were too few for the method


class Server(Rank):
    def build(self) -> None:
        job = self.job
        self.members = [Member(rank, job.r_of(rank), job.scale_of(rank)) for rank in range(self.server)]
        self._start = self.start(job.r_most)
        self._packing = Packing(self._start, self.flat)
        self._account: Account | None = None  # of what noise on the sum of changes leaves to be learnt
        self.aggregator = self._aggregator()
        self._refused: Counter[int] = Counter()  # updates, by rank
        self._void = 0  # rounds on end with too few updates
        self._foreign: dict[int, ProtocolError] = {}  # members that train another model, by rank
        masked_most = _messages.weight_most(job) if job.masked else 0
        self._weights = Weights(job.weight_most, self.spec.weight_most, masked_most)
        self._most = UPDATE_SLACK + 3 * 8 * _messages.values_of("AB", job.r_most, self.shapes)
        self.semi = Rounds(self) if job.is_semi else None

    @property
    def neighbours(self) -> Sequence[int]:
        return [rank for rank in range(self.server) if self.semi is None or rank not in self.semi.left]

    def left(self, rank: int, reason: str) -> None:
        """A member has no part any more; on another thread, and before the first round, too."""
        if self.semi is not None and rank < self.server:
            self.semi.left.setdefault(rank, reason)

    def goes_on_without(self, other: int, error: EdgedError) -> bool:
        if self.semi is None:
            if error.code not in DIFFERS or self.job.masked:  # a masked sum is of all
                return False
            self._foreign[other] = ProtocolError(str(error))
            return True
        if not isinstance(error, PeerError):
            self.refuse(0, other, error)
        self.left(other, str(error))
        return True

    def hears(self, rank: int) -> bool:
        """Is anything of a member waited for?"""
        return rank not in self._foreign

    def is_over(self, other: int) -> bool:
        if self.semi is not None and other in self.semi.left:
            raise PeerError(f"{self.name(other)} left: {self.semi.left[other]}", rank=other)
        return super().is_over(other)

    def _aggregator(self) -> Any:
        """Of this node's own plugins, by the job's word."""
        dotted = self.spec.aggregators.get(self.job.method)
        if dotted is None:
            raise EngineError(
                f"no method {self.job.method!r} here; loaded: {', '.join(sorted(self.spec.aggregators))}",
                remedy="load the plugin that brings it",
            )
        made = resolve(dotted)(self.settings, self._start, self.members)
        if not self.job.client_clip:
            return made
        self._account = Account(self.job, self.spec.state_folder)
        return Private(made, self._start, self.job, self._account)

    def count(self) -> dict[str, Any]:
        spent = {"spent": self._account.spent()} if self._account else {}
        return {"shapes": [list(shape) for shape in self.shapes]} | spent

    # --- a round ------------------------------------------------------------------------------------

    def round(self, number: int, report: Report) -> None:
        began = time.monotonic()
        semi = self.semi
        ranks = set(cohort_of(self.job, number)) if semi is None else semi.cohort(number, report)
        for rank in ranks & self._foreign.keys():
            self.refuse(number, rank, self._foreign[rank])
        ranks -= self._foreign.keys()
        cohort = [member for member in self.members if member.rank in ranks]
        self.aggregator.begin(number, cohort)
        frozen = self.aggregator.frozen(number)
        values: dict[str, float] = {}
        for member in self.members:
            is_drawn = member.rank in ranks
            if semi is not None:
                part = partial(self._send, number, member, frozen)
                told_bytes = semi.send(member.rank, part) if is_drawn else None
                if told_bytes is not None:
                    values[f"down_{member.rank}"] = float(told_bytes)
                continue
            if member.rank in self._foreign:
                continue
            sent = self._send(number, member, frozen) if is_drawn else self._rest(number, member)
            values[f"down_{member.rank}"] = float(sent)
        self._packing.forget()
        if semi is not None:
            cohort = semi.wait(number, cohort, report)
        take = self._take_masked if self.job.masked else self._take
        with Residual() as meter:
            told = take(number, frozen, meter, cohort)
            with self.computing():
                is_void = self._is_void(number, told)
                loads = [] if is_void else [(m, self.aggregator.download(m)) for m in self.members]
                residual = math.nan if is_void else meter.of(loads)
        if semi is not None:
            values |= semi.figures(told)
        for rank, figures in told.items():
            values[f"up_{rank}"] = figures["sent"]
            values[f"down_{rank}"] += figures.get("said", 0.0)
        self.count_computed(meter.compute_s)
        if is_void:
            values["void"] = 1.0
        # there is none of sums of scalars, or where updates are masked; with noise it would tell of those
        if math.isfinite(residual) and not self.job.client_noise:
            values["residual"] = residual
        self._tell_eval(number, told, report)
        targets = sum(figures["targets"] for figures in told.values())
        values |= {
            "loss": sum(figures["loss"] for figures in told.values()) / max(1.0, targets),
            "targets": targets,
            "tokens": sum(figures["tokens"] for figures in told.values()),
            "seconds": time.monotonic() - began,
        } | _seen.of_round(told)
        if self._refused:
            values["refused"] = float(sum(self._refused.values()))
        if not math.isfinite(values["loss"]):
            raise EngineError(f"round {number}: expected finite losses of its members", code="nan-loss")
        report("step", number, values)

    def _is_void(self, number: int, told: Mapping[int, Any]) -> bool:
        """Make the next state; or, where too few updates came that can be used, stay with this one, and log
        it. PolicyViolation where none came, and where VOID_MOST rounds on end had too few."""
        try:
            self.aggregator.finish()
        except PolicyViolation as error:
            self._void += 1
            if not told or self._void >= VOID_MOST:
                raise
            log.warning("round void", extra={"round": number, "reason": str(error)[:300]})
            return True
        self._void = 0
        return False

    def _take(
        self, number: int, frozen: str, meter: Residual, cohort: Sequence[Member]
    ) -> dict[int, dict[str, float]]:
        """Add every update of the cohort; figures by rank."""
        told = {}
        for member in cohort:
            try:
                update, figures = self._receive(number, member, frozen)
                with self.computing():
                    self.aggregator.add(update)
                    if update.factors:
                        meter.add(update)
            except (ConfigError, PolicyViolation, ProtocolError) as error:
                self.refuse(number, member.rank, error)
                continue
            told[member.rank] = figures
        return told

    def _take_masked(
        self, number: int, frozen: str, meter: Residual, cohort: Sequence[Member]
    ) -> dict[int, dict[str, float]]:
        """Add the mean of all members' updates, of which nobody sees one; figures by rank."""
        download = self.aggregator.download(self.members[0])
        loaded = download.factors
        sides = "".join(side for side in "AB" if side != frozen) if loaded else ""
        terms = terms_of(self, number, sides, loaded, download.extras)
        masked = MaskedServer(self, number, terms, self._gather, self._told, self.refuse)
        mean, weight = masked.mean()
        with self.computing():
            factors, extras = unmasked(self, sides, loaded, mean.astype("<f4"))
            self.aggregator.add(Update(self.members[0], number, weight, factors, extras))
        return masked.told

    def _send(self, number: int, member: Member, frozen: str) -> int:
        """A member's download; bytes that it took."""
        download: Download = self.aggregator.download(member)
        packed = self._packing.whole(download, member.r)
        values, mask, extras = packed.values, packed.mask, download.extras
        words = _messages.down(
            number, packed.start, frozen, packed.stack, values.size, len(extras), int(mask is not None)
        )
        before = self.bytes_sent
        self.link(member.rank).send_values("down", [number], own_words(words), values)
        if mask is not None:
            self.send_mask(member.rank, number, mask)
        self.send_extras(member.rank, number, extras)
        return self.bytes_sent - before

    def _rest(self, number: int, member: Member) -> int:
        """The download of one that is not of the cohort; bytes that it took."""
        stack, values = self._packing.merged(self.aggregator.download(member))
        before, words = self.bytes_sent, _messages.rest(number, stack, values.size)
        self.link(member.rank).send_values("down", [number], own_words(words), values)
        return self.bytes_sent - before

    def refuse(self, number: int, rank: int, error: Exception) -> None:
        """An update that cannot be used costs itself: it is counted, and the round goes on."""
        self._refused[rank] += 1
        log.warning(
            "update refused",
            extra={"round": number, "member": self.name(rank), "reason": str(error)[:300]},
        )

    def inbox(self, number: int, rank: int, ends: tuple[str, ...]) -> Inbox:
        """For what a member says in a round; an update of an earlier one is refused and counted."""

        def refuse(stale: int) -> None:
            error = ProtocolError(f"expected an update of round {number}; one of round {stale} came")
            self.refuse(number, rank, error)

        return Inbox(self.link(rank), self.name(rank), self._most, ends, number, refuse)

    def _gather(self, number: int, rank: int) -> Gathered:
        """All that a member says in a round, up to its figures, so that what is wrong in it ends there.
        ProtocolError where it is none."""
        if self.semi is not None and rank in self.semi.arrived:
            return self.semi.arrived[rank].all()
        inbox = self.inbox(number, rank, ("told", "no"))
        while not inbox.hear():
            self.look()
        return inbox.all()

    def _receive(self, number: int, member: Member, frozen: str) -> tuple[Update, dict[str, float]]:
        """A member's update of a round and its figures. ProtocolError where they are none."""
        name, link = self.name(member.rank), self._gather(number, member.rank)
        download = self.aggregator.download(member)
        loaded, is_thin = download.factors, any(word in download.extras for word in THIN_UP)
        joins = self.job.joins(member.rank)
        sides = "" if joins or not loaded else "".join(side for side in "AB" if side not in frozen)
        count = _messages.values_of(sides, member.r, self.shapes)

        def count_of(header: Mapping[str, Any]) -> int:
            of = header.get("of", 0)
            if type(of) is not int or not (0 <= of <= count if is_thin else of == count):
                raise ProtocolError(f"expected {count} values of {name}'s adapter; {str(of)[:20]} came")
            return of

        header, values = link.receive_values("up", [number], count_of, name)
        weight = self.job.clients[member.rank].weight or header.get("weight")
        if type(weight) is not int or weight < 1:
            raise ProtocolError(f"expected a number of rows above 0 of {name}; {str(weight)[:20]} came")
        weight = self._weights.counted(weight, member.rank, name, number)
        if is_thin:
            values = self.fill(link, number, values, self.flat(loaded, sides))
        given = self.unflat(values, sides, member.r)
        factors: Arrays = {
            layer: (given[layer].get("A", pair[0]), given[layer].get("B", pair[1]))
            for layer, pair in loaded.items()
            if sides
        }
        extras = self.receive_extras(link, number, header.get("extras"))
        if joins:
            settings = self.settings | {"learning_rate": self.job.rate_of(member.rank)}
            factors, extras = dict(resolve(self.spec.joins[joins][1])(settings, loaded, extras)), {}
        update = Update(member, number, float(weight), factors, extras)
        return update, self._told(link, number)

    def _told(self, link: Link, number: int) -> dict[str, float]:
        (_, frames), rank = link.receive("told", [number]), link.other
        names = (*_messages.FIGURES, *_seen.names(self.job))
        size = 8 * len(names)
        if [frame.nbytes for frame in frames] != [size]:
            raise ProtocolError(f"expected figures of {self.name(rank)} in {size} bytes")
        found = np.frombuffer(frames[0], "<f8")
        if not (np.isfinite(found).all() and (found >= 0).all()):
            raise ProtocolError(f"expected finite figures of {self.name(rank)}, of 0 or more")
        return dict(zip(names, map(float, found), strict=True))

    def _tell_eval(self, number: int, told: Mapping[int, dict[str, float]], report: Report) -> None:
        targets = sum(figures["eval_targets"] for figures in told.values())
        if targets:
            loss = sum(figures["eval_loss"] for figures in told.values()) / targets
            values = {"loss": loss, "targets": targets} | _seen.of_eval(told)
            if number == self.job.rounds and self.job.keeps != "none":
                values["own_loss"] = sum(figures["own_loss"] for figures in told.values()) / targets
            for rank, figures in told.items():
                if figures["eval_targets"]:
                    values[f"loss_{rank}"] = figures["eval_loss"] / figures["eval_targets"]
                    if "own_loss" in values:
                        values[f"own_loss_{rank}"] = figures["own_loss"] / figures["eval_targets"]
            report("eval", number, values)

    # --- checkpoints --------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        found = {f"aggregator.{key}": value for key, value in self.aggregator.state_dict().items()}
        return {key: np.asarray(value) for key, value in found.items()} | {"round": np.zeros(1, np.float32)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        prefix = "aggregator."
        self.aggregator.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )

    # --- the end ------------------------------------------------------------------------------------

    def finish(self, report: Report) -> None:
        """Have every member load and evaluate what the last round made; give the adapter away."""
        number = self.job.rounds
        semi = self.semi
        if semi is not None:
            semi.left_out = {}
        members = [member for member in self.members if member.rank not in self._foreign]
        for member in members:
            part = partial(self._send, number, member, "")
            if semi is None:
                part()
            elif member.rank not in semi.left:
                semi.send(member.rank, part)
        self._packing.forget()
        ranks = [member.rank for member in members if self.hears(member.rank)]
        if semi is not None:
            ranks = semi.last(number, self.members, report)
        told = {}
        for rank in ranks:
            try:
                told[rank] = self._told(self._gather(number, rank), number)
            except ProtocolError as error:  # figures alone: what was made stands
                self.refuse(number, rank, error)
        self._tell_eval(number, told, report)
        if self.job.is_whole:
            give(self, self.aggregator.download(self.members[0]).extras, report)
            return
        spent = self._account.spent() if self._account else {}
        made = {
            name: (np.asarray(a, "<f4"), np.asarray(b * scale, "<f4"))
            for name, (a, b, scale) in self.aggregator.adapter().items()
        }
        if self.spec.collector == self.rank:
            write_adapter(self, "adapter", made)
            report("done", number, spent)
            return
        values = self.flat(made, "AB")
        words = {"r": [made[name][0].shape[0] for name in self.layers], "of": values.size, **spent}
        self.link(self.spec.collector).send_values("part", [number], words, values)


def collect(rank: Rank, report: Report) -> None:
    """Take the adapter from the server and write it; of the rank whose node the job was submitted to."""
    name, said = rank.name(rank.server), {}
    if rank.job.is_whole:
        take(rank, report)
        return

    def count_of(header: Mapping[str, Any]) -> int:
        ranks, shapes = header.get("r"), rank.shapes
        if (
            not isinstance(ranks, list)
            or len(ranks) != len(shapes)
            or not all(
                type(r) is int and 1 <= r <= max(min(shape), rank.job.r_most)
                for r, shape in zip(ranks, shapes, strict=True)
            )
        ):
            raise ProtocolError(f"expected the ranks of {len(shapes)} layers from {name}")
        said["r"] = ranks
        said["spent"] = {
            key: header[key] for key in ("epsilon", "delta") if type(header.get(key)) in (int, float)
        }
        return sum(r * (rows + columns) for r, (rows, columns) in zip(ranks, shapes, strict=True))

    _, values = rank.link(rank.server).receive_values("part", [rank.job.rounds], count_of, name)
    made, at = {}, 0
    for r, (layer, (rows, columns)) in zip(said["r"], rank.layers.items(), strict=True):
        middle, end = at + r * columns, at + r * (rows + columns)
        made[layer] = (values[at:middle].reshape(r, columns), values[middle:end].reshape(rows, r))
        at = end
    write_adapter(rank, "adapter", made)
    report("done", rank.job.rounds, said["spent"])
