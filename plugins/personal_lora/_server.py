"""The server of a federated job: it sends each member what to start from, takes updates, and aggregates.

It measures what the aggregator made against what it was given (`_residual`), and never loads the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

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
from . import _messages
from ._cohort import cohort_of
from ._packing import Packing
from ._rank import THIN_UP, Arrays, Rank, Report, own_words, resolve, write_adapter
from ._residual import Residual

log = logging.getLogger(__name__)
UPDATE_SLACK = 1 << 20  # bytes of an update beside its values
MESSAGES_MOST = 1000  # of an update: values travel in pieces
KEPT = "aggregator."  # before the names of its state in a checkpoint


class Server(Rank):
    def build(self) -> None:
        job = self.job
        self.members = [Member(rank, job.r_of(rank), job.scale_of(rank)) for rank in range(self.server)]
        self._start = self.start(job.r_most)
        self._packing = Packing(self._start, self.flat)
        self.aggregator = self._aggregator()
        self._refused: Counter[int] = Counter()  # updates, by rank
        self._most = UPDATE_SLACK + 3 * 8 * _messages.values_of("AB", job.r_most, self.shapes)

    def _aggregator(self) -> Any:
        """Of this node's own plugins, by the job's word."""
        dotted = self.spec.aggregators.get(self.job.method)
        if dotted is None:
            raise EngineError(
                f"no method {self.job.method!r} here; loaded: {', '.join(sorted(self.spec.aggregators))}",
                remedy="load the plugin that brings it",
            )
        return resolve(dotted)(self.settings, self._start, self.members)

    def count(self) -> dict[str, Any]:
        return {"shapes": [list(shape) for shape in self.shapes]}

    # --- a round ------------------------------------------------------------------------------------

    def round(self, number: int, report: Report) -> None:
        began = time.monotonic()
        ranks = set(cohort_of(self.job, number))
        cohort = [member for member in self.members if member.rank in ranks]
        self.aggregator.begin(number, cohort)
        frozen = self.aggregator.frozen(number)
        values: dict[str, float] = {}
        for member in self.members:
            is_drawn = member.rank in ranks
            sent = self._send(number, member, frozen) if is_drawn else self._rest(number, member)
            values[f"down_{member.rank}"] = float(sent)
        self._packing.forget()
        meter, told = Residual(), {}
        for member in cohort:
            try:
                update, figures = self._receive(number, member, frozen)
                with self.computing():
                    self.aggregator.add(update)
                    if update.factors:
                        meter.add(update)
            except (ConfigError, PolicyViolation, ProtocolError) as error:
                self._refuse(number, member, error)
                continue
            told[member.rank] = figures
            values[f"up_{member.rank}"] = figures["sent"]
        with self.computing():
            self.aggregator.finish()
            residual = meter.of([(m, self.aggregator.download(m)) for m in self.members])
        if math.isfinite(residual):  # there is none of sums of scalars
            values["residual"] = residual
        self._tell_eval(number, told, report)
        targets = sum(figures["targets"] for figures in told.values())
        values |= {
            "loss": sum(figures["loss"] for figures in told.values()) / max(1.0, targets),
            "targets": targets,
            "tokens": sum(figures["tokens"] for figures in told.values()),
            "seconds": time.monotonic() - began,
        }
        if self._refused:
            values["refused"] = float(sum(self._refused.values()))
        if not math.isfinite(values["loss"]):
            raise EngineError(f"round {number}: expected finite losses of its members", code="nan-loss")
        report("step", number, values)

    def _send(self, number: int, member: Member, frozen: str) -> int:
        """A member's download; bytes that it took."""
        download: Download = self.aggregator.download(member)
        packed = self._packing.whole(download, member.r)
        values, mask, extras = packed.values, packed.mask, download.extras
        words = _messages.down(
            number, packed.start, frozen, packed.stack, values.size, len(extras), int(mask is not None)
        )
        before = self._bytes()
        self.link(member.rank).send_values("down", [number], own_words(words), values)
        if mask is not None:
            self.send_mask(member.rank, number, mask)
        self.send_extras(member.rank, number, extras)
        return self._bytes() - before

    def _rest(self, number: int, member: Member) -> int:
        """The download of one that is not of the cohort; bytes that it took."""
        stack, values = self._packing.merged(self.aggregator.download(member))
        before, words = self._bytes(), _messages.rest(number, stack, values.size)
        self.link(member.rank).send_values("down", [number], own_words(words), values)
        return self._bytes() - before

    def _bytes(self) -> int:
        return int(getattr(self.channel, "bytes_sent", 0))

    def _refuse(self, number: int, member: Member, error: EdgedError) -> None:
        """An update that cannot be used costs itself: it is counted, and the round goes on."""
        self._refused[member.rank] += 1
        log.warning(
            "update refused",
            extra={"round": number, "member": self.name(member.rank), "reason": str(error)[:300]},
        )

    def _gather(self, number: int, rank: int) -> Gathered:
        """All that a member says in a round, up to its figures, so that what is wrong in it ends there. What
        is of an earlier round is left out; PeerError where there is no end of it."""
        link, messages, size = self.link(rank), [], 0
        while True:
            header, frames = link.next()
            at = header.get("at")
            if isinstance(at, list) and at and type(at[0]) is int and at[0] < number:
                continue
            size += sum(frame.nbytes for frame in frames)
            messages.append((header, frames))
            if header.get("k") == "told":
                return Gathered(link, messages)
            if size > self._most or len(messages) > MESSAGES_MOST:
                raise PeerError(
                    f"expected an update of at most {self._most} bytes of {self.name(rank)}; more came",
                    remedy="look at what runs there",
                )

    def _receive(self, number: int, member: Member, frozen: str) -> tuple[Update, dict[str, float]]:
        """A member's update of a round and its figures. ProtocolError where they are none."""
        name, link = self.name(member.rank), self._gather(number, member.rank)
        download = self.aggregator.download(member)
        loaded, is_thin = download.factors, any(word in download.extras for word in THIN_UP)
        sides = "".join(side for side in "AB" if side != frozen) if loaded else ""
        count = _messages.values_of(sides, member.r, self.shapes)

        def count_of(header: Mapping[str, Any]) -> int:
            of = header.get("of")
            if type(of) is not int or not (0 <= of <= count if is_thin else of == count):
                raise ProtocolError(f"expected {count} values of {name}'s adapter; {str(of)[:20]} came")
            return of

        header, values = link.receive_values("up", [number], count_of, name)
        weight = header.get("weight")
        if type(weight) is not int or weight < 1:
            raise ProtocolError(f"expected a number of rows above 0 of {name}; {str(weight)[:20]} came")
        if self.job.weight_most:
            weight = min(weight, self.job.weight_most)
        if is_thin:
            values = self.fill(link, number, values, self.flat(loaded, sides))
        given = self.unflat(values, sides, member.r)
        factors: Arrays = {
            layer: (given[layer].get("A", pair[0]), given[layer].get("B", pair[1]))
            for layer, pair in loaded.items()
        }
        extras = self.receive_extras(link, number, header.get("extras"))
        update = Update(member, number, float(weight), factors, extras)
        return update, self._told(link, number)

    def _told(self, link: Link, number: int) -> dict[str, float]:
        (_, frames), rank = link.receive("told", [number]), link.other
        size = 8 * len(_messages.FIGURES)
        if [frame.nbytes for frame in frames] != [size]:
            raise ProtocolError(f"expected figures of {self.name(rank)} in {size} bytes")
        found = np.frombuffer(frames[0], "<f8")
        if not (np.isfinite(found).all() and (found >= 0).all()):
            raise ProtocolError(f"expected finite figures of {self.name(rank)}, of 0 or more")
        return dict(zip(_messages.FIGURES, map(float, found), strict=True))

    def _tell_eval(self, number: int, told: Mapping[int, dict[str, float]], report: Report) -> None:
        targets = sum(figures["eval_targets"] for figures in told.values())
        if targets:
            loss = sum(figures["eval_loss"] for figures in told.values()) / targets
            values = {"loss": loss, "targets": targets}
            if number == self.job.rounds and self.job.keeps != "none":
                values["own_loss"] = sum(figures["own_loss"] for figures in told.values()) / targets
            for rank, figures in told.items():
                if figures["eval_targets"]:
                    values[f"loss_{rank}"] = figures["eval_loss"] / figures["eval_targets"]
                    if "own_loss" in values:
                        values[f"own_loss_{rank}"] = figures["own_loss"] / figures["eval_targets"]
            report("eval", number, values)

    # --- checkpoints --------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        found = {
            key: torch.from_numpy(np.asarray(value)) for key, value in self.aggregator.state_dict().items()
        }
        return {f"aggregator.{key}": value for key, value in found.items()} | {"round": torch.zeros(1)}

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        prefix = "aggregator."
        self.aggregator.load_state_dict(
            {
                key.removeprefix(prefix): value.numpy()
                for key, value in state.items()
                if key.startswith(prefix)
            }
        )

    # --- the end ------------------------------------------------------------------------------------

    def finish(self, report: Report) -> None:
        """Have every member load and evaluate what the last round made; give the adapter away."""
        number = self.job.rounds
        for member in self.members:
            self._send(number, member, "")
        self._packing.forget()
        ranks = [member.rank for member in self.members]
        self._tell_eval(number, {rank: self._told(self.link(rank), number) for rank in ranks}, report)
        made = {
            name: (np.asarray(a, "<f4"), np.asarray(b * scale, "<f4"))
            for name, (a, b, scale) in self.aggregator.adapter().items()
        }
        if self.spec.collector == self.rank:
            write_adapter(self, "adapter", made)
            report("done", number, {})
            return
        values = self.flat(made, "AB")
        words = {"r": [made[name][0].shape[0] for name in self.layers], "of": values.size}
        self.link(self.spec.collector).send_values("part", [number], words, values)


def collect(rank: Rank, report: Report) -> None:
    """Take the adapter from the server and write it; of the rank whose node the job was submitted to."""
    name, said = rank.name(rank.server), {}

    def count_of(header: Mapping[str, Any]) -> int:
        ranks, shapes = header.get("r"), rank.shapes
        if (
            not isinstance(ranks, list)
            or len(ranks) != len(shapes)
            or not all(
                type(r) is int and 1 <= r <= min(shape) for r, shape in zip(ranks, shapes, strict=True)
            )
        ):
            raise ProtocolError(f"expected the ranks of {len(shapes)} layers from {name}")
        said["r"] = ranks
        return sum(r * (rows + columns) for r, (rows, columns) in zip(ranks, shapes, strict=True))

    _, values = rank.link(rank.server).receive_values("part", [rank.job.rounds], count_of, name)
    made, at = {}, 0
    for r, (layer, (rows, columns)) in zip(said["r"], rank.layers.items(), strict=True):
        middle, end = at + r * columns, at + r * (rows + columns)
        made[layer] = (values[at:middle].reshape(r, columns), values[middle:end].reshape(rows, r))
        at = end
    write_adapter(rank, "adapter", made)
    report("done", rank.job.rounds, {})
