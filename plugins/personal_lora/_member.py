"""A client of a federated job: it loads what the server made, trains on its own rows, and sends factors.

No row, label, logit or gradient leaves it; what leaves is in `_messages`. A personal adapter (`keeps`: dual
is FDLoRA's, ditto that of arXiv:2012.04221) is held by this class alone: nothing that sends can reach it but
the figure of its held-out loss.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edged import DeviceState, Download, LocalPart, ProtocolError

from .._training.link import Peeking
from .._training.rows import Batch, Rows
from . import _messages, _seen
from ._client_noise import cut_factors
from ._cohort import rules_of
from ._fusion import fuse, joined
from ._local import Local
from ._masked import Left, MaskedMember, terms_of
from ._rank import THIN_UP, Arrays, Rank, Report, own_words, resolve, write_adapter
from ._semi import OwnDevice, asked
from ._whole import Weights


class Member(Rank):
    def build(self) -> None:
        job = self.job
        share = max(1, job.eval_rows // len(job.clients)) if job.eval_rows else 0
        self._seen: dict[str, float] = {}  # beside the loss, until it is told
        self.rows = Rows.read(
            self.spec.data_path,
            self.blocks.tokenizer,
            job,
            share,
            objective=job.objective,
            rehearsal=job.rehearsal,
        )
        self.r = job.r_of(self.rank)
        self.model = self._model(1)
        self._start = self.start(self.r)
        self._merged: list[tuple[int, np.ndarray]] = []  # rank and values of every stack, in order
        self._local = self._local_part()
        self._own: Mapping[str, np.ndarray] = {}  # of the method, from round to round
        self._personal: Arrays | None = None  # an adapter that never leaves this node
        self._own_device = OwnDevice(rules_of(job))

    def _local_part(self) -> LocalPart | None:
        """Of this node's own plugins, where the method takes no gradients."""
        joins = self.job.joins(self.rank)
        dotted = self.spec.joins[joins][0] if joins else self.spec.locals.get(self.job.method)
        rate = self.job.rate_of(self.rank) if joins else self.job.learning_rate
        settings = self.settings | {"learning_rate": rate}
        if self.job.is_whole:
            return Weights(self, settings)
        return resolve(dotted)(settings, self._start, self.rank) if dotted else None

    def _model(self, times: int) -> Any:
        """The whole model, with an adapter of so many times this member's rank."""
        if not self.blocks.has_gradients:
            from ._loss_model import LossModel

            assert times == 1, "nothing is fused without gradients"
            return LossModel(self.blocks, self.job, self.rank)
        from ._torch_model import TorchModel  # not on a device without PyTorch

        return TorchModel(self.blocks, self.job, self.rank, self.spec.threads, times)

    def close(self) -> None:
        super().close()
        if not self.blocks.has_gradients:
            self.model.close()

    @property
    def weight(self) -> int:
        """Of its updates."""
        return self.job.clients[self.rank].weight or self.rows.count

    def count(self) -> dict[str, Any]:
        keeps = {"keeps": False} if self.job.is_semi else {}  # it may miss rounds: nothing goes on from here
        return {"weight": self.weight, "dropped": self.rows.dropped} | keeps

    def device(self, state: DeviceState) -> None:
        """A new reading of this node's device, from its daemon; on another thread."""
        self._own_device.hear(state)

    def rounds_from(self, step: int) -> Iterable[int]:
        if not self.job.is_semi:
            return super().rounds_from(step)
        link = self._links[self.server] = Peeking(self.link(self.server))
        return asked(link, step, self.job.rounds)

    def kept_at(self, step: int) -> int:
        """In a job whose rounds it may miss, the last one that it was in."""
        if not self.job.is_semi:
            return step
        return max((kept for kept in self.checkpoints.steps if kept <= step), default=0)

    # --- a round ------------------------------------------------------------------------------------

    def round(self, number: int, report: Report) -> None:
        if self.job.keeps == "dual" and self._personal is None:
            self._personal = self._alone(0)
        is_drawn = True
        with contextlib.suppress(Left):
            is_drawn = self._take_part(number)
        if is_drawn and self.job.keeps == "ditto":
            self._personal = self._alone(number)

    def _take_part(self, number: int) -> bool:
        """In the round of all, if it is drawn for it; Left where its sum is masked, and this member is out of
        it."""
        frozen, before = self._load(number), self.bytes_sent
        if frozen is None or self._sits_out(number):
            return False
        masked = self._masked(number, frozen) if self.job.masked else None
        if masked is not None:
            masked.agree()
        with self.computing():
            evaluated = self._evaluate_common() if self._is_due(number) else (0.0, 0.0)
            trained = self._train(number, frozen)
            self._seen |= self.model.take()
        factors, sides = self.model.factors(), "".join(side for side in "AB" if side not in frozen)
        if self._local is None:
            factors, extras, self._own = self._part.finish(
                factors, self.job.local_steps, self.job.rate_of(self.rank)
            )
        else:
            extras = self._found
            sides = sides if self._has_factors and not self.job.joins(self.rank) else ""
        if self.job.client_clip:
            factors = cut_factors(factors, self._loaded, sides, self.job.client_clip)
        if masked is None:
            self._send(number, factors, sides, extras)
        else:
            arrays = [np.asarray(extras[name], "<f4").ravel() for name in sorted(extras)]
            values = np.concatenate([self.flat(factors, sides), *arrays])
            masked.send(values, float(min(self.weight, _messages.weight_most(self.job))))
        self._tell(number, [*trained, *evaluated, 0.0, float(self.bytes_sent - before)])
        if masked is not None:
            masked.reveal()
        return True

    def _sits_out(self, number: int) -> bool:
        """Say that this device cannot train now, where the job asks for more than it is."""
        because = self._own_device.cannot() if self.job.is_semi else ""
        if because:
            self.link(self.server).send("cannot", [number], {"because": because}, [])
        return bool(because)

    def _masked(self, number: int, frozen: str) -> MaskedMember:
        """Of a round, by what was loaded for it."""
        sides = "".join(side for side in "AB" if side != frozen) if self._has_factors else ""
        terms = terms_of(self, number, sides, self._given, self._extras)
        return MaskedMember(self, number, terms)

    def _send(self, number: int, factors: Arrays, sides: str, extras: Mapping[str, np.ndarray]) -> None:
        """This member's update."""
        values = self.flat(factors, sides)
        mask = values != self.flat(self._loaded, sides)
        values = values[mask] if self._is_thin else values
        words = _messages.up(number, self.weight, values.size, len(extras), int(self._is_thin))
        self.link(self.server).send_values("up", [number], own_words(words), values)
        if self._is_thin:
            self.send_mask(self.server, number, mask)
        self.send_extras(self.server, number, extras)

    def finish(self, report: Report) -> None:
        """What the last round made: loaded, evaluated, and weighed against what is this member's own."""
        number, said = self.job.rounds, {}
        if self._load(number) is None:
            raise ProtocolError(f"expected the last adapter from {self.name(self.server)}; a rest came")
        if self.job.keeps != "none" and self._personal is None:  # it was never drawn
            self._personal = self._start
        with self.computing():
            evaluated = self._evaluate_common()
        own = 0.0
        if self._personal is not None:
            with self.computing():
                if self.job.keeps == "dual":
                    said = self._fuse(
                        self.model.factors(), self._personal, lambda: report("alive", number, {})
                    )
                else:
                    self.model.set(self._personal)
                own, _ = self._evaluate()
            self._keep()
            own_loss = {"own_loss": own / evaluated[1]} if evaluated[1] else {}
            report("kept", number, own_loss | said)
        self._tell(number, [0.0, 0.0, 0.0, 0.0, *evaluated, own, 0.0])

    def _tell(self, number: int, figures: list[float]) -> None:
        seen, self._seen = self._seen, {}
        figures = [*figures, *(seen.get(name, 0.0) for name in _seen.names(self.job))]
        self.link(self.server).send("told", [number], {}, [np.array(figures, "<f8").tobytes()])

    def _is_due(self, number: int) -> bool:
        every = self.job.eval_every
        return number == 0 or bool(every and number % every == 0)

    def _load(self, number: int) -> str | None:
        """Take a round's download; the factor that is not to be trained, or None where this member rests.
        ProtocolError where it is none."""
        said: dict[str, Any] = {}

        def count_of(header: Mapping[str, Any]) -> int:
            start, frozen, stack = header.get("start", ""), header.get("frozen", ""), header.get("stack", 0)
            if start not in ("", "A", "B", "AB", "none") or frozen not in ("", "A", "B", "AB"):
                raise ProtocolError(f"expected sides of an adapter from {self.name(self.server)}")
            most = sum(self.job.r_of(rank) for rank in range(self.server))
            if type(stack) is not int or not 0 <= stack <= most:
                raise ProtocolError(f"expected a rank to merge up to {most}; {str(stack)[:20]} came")
            if stack and self.job.masked:  # a server could give it to one alone
                raise ProtocolError(f"expected nothing to merge from {self.name(self.server)}: it is masked")
            said.update(start=start, frozen=frozen, stack=stack, has=start != "none")
            come = _come(start)
            count = _messages.values_of("AB", stack, self.shapes)
            count += _messages.values_of(come, self.r, self.shapes)
            of, said["count"] = header.get("of", 0), count
            if type(of) is not int or not (0 <= of <= count if header.get("thin") else of == count):
                raise ProtocolError(f"expected {count} values of an adapter; {str(of)[:20]} came")
            return of

        link = self.link(self.server)
        header, values = link.receive_values("down", [number], count_of, self.name(self.server))
        rests = header.get("rests", 0)
        if rests not in (0, 1):
            raise ProtocolError(f"expected whether to rest from {self.name(self.server)}")
        if header.get("thin"):
            values = self.fill(link, number, values, np.zeros(said["count"], "<f4"))
        extras = self.receive_extras(link, number, header.get("extras"))
        stacked = _messages.values_of("AB", said["stack"], self.shapes)
        if stacked:
            self._merge(said["stack"], values[:stacked])
        if rests:
            return None
        come = _come(said["start"])
        given = self.unflat(values[stacked:], come, self.r)
        self._loaded = {
            name: (given[name].get("A", start[0]), given[name].get("B", start[1]))
            for name, start in self._start.items()
        }
        self._has_factors = bool(said["has"])
        self._given, self._extras = self._loaded if self._has_factors else {}, extras
        if self._local is not None:
            self._loaded = dict(self._local.begin(Download(self._given, extras=extras)))
        self.model.set(self._loaded)
        self._is_thin = any(word in extras for word in THIN_UP)
        if self._loaded:  # there are none where all weights are tuned
            self._part = Local(Download(self._loaded, extras=extras), self._own, str(said["frozen"]))
        return str(said["frozen"])

    def _merge(self, stack: int, values: np.ndarray) -> None:
        self._merged.append((stack, values.copy()))
        self.model.merge(self.unflat(values, "AB", stack))

    def _train(self, number: int, frozen: str) -> tuple[float, float, float, float]:
        """The round's local steps: loss by targets summed, targets, tokens, and seconds."""
        job, first = self.job, number * self.job.local_steps
        steps, is_last = range(first, first + job.local_steps), getattr(self._local, "after_gradients", False)
        if self._local is not None and not is_last:
            return self._without_gradients(steps)
        correct = self._part.correction if self._part.corrects else None
        trained = self._steps(f"round {number}", steps, frozen, correct, self._part.is_plain)
        if self._local is not None:
            self._found = dict(self._local.train(steps, self.model.factors(), _no_loss))
        return trained

    def _without_gradients(self, steps: range) -> tuple[float, float, float, float]:
        """The method's own local steps, on views of the adapter's values; its loss is the mean of all that
        it looked at."""
        assert self._local is not None
        began, sums = time.monotonic(), [0.0, 0, 0]
        values = {} if self.job.is_whole else self.model.values()

        def loss(step: int) -> float:
            self.look()
            batch = self.rows.batch(step)
            found, count = self.model.loss(batch), self.model.targets(batch)
            sums[0], sums[1], sums[2] = sums[0] + found, sums[1] + count, sums[2] + batch[0].size
            return found / max(1, count)

        self._found = dict(self._local.train(steps, values, loss))
        self.model.set(values)
        return sums[0], float(sums[1]), float(sums[2]), time.monotonic() - began

    def _steps(
        self,
        where: str,
        steps: range,
        frozen: str = "",
        correct: Callable[[Arrays], Arrays] | None = None,
        is_plain: bool = False,
    ) -> tuple[float, float, float, float]:
        """Optimiser steps from the adapter as it is, on these steps' rows, as `TorchModel.steps`."""

        def batches() -> Iterator[tuple[int, Batch]]:
            for step in steps:
                self.look()
                yield step, self.rows.batch(step)

        found: tuple[float, float, float, float] = self.model.steps(
            where, batches(), frozen, correct, is_plain
        )
        return found

    def _evaluate(self) -> tuple[float, float]:
        """The loss of what is held out, summed, and its targets."""
        return self._loss_of(self.rows.eval_batches())

    def _evaluate_common(self) -> tuple[float, float]:
        """The same, of the adapter of all; what is seen beside it is kept until it is told."""
        self.model.take()
        found = self._evaluate()
        self._seen |= {f"eval_{name}": value for name, value in self.model.take().items()}
        loss, targets = self._loss_of(self.rows.eval_batches(self.rows.rehearsed))
        self._seen |= {"rehearsal_loss": loss, "rehearsal_targets": targets}
        self.model.take()
        return found

    def _loss_of(self, batches: Sequence[Batch]) -> tuple[float, float]:
        losses, targets = 0.0, 0
        for batch in batches:
            self.look()
            losses += self.model.loss(batch)
            targets += self.model.targets(batch)
        return losses, float(targets)

    # --- what is this member's own ------------------------------------------------------------------

    def _alone(self, number: int) -> Arrays:
        """The personal adapter after its steps of a round, on rows of this member and for it alone; the
        common adapter is put back afterwards."""
        job, common = self.job, self.model.factors()
        self.model.set(self._personal or self._start)
        steps = range(number * job.personal_steps, (number + 1) * job.personal_steps)
        with self.computing():
            if job.keeps == "ditto":
                self._steps("personal adapter", steps, correct=self._pull)
            else:
                self._steps("personal adapter", steps)
        found = {name: (a.copy(), b.copy()) for name, (a, b) in self.model.factors().items()}
        self.model.set(common)
        return found

    def _pull(self, factors: Arrays) -> Arrays:
        """Ditto's: lambda (P - P_common)."""
        pull = self.job.personal_pull
        return {
            name: (pull * (a - self._loaded[name][0]), pull * (b - self._loaded[name][1]))
            for name, (a, b) in factors.items()
        }

    def _fuse(self, common: Arrays, personal: Arrays, tell: Callable[[], None]) -> dict[str, float]:
        """Weigh both adapters on a few of the rows that this member trains on; the model then has the best
        of what was tried, at twice the rank."""
        job = self.job
        self._widen(2)
        ids = [self.rows.batch(step) for step in range(-(-job.fusion_rows // job.batch_size))]

        def loss(weights: tuple[float, float]) -> float:
            tell()  # this takes longer than a step, and has none
            self.model.set({name: joined(common[name], personal[name], weights) for name in self.layers})
            losses, targets = self._loss_of(ids)
            return losses / max(1.0, targets)

        alone = {"common_alone": loss((1.0, 0.0)), "personal_alone": loss((0.0, 1.0))}
        weights, found = fuse(loss, job.fusion_tries)
        loss(weights)
        weighed = {"common_weight": weights[0], "personal_weight": weights[1], "fusion_loss": found}
        return weighed | alone

    def _widen(self, times: int) -> None:
        """The model anew, with an adapter of so many times the rank and the same scale."""
        merged, self._merged = self._merged, []
        del self.model
        self.model = self._model(times)
        for stack, values in merged:
            self._merge(stack, values)

    def _keep(self) -> None:
        """Write the adapter that stands, with all that was merged, where this node's daemon finds it."""
        scale, made = self.job.scale_of(self.rank), {}
        stacks = [self.unflat(values, "AB", stack) for stack, values in self._merged]
        for name, (a, b) in self.model.factors().items():
            made[name] = (
                np.concatenate([a, *(stack[name]["A"] for stack in stacks)]),
                np.concatenate([scale * b, *(stack[name]["B"] for stack in stacks)], 1),
            )
        write_adapter(self, "kept", made)

    # --- checkpoints --------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """What was merged into the frozen weights; the adapter itself comes down again."""
        found = {f"merged.{i}.{r}": values for i, (r, values) in enumerate(self._merged)}
        if self._personal is not None:
            found["personal"] = self.flat(self._personal, "AB")
        found |= {f"own.{name}": np.asarray(value) for name, value in self._own.items()}
        return found | {"round": np.zeros(1, np.float32)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._own = {
            name.removeprefix("own."): value for name, value in state.items() if name.startswith("own.")
        }
        if "personal" in state:
            parts = self.unflat(state["personal"].copy(), "AB", self.r)
            self._personal = {name: (pair["A"], pair["B"]) for name, pair in parts.items()}
        stacks = [key.split(".") for key in state if key.startswith("merged.")]
        for _, number, r in sorted(stacks, key=lambda parts: int(parts[1])):
            self._merge(int(r), state[f"merged.{number}.{r}"])


def _no_loss(step: int) -> float:
    raise AssertionError("the local steps are done")


def _come(start: str) -> str:
    """The factors that a download brings, by what it says of the start; "none": there are none at all."""
    return "" if start == "none" else "".join(side for side in "AB" if side not in start)
