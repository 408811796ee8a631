"""What both ends of a round have: the job, the adapter's shapes and start, links, checkpoints."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edged import Channel, Computed, EdgedError, EngineError, PeerError, ProtocolError, TrainingSpec

from .._tensors.starts import START
from .._training.adapter_folder import write_lora
from .._training.checkpoints import Checkpoints
from .._training.link import Link, Stopped
from . import _messages
from ._job import Job, read

PREFIX = "base_model.model."  # of PEFT's names
THIN_DOWN = ("upload_density",)  # a download that says so is sent as values that are not 0, and where
THIN_UP = (
    "upload_density",
    "ranks_sent",
)  # an update after such a one: those that differ from what was loaded
Report = Callable[[str, int, Mapping[str, float]], None]
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # by layer: A (r, in), B (out, r)


class Rank(abc.ABC):
    """`Trainer` of one rank; a step is a round."""

    def __init__(self, spec: TrainingSpec, blocks: Any, channel: Channel) -> None:
        self.spec, self.blocks, self.channel = spec, blocks, channel
        self.job: Job = read(spec.settings)
        self.rank, self.server = spec.rank, len(self.job.clients)
        self.checkpoints = Checkpoints(spec.state_folder)
        self.computed = Computed()
        targets = () if self.job.is_whole else self.job.target_modules
        self.layers: dict[str, tuple[int, int]] = blocks.linears(targets)
        self._links: dict[int, Link] = {}
        self._is_stopped: Callable[[], bool] = lambda: False
        self.build()
        self.survey: Mapping[str, Any] = self.count()
        self.steps_kept = tuple(step for step in self.checkpoints.steps if step <= self.job.rounds)

    @abc.abstractmethod
    def build(self) -> None: ...

    @abc.abstractmethod
    def count(self) -> dict[str, Any]:
        """What the prediction of bytes needs to know of this rank."""

    @abc.abstractmethod
    def round(self, number: int, report: Report) -> None:
        """All of a round that is this rank's."""

    @abc.abstractmethod
    def finish(self, report: Report) -> None:
        """After the last round."""

    @abc.abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """What the next round goes on from."""

    @abc.abstractmethod
    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """What `state` gave, back from a checkpoint; KeyError, ValueError, RuntimeError where it is none."""

    @property
    def settings(self) -> dict[str, Any]:
        """The job's, with its method's own keys."""
        return dict(self.spec.settings) | dict(self.job.options)

    @property
    def bytes_sent(self) -> int:
        """Of this rank, over all its links."""
        return int(getattr(self.channel, "bytes_sent", 0))

    @property
    def neighbours(self) -> Sequence[int]:
        return [self.server] if self.rank < self.server else range(self.server)

    # --- Trainer ------------------------------------------------------------------------------------

    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        try:
            self._shake_hands()
            kept = self.kept_at(step)
            if kept:
                self._restore(kept)
            self.checkpoints.forget_after(step)
            for number in self.rounds_from(step):
                if is_stopped():
                    return
                self.round(number, report)
                self.checkpoints.save(number + 1, self.state(), {"step": number + 1, "start": START})
            self.finish(report)
        except Stopped:
            return

    def rounds_from(self, step: int) -> Iterable[int]:
        """The rounds that this rank has a part in, in order."""
        return range(step, self.job.rounds)

    def kept_at(self, step: int) -> int:
        """The checkpoint to go on from; 0 for none."""
        return step

    def close(self) -> None:
        self._links.clear()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Time of this thread within counts as computed, not as waited."""
        began = time.thread_time()
        yield
        self.count_computed(time.thread_time() - began)

    def count_computed(self, seconds: float) -> None:
        """Processor seconds of another thread, say."""
        spent = self.computed.compute_s + seconds
        self.computed = dataclasses.replace(self.computed, compute_s=spent)

    def look(self) -> None:
        """Between two pieces of work: is there somebody who wants this to end?"""
        if self._is_stopped():
            raise Stopped

    def _restore(self, step: int) -> None:
        state, words = self.checkpoints.load(step)
        try:
            if words.get("step") != step:
                raise ValueError(f"it is of round {words.get('step')}")
            if words.get("start") != START:
                raise ValueError("it goes on from a start that is drawn otherwise by now")
            self.set_state(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"expected a checkpoint of this job's round {step}; {error}",
                remedy="remove it, to go on from an earlier one",
                code="disk",
            ) from error

    # --- links --------------------------------------------------------------------------------------

    def link(self, other: int) -> Link:
        if other not in self._links:
            self._links[other] = Link(self.channel, other, partial(self.is_over, other))
        return self._links[other]

    def is_over(self, other: int) -> bool:
        """Should waiting for a rank end, because somebody wants it? PeerError where that rank is gone."""
        return self._is_stopped()

    def name(self, rank: int) -> str:
        """Of a rank, as the job's file calls it."""
        if rank < self.server:
            return self.job.clients[rank].node or "the submitting node"
        return self.job.server if rank == self.server else self.spec.roles[rank].node_id[:8]

    def hello(self) -> dict[str, Any]:
        """What this rank trains, and by which words."""
        return _messages.hello(job_sha256(self.spec.settings), self.spec.model_sha256)

    def _shake_hands(self) -> None:
        """Server and member must train the same model by the same words."""
        mine = self.hello()
        words = {key: value for key, value in mine.items() if key not in ("k", "at")}
        for other in list(self.neighbours):
            with self._or_without(other):
                self.link(other).send("hello", [], words, [])
        for other in list(self.neighbours):
            with self._or_without(other):
                header, _ = self.link(other).receive("hello", [])
                self._compare(other, header, mine)

    def _compare(self, other: int, header: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        for word in ("model", "job"):
            if header.get(word) != mine[word]:
                raise EngineError(
                    f"expected the same {word} at every node; {self.name(other)} has "
                    f"{str(header.get(word))[:12]}, and here it is {mine[word][:12]}",
                    remedy="give both nodes the same file",
                    code="model-differs" if word == "model" else "job-differs",
                )

    @contextmanager
    def _or_without(self, other: int) -> Iterator[None]:
        try:
            yield
        except (EngineError, PeerError, ProtocolError) as error:
            if not self.goes_on_without(other, error):
                raise

    def goes_on_without(self, other: int, error: EdgedError) -> bool:
        """May the job do without a rank that is not there, or trains another model or another job?"""
        return False

    def send_mask(self, other: int, round: int, mask: np.ndarray) -> None:
        """Which values came, after them."""
        self.link(other).send("mask", [round], {}, [np.packbits(mask, bitorder="little").tobytes()])

    def fill(self, link: Link, round: int, values: np.ndarray, base: np.ndarray) -> np.ndarray:
        """`base` with the values that came where their mask says. ProtocolError where it is none."""
        other, (_, frames) = link.other, link.receive("mask", [round])
        if [frame.nbytes for frame in frames] != [_messages.mask_bytes(base.size)]:
            raise ProtocolError(f"expected a mask of {base.size} bits from {self.name(other)}")
        bits = np.unpackbits(np.frombuffer(frames[0], np.uint8), count=base.size, bitorder="little")
        if int(bits.sum()) != values.size:
            raise ProtocolError(f"expected a mask of {values.size} values from {self.name(other)}")
        found = base.astype("<f4")
        found[bits.astype(bool)] = values
        return found

    def send_extras(self, other: int, round: int, extras: Mapping[str, np.ndarray]) -> None:
        if not extras:
            return
        arrays = {name: np.asarray(value, order="C") for name, value in sorted(extras.items())}
        named = [[name, each.dtype.str[1:], list(each.shape)] for name, each in arrays.items()]
        self.link(other).send(
            "extras", [round], {"arrays": named}, [each.tobytes() for each in arrays.values()]
        )

    def receive_extras(self, link: Link, round: int, count: Any) -> dict[str, np.ndarray]:
        """As many arrays as were announced. ProtocolError where they are none, or not finite."""
        if not count:
            return {}
        other, (header, frames) = link.other, link.receive("extras", [round])
        try:
            found = {
                str(name): np.frombuffer(frame, f"<{_dtype(dtype)}").reshape(_shape(shape))
                for (name, dtype, shape), frame in zip(header["arrays"], frames, strict=True)
            }
            if len(found) != count or not all(np.isfinite(each).all() for each in found.values()):
                raise ValueError(f"{len(found)} arrays, or values that are not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"expected extras of {self.name(other)}'s round {round}; {error}") from error
        return found

    # --- factors ------------------------------------------------------------------------------------

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return list(self.layers.values())

    def start(self, r: int) -> Arrays:
        """What a job begins with, at rank `r`: the first of the widest member's."""
        targets = () if self.job.is_whole else self.job.target_modules
        found = self.blocks.lora_start(r=self.job.r_most, targets=targets, seed=self.job.seed)
        return {name: (a[:r], b[:, :r]) for name, (a, b) in found.items()}

    def flat(self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], sides: str) -> np.ndarray:
        """The values of the named sides, layer by layer, A before B."""
        parts = [
            np.asarray(factors[name][side], "<f4").ravel()
            for name in self.layers
            for side, letter in enumerate("AB")
            if letter in sides
        ]
        return np.concatenate(parts) if parts else np.zeros(0, "<f4")

    def unflat(self, values: np.ndarray, sides: str, r: int) -> dict[str, dict[str, np.ndarray]]:
        """Of each layer the named sides, out of what `flat` gave."""
        found: dict[str, dict[str, np.ndarray]] = {}
        at = 0
        for name, (rows, columns) in self.layers.items():
            found[name] = {}
            for letter, shape in (("A", (r, columns)), ("B", (rows, r))):
                if letter in sides:
                    size = shape[0] * shape[1]
                    found[name][letter] = values[at : at + size].reshape(shape)
                    at += size
        return found


def job_sha256(settings: Mapping[str, Any]) -> str:
    """Of a plan's words, and of how an adapter's start is drawn."""
    return hashlib.sha256(json.dumps([START, dict(settings)], sort_keys=True).encode()).hexdigest()


def _shape(sizes: Any) -> list[int]:
    if not all(type(size) is int and 0 <= size < 1 << 40 for size in sizes):
        raise ValueError(f"no shape of {str(sizes)[:30]}")
    return list(sizes)


def _dtype(name: Any) -> str:
    if name not in _messages.SIZES:
        raise ValueError(f"no array of {str(name)[:10]!r}")
    return str(name)


def resolve(dotted: str) -> Any:
    """ "package.module:attribute", of this node's own plugins."""
    module, _, attribute = dotted.partition(":")
    return getattr(importlib.import_module(module), attribute)


def own_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a link says itself."""
    return {key: value for key, value in words.items() if key not in ("k", "at")}


def write_adapter(rank: Rank, folder: str, made: Arrays) -> None:
    """A PEFT folder in the rank's own, whose factors count once: alpha is r."""
    ranks = {name: a.shape[0] for name, (a, _) in made.items()}
    widest = max(ranks.values())
    unlike = {name: r for name, r in ranks.items() if r != widest}
    path = Path(rank.spec.state_folder) / folder
    shutil.rmtree(path, ignore_errors=True)  # of a run that ended between two files
    write_lora(
        path,
        {
            f"{PREFIX}{name}.lora_{letter}.weight": pair[side]
            for name, pair in made.items()
            for side, letter in enumerate("AB")
        },
        r=widest,
        alpha=widest,
        targets=rank.job.target_modules,
        is_transposed=rank.blocks.family == "gpt2",
        base=rank.blocks.source.path,
        model=rank.spec.model_name,
        extra={"rank_pattern": unlike, "alpha_pattern": unlike} if unlike else {},
    )
