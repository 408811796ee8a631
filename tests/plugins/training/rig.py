"""What the tests of split trainings share: jobs over tiny models, their ranks as threads or as processes, and
a plain loop of transformers and peft to compare with.

    plan = planned(model_file, tmp_path, rows=[...], topology="u-shape", cut=2)
    outcomes = run_threads(plan)                 # quick; one thread runs at a time, so it repeats bit for bit
    outcomes = processes.run(plan)               # real sockets between real processes, bytes counted
    assert not outcomes[0].error
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import multiprocessing
import random
import socket
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import peft
import torch
from edged_plugins._tensors.rows import Batches, encode, read_rows
from edged_plugins._training.link import LOOK_S, Stopped
from edged_plugins.split_learning._cost import cost
from edged_plugins.split_learning._job import check_local, check_split, read
from edged_plugins.split_learning._layout import plan_local, plan_split
from edged_plugins.split_learning._trainer import load
from edged_plugins.torch_blocks._describe import describe
from edged_plugins.torch_blocks._engine import open_blocks

from edged import ModelDescription, NodeView, TensorEntry, TrainingPlan, TrainingSpec
from edged.channel import End, ZmqChannel

WORDS = range(2, 128)  # of the tiny models' vocabulary: w2, w3, ...
LO = ("127.0.0.1",)
PATIENCE_S = 60.0  # a hang, not a slow machine
PRELOADED = ["edged_plugins.split_learning._trainer", "edged_plugins.torch_blocks._describe", "peft"]

Gradients = dict[str, np.ndarray]


# --- jobs -----------------------------------------------------------------------------------------


def write_rows(path: Path, count: int = 10, held_out: int = 3, seed: int = 0) -> Path:
    """`count` rows to train on and some held out, of random words, texts and instructions in turn."""
    chance = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{chance.choice(WORDS)}" for _ in range(chance.randint(low, high)))

    rows = []
    for number in range(count + held_out):
        row = {"text": words(6, 18)}
        if number % 2:
            row = {"instruction": words(3, 8), "output": words(2, 9)}
        rows.append(row | ({"split": "test"} if number >= count else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job that only needs to be run. `specs`: of every rank."""

    plan: TrainingPlan
    model: ModelDescription
    path: Path
    specs: tuple[TrainingSpec, ...]
    load: Callable[..., Any] = load  # of a rank's trainer
    cost: Callable[..., Any] = cost

    @property
    def folders(self) -> list[Path]:
        return [Path(spec.state_folder) for spec in self.specs]

    def changed(self, rank: int, **changes: Any) -> Planned:
        """With another spec for one rank."""
        specs = list(self.specs)
        specs[rank] = dataclasses.replace(specs[rank], **changes)
        return dataclasses.replace(self, specs=tuple(specs))

    def predicted_bytes(self, outcomes: Sequence[Outcome]) -> int:
        found = self.cost(self.plan, self.model, [outcome.survey for outcome in outcomes]).bytes_sent
        assert found is not None
        return found


def planned(
    path: Path,
    folder: Path,
    *,
    rows: Sequence[Path] = (),
    stages: int = 0,
    is_apart: bool = False,
    link_s: Mapping[tuple[str, str], float] | None = None,
    **table: Any,
) -> Planned:
    """A job over the model file at `path`, a client for each file of `rows`. `table`: of its TOML; `cut` is 2
    and steps are 3 where it says nothing, and learning is fast. `is_apart`: submitted by one more node."""
    model = described(path)
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows) or [write_rows(folder / "rows.jsonl")]
    settings: dict[str, Any] = {
        "model": "tiny",
        "topology": "label-sharing",
        "steps": 3,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "r": 4,
        "alpha": 8.0,
        "max_length": 32,
        "eval_every": 2,
        "eval_rows": 8,
        "checkpoint_every": 1,
        "target_modules": ["c_attn"] if model.architecture == "gpt2" else ["q_proj", "v_proj"],
    } | table
    if settings["topology"] == "local":
        settings |= {"topology": "label-sharing", "data": "rows0"}
        plan = plan_local(check_local(settings), model, [NodeView("client0", "client0")])
    else:
        settings.setdefault("cut", list(range(1, stages + 2)) if stages else 2)
        names = [f"client{i}" for i in range(len(rows))], [f"stage{i}" for i in range(stages)]
        settings["clients"] = [{"node": name, "data": f"rows{i}"} for i, name in enumerate(names[0])]
        settings |= {"stages": names[1]} if stages else {}
        settings["server"] = {"node": "server"}
        every = [*(["apart"] if is_apart else []), *names[0], *names[1], "server"]
        plan = plan_split(check_split(settings), model, [NodeView(name, name) for name in every])
    assert not plan.refused_because
    specs = tuple(
        TrainingSpec(
            "job",
            plan.settings,
            plan.roles,
            rank,
            str(rows[rank]) if plan.data[rank] else "",
            str(folder / f"rank-{rank}"),
            plan.collector,
            "tiny",
            "0" * 64,
        )
        for rank in range(len(plan.roles))
    )
    return Planned(plan, model, path, specs)


def described(path: Path) -> ModelDescription:
    found = describe(str(path))
    found["tensors"] = tuple(TensorEntry(**entry) for entry in found["tensors"])
    return ModelDescription(**found)


# --- one rank -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What came of a rank. `gradients`: of each of its optimiser's steps, by PEFT's names. `received`: every
    message as (source, header, frames). `log`: of messages both ways, as ("sent" or "received", kind)."""

    rank: int
    reports: list[tuple[str, int, dict[str, float]]] = dataclasses.field(default_factory=list)
    survey: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: tuple[int, ...] = ()
    start: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    lora: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    history: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    gradients: list[Gradients] = dataclasses.field(default_factory=list)
    received: list[tuple[int, dict[str, Any], list[bytes]]] = dataclasses.field(default_factory=list)
    log: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    bytes_sent: int = 0
    error: Exception | None = None

    @property
    def losses(self) -> list[float]:
        return [values["loss"] for kind, _, values in self.reports if kind == "step"]

    @property
    def evals(self) -> dict[int, float]:
        """Of those that count something."""
        return {
            step: values["loss"]
            for kind, step, values in self.reports
            if kind == "eval" and values["targets"]
        }


class Recording:
    """A channel that keeps what came out of it."""

    def __init__(self, channel: Any, outcome: Outcome) -> None:
        self._channel, self._outcome = channel, outcome
        self.rank, self.size, self.poll = channel.rank, channel.size, channel.poll

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        self._outcome.log.append(("sent", str(header["k"])))
        self._channel.send(to, header, frames)

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        header, frames = self._channel.receive(source, timeout_s)
        self._outcome.log.append(("received", str(header["k"])))
        self._outcome.received.append((source, dict(header), [bytes(frame) for frame in frames]))
        return header, frames

    @property
    def bytes_sent(self) -> int:
        return int(self._channel.bytes_sent)


Change = Callable[[Any], None]  # of a trainer, before it runs; of a module's top level for processes


def drive(
    spec: TrainingSpec,
    path: Path,
    channel: Any,
    step: int,
    is_stopped: Callable[[], bool],
    keep: str,
    change: Change | None = None,
    load: Callable[..., Any] = load,
) -> Outcome:
    """Run a rank to its end. `keep`: "messages", "history" (of LoRA, a step each), or nothing."""
    outcome = Outcome(spec.rank)
    try:
        within = Recording(channel, outcome) if keep == "messages" else channel
        trainer = load(spec, open_blocks(str(path)), within)
        outcome.survey, outcome.kept = dict(trainer.survey), tuple(trainer.steps_kept)
        if change is not None:
            change(trainer)
        outcome.start = adapter_of(trainer)
        _watch(trainer, outcome, keep == "history")
        trainer.run(
            step, lambda kind, at, values: outcome.reports.append((kind, at, dict(values))), is_stopped
        )
        outcome.lora = adapter_of(trainer)
        outcome.kept = tuple(trainer.checkpoints.steps)
        trainer.close()
    except Exception as error:  # the test looks at it
        outcome.error = error
    outcome.bytes_sent = channel.bytes_sent
    return outcome


def adapter_of(trainer: Any) -> dict[str, np.ndarray]:
    """Every tuned tensor of a rank: of LoRA by PEFT's names, and others by number."""
    spans = getattr(trainer, "spans", ())
    named = {name: value.numpy().copy() for span in spans for name, value in span.lora().items()}
    for number, parameter in enumerate(getattr(trainer, "parameters", ())[len(named) :]):
        named[f"own.{number}"] = parameter.detach().numpy().copy()
    return named


def _watch(trainer: Any, outcome: Outcome, with_history: bool) -> None:
    update = getattr(trainer, "update", None)
    if update is None:
        return

    def watched(step: int) -> None:
        names = list(adapter_of(trainer))
        outcome.gradients.append(
            {
                name: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy().copy()
                for name, parameter in zip(names, trainer.parameters, strict=True)
            }
        )
        update(step)
        if with_history:
            outcome.history.append(adapter_of(trainer))

    trainer.update = watched


def random_start(trainer: Any, scale: float = 0.3) -> None:
    """A change: LoRA's values are random, alike in every cut, so that no gradient is zero."""
    for span in trainer.spans:
        found = {}
        for name, value in span.lora().items():
            seed = zlib.crc32(name.encode())
            found[name] = scale * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        span.set_lora(found)


def small_start(trainer: Any) -> None:
    """A change: the same for a model that is trained, and stays one that can speak."""
    random_start(trainer, 0.01)


def gradients_of(outcomes: Sequence[Outcome], step: int = 0) -> Gradients:
    """Of all ranks together."""
    return {name: value for out in outcomes if out.gradients for name, value in out.gradients[step].items()}


def lora_of(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    return {name: value for outcome in outcomes for name, value in outcome.lora.items()}


def raised(outcomes: Sequence[Outcome]) -> Exception:
    """The first rank's error that has one."""
    return next(outcome.error for outcome in outcomes if outcome.error is not None)


def finished(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """The outcomes, of ranks without an error."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes


# --- ranks as threads -----------------------------------------------------------------------------


class Hall:
    """Where the ranks of a process meet: messages between them, and whose turn it is.

    One thread runs until it waits for a message; each has random numbers of its own, as in a process."""

    def __init__(self, size: int) -> None:
        self.turn = threading.Condition()
        self.boxes = {(a, b): deque[tuple[bytes, list[bytes]]]() for a in range(size) for b in range(size)}
        self.waits: dict[int, deque[Any]] = {}  # by rank
        self.at_work = size
        self.is_stopped = False

    def wait(self, rank: int, box: deque[Any], timeout_s: float) -> None:
        """Until there is something in the box; AssertionError where nobody is left to put it there. Who waits
        for less than a look has a clock of its own, and is nobody's deadlock."""
        if timeout_s < LOOK_S:
            self.turn.wait_for(lambda: bool(box) or self.is_stopped, timeout_s)
            return
        self.waits[rank] = box
        if len(self.waits) == self.at_work and not any(self.waits.values()) and not self.is_stopped:
            self.stop()
            raise AssertionError(f"ranks {sorted(self.waits)} wait for each other")
        self.turn.wait_for(lambda: bool(box) or self.is_stopped, timeout_s)
        del self.waits[rank]

    def stop(self) -> None:
        self.is_stopped = True
        self.turn.notify_all()


class QueueChannel:
    """A rank's end of the hall; its thread has the turn whenever it calls."""

    def __init__(self, hall: Hall, rank: int, size: int) -> None:
        self.rank, self.size, self.bytes_sent = rank, size, 0
        self._hall = hall

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        packed = msgpack.packb(header)
        self._hall.boxes[self.rank, to].append((packed, [memoryview(frame).tobytes() for frame in frames]))
        self._hall.turn.notify_all()

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        assert self.poll(source, timeout_s)
        header, frames = self._hall.boxes[source, self.rank].popleft()
        return msgpack.unpackb(header), [memoryview(frame) for frame in frames]

    def poll(self, source: int, timeout_s: float) -> bool:
        box = self._hall.boxes[source, self.rank]
        if not box and timeout_s:
            numbers = torch.get_rng_state()
            self._hall.wait(self.rank, box, timeout_s)
            torch.set_rng_state(numbers)
        return bool(box)


def run_threads(
    plan: Planned,
    step: int = 0,
    *,
    keep: str = "",
    changes: Mapping[int, Change] | None = None,
    ranks: Mapping[int, Callable[[QueueChannel], None]] | None = None,
) -> list[Outcome]:
    """Every rank of the job as a thread, from `step`. `changes`: by rank. `ranks`: strangers in place of
    trainers, by rank. An error of one stops all."""
    size = len(plan.specs)
    hall, outcomes = Hall(size), [Outcome(rank) for rank in range(size)]

    def one(rank: int) -> None:
        with hall.turn:
            channel = QueueChannel(hall, rank, size)
            if ranks and rank in ranks:
                ranks[rank](channel)
                hall.at_work -= 1
                return
            change = (changes or {}).get(rank)
            spec = plan.specs[rank]
            outcome = drive(spec, plan.path, channel, step, lambda: hall.is_stopped, keep, change, plan.load)
            outcomes[rank] = outcome
            hall.at_work -= 1
            if outcome.error is not None:
                hall.stop()

    numbers = torch.get_rng_state()
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_rng_state(numbers)
    return outcomes


def stopping_at(step: int) -> Change:
    """A rank that stops before its step `step`, and all others with it."""

    def change(trainer: Any) -> None:
        real = trainer.step

        def until(number: int, report: Any) -> None:
            if number == step:
                trainer.channel._hall.stop()
                raise Stopped
            real(number, report)

        trainer.step = until

    return change


def last_common(outcomes: Sequence[Outcome]) -> int:
    """The last step of which every rank that keeps any has a checkpoint: where a job goes on."""
    kept = [set(outcome.kept) for outcome in outcomes if outcome.survey.get("keeps")]
    return max(set.intersection(*kept), default=0)


def kept_by(plan: Planned) -> list[list[int]]:
    return [
        sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))
        for folder in plan.folders
    ]


# --- ranks as processes ---------------------------------------------------------------------------


class Relay:
    """A TCP relay on loopback that counts the bytes of both directions."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((LO[0], 0))
        self.port: int = self._listener.getsockname()[1]
        self.counts = [0, 0]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            ours, _ = self._listener.accept()
            theirs = socket.create_connection((LO[0], self._target))
            for way, (source, sink) in enumerate(((ours, theirs), (theirs, ours))):
                thread = threading.Thread(target=self._pump, args=(source, sink, way))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: int) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                self.counts[way] += len(part)
                sink.sendall(part)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        source.close()

    def close(self) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join()


def _serve(pipe: Any) -> None:
    """In a process of its own: ranks of one job after the other. The parent's words: see Processes.run."""
    torch.set_num_threads(1)
    while True:
        task = pipe.recv()
        if task == "stop":  # for a rank that had ended already
            continue
        spec, path, size, step, keep, change, load = task
        channel = ZmqChannel(spec.rank, size, LO, range(1))
        try:
            ports = channel.listen(list(range(spec.rank + 1, size)))
            pipe.send((channel.public_key, ports))
            channel.open("group", pipe.recv())
            pipe.send("open")
            pipe.recv()
            outcome = drive(spec, path, channel, step, lambda: bool(pipe.poll(0)), keep, change, load)
            pipe.send(outcome)
            while pipe.recv() != "close":
                pass
        finally:
            channel.close()


class Processes:
    """Processes that wait for ranks: forked from one that has loaded PyTorch, so that each starts at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._start()

    def _start(self) -> None:
        self._pipes, self._processes = [], []
        for _ in range(self._count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()  # nothing of it is wanted, and PyTorch takes seconds to end
            process.join(PATIENCE_S)
            process.close()
        for pipe in self._pipes:
            pipe.close()

    def pid(self, rank: int) -> int:
        return int(self._processes[rank].pid)

    def run(self, plan: Planned, step: int = 0, *, keep: str = "", change: Change | None = None) -> Ran:
        """Every rank of the job in a process, over channels whose bytes a relay counts."""
        size = len(plan.specs)
        pipes, relays = self._pipes[:size], []
        for spec, pipe in zip(plan.specs, pipes, strict=True):
            pipe.send((spec, plan.path, size, step, keep, change, plan.load))
        try:
            told = [_answer(pipe) for pipe in pipes]
            for rank, pipe in enumerate(pipes):
                ends = {}
                for other in range(size):
                    port = 0
                    if other < rank:
                        relays.append(Relay(told[other][1][rank]))
                        port = relays[-1].port
                    if other != rank:
                        ends[other] = End(told[other][0], LO[0], port)
                pipe.send(ends)
            for pipe in pipes:
                assert _answer(pipe) == "open"
            before = sum(sum(relay.counts) for relay in relays)
            for pipe in pipes:
                pipe.send("go")
            outcomes = self._outcomes(pipes)
            counted = sum(sum(relay.counts) for relay in relays) - before
            for pipe in pipes:
                pipe.send("close")
        except BaseException:
            self._end()  # who waits for what is not known any more
            self._start()
            raise
        finally:
            for relay in relays:
                relay.close()
        return Ran(outcomes, counted)

    def _outcomes(self, pipes: Sequence[Any]) -> list[Outcome]:
        waiting, found, is_stopped = list(pipes), {}, False
        while waiting:
            ready = multiprocessing.connection.wait(waiting, PATIENCE_S)
            assert ready, f"ranks {[pipes.index(pipe) for pipe in waiting]} said nothing for {PATIENCE_S:g} s"
            for pipe in ready:
                found[pipes.index(pipe)] = outcome = pipe.recv()  # type: ignore[union-attr]
                waiting.remove(pipe)
                if outcome.error is not None and not is_stopped:
                    is_stopped = True
                    for other in waiting:
                        other.send("stop")
        return [found[rank] for rank in range(len(pipes))]

    def close(self) -> None:
        self._end()
        forkserver._forkserver._stop()  # type: ignore[attr-defined] - 390 MB until the session ends otherwise
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def _answer(pipe: Any) -> Any:
    assert pipe.poll(PATIENCE_S), f"a rank said nothing for {PATIENCE_S:g} s"
    return pipe.recv()


@dataclasses.dataclass
class Ran:
    """`bytes`: between the processes on TCP, from the first message of the training to the last."""

    outcomes: list[Outcome]
    bytes: int


# --- a plain loop ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """What transformers and peft did: the loss and the gradients of every step, and LoRA at the end."""

    losses: list[float]
    gradients: list[Gradients]
    lora: dict[str, np.ndarray]


def plain_loop(model: Any, plan: Planned, start: Mapping[str, np.ndarray], client: int = 0) -> Plain:
    """Train `model` of transformers, unsplit, on a client's batches, from the adapter `start`."""
    job = read(plan.plan.settings)
    config = peft.LoraConfig(
        r=job.r,
        lora_alpha=job.alpha,
        target_modules=list(job.target_modules),
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
        tuned = peft.get_peft_model(copy.deepcopy(model), config)
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }
    assert set(named) == set(start)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(start[name].copy()))
    batches = _batches(plan, client)
    optimiser = torch.optim.AdamW(named.values(), lr=job.learning_rate, weight_decay=job.weight_decay)
    found = Plain([], [], {})
    for step in range(job.steps):
        ids, labels = map(torch.from_numpy, batches.batch(step))
        logits = tuned(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimiser.zero_grad()
        loss.backward()
        found.losses.append(loss.item())
        found.gradients.append({name: parameter.grad.numpy().copy() for name, parameter in named.items()})
        optimiser.step()
    found.lora = {name: parameter.detach().numpy().copy() for name, parameter in named.items()}
    return found


def client_batch(plan: Planned, step: int, client: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (B, S) of a client's step."""
    ids, labels = _batches(plan, client).batch(step)
    return torch.from_numpy(ids).long(), torch.from_numpy(labels).long()


def _batches(plan: Planned, client: int) -> Batches:
    job, tokenizer = read(plan.plan.settings), open_blocks(str(plan.path)).tokenizer
    rows = encode(read_rows(plan.specs[client].data_path), tokenizer, job.max_length, job.loss_on)  # type: ignore[arg-type]
    return Batches([row for row in rows if row.split == "train"], job.batch_size, job.seed, job.max_length)


def largest_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Between two adapters or their gradients, which have the same names."""
    assert set(one) == set(other)
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def assert_same_bits(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    assert one
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
