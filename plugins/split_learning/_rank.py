"""What every rank of a split training has: its part of the model, its optimiser, its checkpoints, its links.

A step's randomness (dropout, noise, the order of rows) is a function of the job's seed, the step and the
rank, so that a rank that goes on from a checkpoint draws what it would have drawn.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edged import Channel, Computed, ConfigError, EngineError, ProtocolError, TrainingSpec

from .._tensors import codecs
from .._tensors.rows import LENGTH_MULTIPLE
from .._tensors.sparse import Scores, SparseMask
from .._training.checkpoints import Checkpoints
from .._training.link import Stopped
from .._training.loss import tensors_of
from .._training.rows import Rows, seed_of
from .._training.sizes import packed_bytes
from .._training.tensor_link import TensorLink
from . import _adapter
from ._averaging import VALUES_MAX
from ._job import Job, read
from ._noise import Noise
from ._places import Places

Report = Callable[[str, int, Mapping[str, float]], None]
SCORED_STEPS = 4  # of all values, whose gradients choose those that are tuned: at first only B has any
BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's own
RESIDUAL_BYTES = 256 << 20  # of one link


class Rank(abc.ABC):
    """`Trainer` of one rank; what a topology adds is `build`, `step` and `evaluate`."""

    def __init__(self, spec: TrainingSpec, blocks: Any, channel: Channel) -> None:
        torch.set_num_threads(max(1, spec.threads))
        self.spec, self.blocks, self.channel = spec, blocks, channel
        self.job: Job = read(spec.settings)
        self.places = Places(self.job, spec.roles, blocks.layers, spec.collector)
        self.rank = spec.rank
        self.checkpoints = Checkpoints(spec.state_folder, "torch")
        self.computed = Computed()
        self._is_stopped: Callable[[], bool] = lambda: False
        self._links: dict[int, TensorLink] = {}
        self.rows = self._read_rows() if spec.data_path else None
        self.spans: list[Any] = []
        self.noise = Noise(self.job, "", None)  # none; `build` may make one
        self.build()
        self.parameters: list[nn.Parameter] = [p for span in self.spans for p in span.trainable()]
        self.parameters += self.own_parameters()
        self.optimiser = self.make_optimiser(self.parameters)
        self.scores = Scores() if self.job.sparse < 1 else None  # until the mask is chosen
        self.mask: SparseMask | None = None
        self.survey = self.count()
        self.steps_kept = tuple(step for step in self.checkpoints.steps if step <= self.job.steps)

    # --- what a topology says -------------------------------------------------------------------

    @abc.abstractmethod
    def build(self) -> None:
        """Load `spans`, with their adapters."""

    @abc.abstractmethod
    def step(self, step: int, report: Report) -> None:
        """One optimiser step of the whole job, as far as this rank has a part in it."""

    @abc.abstractmethod
    def evaluate(self, step: int, report: Report) -> None:
        """The held-out loss, before `step`."""

    def own_parameters(self) -> list[nn.Parameter]:
        """That are in no span."""
        return []

    def own_state(self) -> dict[str, Tensor]:
        """That a checkpoint needs beside spans and optimiser."""
        return {}

    def set_own_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most ranks have none
        """What `own_state` gave, back from a checkpoint."""

    def average(self, step: int) -> None:  # noqa: B027 - one client has nothing to average
        """Let the clients' adapters become their mean, where there are several."""

    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
        if not parameters:
            return None
        return torch.optim.AdamW(
            parameters,
            lr=self.job.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=self.job.weight_decay,
        )

    def count(self) -> dict[str, Any]:
        """What the prediction of bytes needs to know of this rank's rows and adapter; and what noise will
        have spent."""
        found: dict[str, Any] = {
            "adapter_values": sum(p.numel() for p in self.parameters),
            "adapter_names": sum(packed_bytes([k, list(v.shape)]) for k, v in self.adapter().items()),
            "keeps": bool(self.parameters),
        }
        if self.rows is not None:
            evals = Counter(tuple(ids.shape) for ids, _ in self.eval_batches())
            found |= {
                "shapes": self.rows.shapes(self.job.steps),
                "eval_shapes": [[*shape, count] for shape, count in sorted(evals.items())],
                "dropped": self.rows.dropped,
            }
        return found | self.noise.survey()

    def make_noise(self) -> Noise:
        """The identity for ranks without rows, and for jobs without a clip."""
        node = self.job.clients[self.rank].node if self.rank in self.places.clients else ""
        return Noise(self.job, self.spec.state_folder, self.rows, node or "the submitting node")

    # --- Trainer --------------------------------------------------------------------------------

    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        try:
            self._shake_hands()
            if step and self.parameters:
                self._restore(step)
            self.checkpoints.forget_after(step)
            for number in range(step, self.job.steps):
                self._one(number, report)
            self.evaluate(self.job.steps, report)
            self.finish(report)
        except Stopped:
            return

    def _one(self, step: int, report: Report) -> None:
        job = self.job
        if step == 0 or (job.eval_every and step % job.eval_every == 0):
            self.evaluate(step, report)
        if self._is_stopped():
            raise Stopped
        torch.manual_seed(seed_of(job.seed, step, self.rank))
        began = time.thread_time()
        self.step(step, report)
        done = step + 1
        if done % job.average_every == 0 or done == job.steps:
            self.average(step)
        spent = self.computed.compute_s + time.thread_time() - began
        self.computed = dataclasses.replace(self.computed, compute_s=spent)
        if self.parameters and (done % job.checkpoint_every == 0 or done == job.steps):
            self._save(done)

    def close(self) -> None:
        self.spans.clear()

    # --- links ----------------------------------------------------------------------------------

    def link(self, other: int) -> TensorLink:
        if other not in self._links:
            codec = codecs.make(self.job.codec, self.ratio_of(other), self.residuals())
            self._links[other] = TensorLink(self.channel, other, codec, lambda: self._is_stopped())
        return self._links[other]

    def ratio_of(self, other: int) -> float:
        """Of top-k on the way to `other`: the plan's own for this pair, where it measured the links."""
        if self.job.codec not in ("topk", "adatopk"):
            return 1.0
        return self.places.ratio(self.rank, other)

    def feedback_key(self, key: str) -> str:
        """Of a gradient that goes back, the stream along which what top-k left out is added to the next; ""
        for none.

        Hidden states that go forward have no key: they are plain top-k. Error feedback is about sums: what is
        left out of one gradient still belongs to what the optimiser adds up over the steps. Hidden states are
        never added up; the rest of an earlier batch's would be other rows' words, laid over these.
        """
        return key if self.job.error_feedback else ""

    def streams(self) -> int:
        """Of gradients to one other rank: keys that `feedback_key` is asked for."""
        return self.job.micro_batches

    def residuals(self) -> int:
        """The most a link may keep: one for each stream and shape of a batch (every length that padding
        makes, full and last batches), within RESIDUAL_BYTES where these are many and large; never less than
        one for each stream."""
        shapes = 2 * -(-(self.job.max_length + self.job.prompts) // LENGTH_MULTIPLE)
        rows = -(-self.job.batch_size // self.job.micro_batches)
        size = 4 * rows * (self.job.max_length + self.job.prompts) * self.blocks.hidden
        return max(self.streams(), min(self.streams() * shapes, RESIDUAL_BYTES // size))

    def _shake_hands(self) -> None:
        """Every two ranks that meet must train the same model by the same words."""
        mine = {
            "model": self.spec.model_sha256,
            "tokenizer": self.blocks.tokenizer.sha256 if self.rows is not None else "",
            "job": hashlib.sha256(json.dumps(dict(self.spec.settings), sort_keys=True).encode()).hexdigest(),
        }
        others = self.places.neighbours(self.rank)
        for other in others:
            self.link(other).send("hello", [], mine, [])
        for other in others:
            header, _ = self.link(other).receive("hello", [])
            for word in ("model", "job"):
                if header.get(word) != mine[word]:
                    raise EngineError(
                        f"expected the same {word} at every node; {self.places.name(other)} has "
                        f"{str(header.get(word))[:12]}, and here it is {mine[word][:12]}",
                        remedy="give both nodes the same file",
                        code="model-differs" if word == "model" else "job-differs",
                    )

    # --- one step -------------------------------------------------------------------------------

    def update(self, step: int) -> None:
        """The optimiser's step from the gradients that stand; they are cleared."""
        if self.optimiser is None:
            return
        if self.scores is not None:
            self.scores.add(self._named())
            if step + 1 >= SCORED_STEPS:
                self.mask, self.scores = self.scores.choose(self.job.sparse), None
        if self.mask is not None:
            self.mask.step(self.optimiser, self._named())
        else:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def _named(self) -> dict[str, nn.Parameter]:
        return {f"{i:05d}": parameter for i, parameter in enumerate(self.parameters)}

    def check_loss(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise EngineError(
                f"step {step}: the loss is {loss}; nothing of this step is kept",
                remedy="lower learning_rate, or look at the rows of this step",
                code="nan-loss",
            )

    # --- rows -----------------------------------------------------------------------------------

    def _read_rows(self) -> Rows:
        job = self.job
        share = max(1, job.eval_rows // len(job.clients)) if job.eval_rows else 0
        return Rows.read(self.spec.data_path, self.blocks.tokenizer, job, share)

    def eval_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Held-out rows in batches, in order: ids and labels (B, S)."""
        return [tensors_of(each) for each in self.rows.eval_batches()] if self.rows is not None else []

    def eval_count(self, header: Mapping[str, Any]) -> int:
        """How many batches a client has to evaluate, as it says."""
        count = header.get("of")
        if type(count) is not int or not 0 <= count <= self.job.eval_rows:
            raise ProtocolError(f"expected at most {self.job.eval_rows} batches to evaluate")
        return count

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of a step, (B, S) int64."""
        assert self.rows is not None
        return tensors_of(self.rows.batch(step))

    # --- checkpoints ----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        found = {f"parameter.{i}": p for i, p in enumerate(self.parameters)}
        if self.optimiser is not None:
            for i, parameter in enumerate(self.parameters):
                for name, value in self.optimiser.state.get(parameter, {}).items():
                    found[f"optimiser.{i}.{name}"] = value
        for other, link in self._links.items():
            for key, residual in link.codec.state_dict().items():
                found[f"residual.{other}.{key}"] = residual
        for kind, chosen in (("mask", self.mask), ("scores", self.scores)):
            if chosen is not None:
                found |= {f"{kind}.{name}": value for name, value in chosen.state_dict().items()}
        return found | {f"own.{name}": value for name, value in self.own_state().items()}

    def _save(self, step: int) -> None:
        self.checkpoints.save(step, self.state(), {"step": step})

    def _restore(self, step: int) -> None:
        state, words = self.checkpoints.load(step)
        try:
            if words.get("step") != step or _under(state, "parameter.").keys() != set(self._numbers()):
                raise ValueError(f"it is of step {words.get('step')} with {len(state)} tensors")
            self._put(state, step)
        except (AssertionError, ConfigError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"expected a checkpoint of this job's step {step}; {error}",
                remedy="remove it, to go on from an earlier one",
                code="disk",
            ) from error

    def _numbers(self) -> list[str]:
        return [str(i) for i in range(len(self.parameters))]

    def _put(self, state: Mapping[str, Tensor], step: int) -> None:
        """A checkpoint's tensors, where they belong."""
        residuals: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "parameter":
                with torch.no_grad():
                    self.parameters[int(rest)].copy_(value)
            elif kind == "optimiser" and self.optimiser is not None:
                index, _, key = rest.partition(".")
                self.optimiser.state[self.parameters[int(index)]][key] = value.clone()
            elif kind == "residual":
                other, _, key = rest.partition(".")
                residuals.setdefault(int(other), {})[key] = value
        for other, kept in residuals.items():
            self.link(other).codec.load_state_dict(kept)
        if self.scores is not None and step >= SCORED_STEPS:
            self.mask, self.scores = SparseMask(_under(state, "mask.")), None
        elif self.scores is not None:
            self.scores.load_state_dict(_under(state, "scores."))
        self.set_own_state(_under(state, "own."))

    # --- the end --------------------------------------------------------------------------------

    def adapter(self) -> dict[str, np.ndarray]:
        """This rank's part of the adapter, by PEFT's names; empty where another rank gives it."""
        return {name: value.numpy() for span in self.spans for name, value in span.lora().items()}

    def finish(self, report: Report) -> None:
        """Give the collector this rank's part; the collector writes the adapter and says that it is done."""
        collector, givers = self.spec.collector, self.places.givers()
        if self.rank != collector:
            if self.rank in givers:
                part = self.adapter()
                names = sorted(part)
                words = {"tensors": [[name, list(part[name].shape)] for name in names]}
                joined = np.concatenate([np.asarray(part[name], "<f4").ravel() for name in names])
                self.link(collector).send_values("part", [self.job.steps], words, joined)
            return
        parts = dict(self.adapter()) if self.rank in givers else {}
        for giver in givers:
            if giver != self.rank:
                parts |= self._take_part(giver)
        _adapter.write(
            Path(self.spec.state_folder) / "adapter",
            parts,
            self.job,
            is_transposed=self.blocks.family == "gpt2",
            base=self.blocks.source.path,
            model=self.spec.model_name,
        )
        report("done", self.job.steps, self.spent())

    def spent(self) -> dict[str, float]:
        """More that the job's document shall say, such as privacy that was spent."""
        return self.noise.spent(self.job.steps)

    def _take_part(self, giver: int) -> dict[str, np.ndarray]:
        name, steps = self.places.name(giver), self.job.steps
        header, values = self.link(giver).receive_values(
            "part", [steps], lambda said: sum(math.prod(shape) for _, shape in _shapes_of(said, name)), name
        )
        named = _shapes_of(header, name)
        ends = np.cumsum([math.prod(shape) for _, shape in named])
        parts = np.split(values, ends[:-1])
        return {key: part.reshape(shape) for (key, shape), part in zip(named, parts, strict=True)}


def _shapes_of(said: Mapping[str, Any], name: str) -> list[tuple[str, tuple[int, ...]]]:
    """What a part of the adapter says of its tensors; their values are at most as many as can travel."""
    try:
        found = [(str(key), tuple(int(size) for size in shape)) for key, shape in said["tensors"]]
        if not found or any(size < 1 for _, shape in found for size in shape):
            raise ValueError
        if sum(math.prod(shape) for _, shape in found) > VALUES_MAX:
            raise OverflowError
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ProtocolError(f"expected the adapter's part of {name}") from error
    return found


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
