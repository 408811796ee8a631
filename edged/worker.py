"""The process that executes one role: `python -m edged.worker --fd N`, started by the daemon.

It talks to its daemon over the inherited socket N, to the other workers of its plan over a channel.
The main thread owns engine and channel; a second thread reads the daemon's requests and ends the
process when the daemon is gone. A request is one of

    task      {function, params}     call a dotted function, answer with its result, end
    prepare   {group, rank, size, listens_for, interfaces, ports}   answer {public_key, ports, certificate,
              stream_ports}
    load      {group, load, spec, ends, may_spin}   connect, load the engine; answer {wire.Started}; with
              {trainer, training} too, load a trainer that has the engine's model
    probe     {group, ends, may_spin}   connect to one other rank, measure, answer {LinkCost}, end
    adapt     {number, path, forgets, undoes}   load an adapter beside the model, or give others back
    generate  {wire.Generate}        rank 0 only: begin a sequence; events tokens, finished follow
    cancel    {job}
    train     {wire.Train}           a trainer only: run it to its end; events trained follow
    usage     {}                     answer {wire.Spent}, also during a computation
    left      {wire.Left}            a trainer only, at once: a rank takes no part any more
    device    {DeviceState}          likewise: a new reading of this device
    stop      {}
"""

from __future__ import annotations

import argparse
import codecs
import ctypes
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from . import framing, logs, wire
from .certificate import new_credential
from .channel import End, ZmqChannel
from .errors import ConfigError, EdgedError, EngineError, PeerError, PolicyViolation, ProtocolError
from .exchanging import measure_burst, measure_link
from .reports import Reports
from .streams import Streams
from .types import (
    Channel,
    Computed,
    DeviceState,
    Engine,
    EngineSpec,
    LinkCost,
    ModelDescription,
    NodeView,
    PlanRequest,
    Step,
    SwappingEngine,
    Trainer,
    TrainingSpec,
)

log = logging.getLogger(__name__)
OOM_SCORE_ABOVE_DAEMON = 300  # of 1000: the kernel ends a worker before anything of the device's own
PR_SET_PDEATHSIG = 1
SEQUENCES_MAX = 32  # at once in one worker; more jobs wait, also where the KV cache's memory says so
PIECE_TOKENS, PIECE_TOKENS_SHARED = 512, 128  # of a prompt in one step: alone, and while others decode
WAITING_MAX = 256  # a coordinator sends far fewer
REST_TOKENS_MIN = 64  # a shorter rest of a prompt joins the piece before it: small batches round differently
PROBE_S = 30.0  # for the other side to connect
FOLLOW_S = 0.1  # how long a follower listens to its peers before it looks at its daemon's requests


@dataclass(slots=True)
class _Sequence:
    """One job on rank 0."""

    request: wire.Generate
    number: int
    pending: list[int]  # tokens the model has not seen yet
    position: int = 0
    replay: deque[int] = field(default_factory=deque)  # tokens that follow these, drawn in an earlier epoch
    made: int = 0
    given: int = 0  # of the pending ones, in the batch that it is in; 0: it is in none
    is_cancelled: bool = False
    text: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )


class Worker:
    """Requests in, events out; `run` returns when the daemon says stop."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self._channel: ZmqChannel | None = None
        self._engine: Engine | None = None
        self._trainer: Trainer | None = None
        self._reports: Reports | None = None  # that the trainer's coordinator may have missed
        self._asked_to_stop = threading.Event()
        self._rank = self._context = 0
        self._running: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._flights: deque[list[_Sequence]] = deque()  # begun and not finished, the oldest first
        self._numbers = 0
        self._adapters: set[int] = set()  # beside the model, for new jobs
        self._busy_s = 0.0  # on rank 0 within the engine
        self._stopped = False

    def run(self) -> None:
        threading.Thread(target=self._read, name="daemon-pipe", daemon=True).start()
        while not self._stopped:
            self._handle_requests()
            if self._engine is None:
                continue
            try:
                self._advance(self._engine)
            except EdgedError as error:
                self._fail(error)
        for loaded in (self._engine, self._trainer):
            if loaded is not None:
                loaded.close()
        if self._channel is not None:
            self._channel.close()

    # --- requests ---

    def _read(self) -> None:
        while True:
            try:
                message = framing.receive(self._pipe)
            except (EdgedError, OSError):
                message = None
            if message is None:
                os._exit(0)  # the daemon is gone: nobody waits for this process any more
            if message.kind == "usage":  # answered here, also while the main thread computes
                self._send(wire.pack("ok", self._usage(), answers=message.request))
                continue
            if message.kind in ("left", "device"):  # likewise
                self._tell_trainer(message)
                continue
            if message.kind == "stop":  # a trainer looks at it between two steps
                self._asked_to_stop.set()
            self._inbox.put(message)

    def _tell_trainer(self, message: wire.Message) -> None:
        """What it may want to know while it runs; nothing where it does not, or is not loaded yet."""
        told = getattr(self._trainer, message.kind, None)
        if told is None:
            return
        try:
            if message.kind == "left":
                body = wire.read_body(wire.Left, message.body)
                told(body.rank, body.reason)
            else:
                told(wire.read_body(DeviceState, message.body))
        except EdgedError:
            log.exception("not told", extra={"kind": message.kind})

    def _usage(self) -> wire.Spent:
        rows = _sent_of(self._channel) if self._channel is not None else ()
        sent = sum(row.bytes for row in rows)
        sent += getattr(self._engine, "bytes_sent", 0)  # of one that sends beside the channel
        each = rows if self._engine is None else ()  # a training's is one job's alone
        return wire.Spent(sent, _peak_bytes(), self._computed(), each)

    def _computed(self) -> Computed | None:
        """As the engine counts it; else rank 0's time within it. None while it loads: that is work too."""
        loaded = self._engine or self._trainer
        if loaded is None:
            return None
        counted = getattr(loaded, "computed", None)
        if isinstance(counted, Computed):
            return counted
        return Computed(self._busy_s) if self._rank == 0 else None

    def _handle_requests(self) -> None:
        """Everything that waits; blocks while there is nothing else to do."""
        idle = self._engine is None or (self._rank == 0 and not self._running and not self._waiting)
        while not self._stopped:
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            try:
                answer = self._handle(message)
            except EdgedError as error:
                self._send(wire.pack_error(error, answers=message.request))
            except MemoryError:
                out_of_memory = EngineError("expected enough memory; the worker ran out", code="memory")
                self._send(wire.pack_error(out_of_memory, answers=message.request))
            else:
                if message.request:
                    self._send(wire.pack("ok", answer, answers=message.request))

    def _handle(self, message: wire.Message) -> Any:
        body = message.body
        match message.kind:
            case "task":
                self._stopped = True
                bound_spinning()
                return _resolve(body["function"])(
                    body["params"], lambda event: self._event("progress", event)
                )
            case "prepare":
                return self._prepare(body)
            case "load":
                return self._load(body)
            case "probe":
                self._stopped = True
                return self._probe(body)
            case "adapt":
                return self._adapt(**body)
            case "generate":
                return self._begin(wire.read_body(wire.Generate, body))
            case "cancel":
                return self._cancel(body["job"])
            case "train":
                return self._train(wire.read_body(wire.Train, body))
            case "stop":
                self._stopped = True
                return None
        raise ProtocolError(f"a worker has no request {message.kind!r}")

    def _prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        ports = range(*body["ports"])
        self._rank = body["rank"]
        streams = _streams(body["group"], body["rank"]) if body["size"] > 1 else None
        self._channel = ZmqChannel(body["rank"], body["size"], body["interfaces"], ports, streams)
        ports_taken = self._channel.listen(body["listens_for"])
        return {
            "public_key": self._channel.public_key,
            "ports": ports_taken,
            "certificate": self._channel.certificate,
            "stream_ports": self._channel.stream_ports,
        }

    def _load(self, body: dict[str, Any]) -> wire.Started:
        started = time.monotonic()
        channel = self._connected(body)
        spec = wire.read_body(EngineSpec, body["spec"])
        self._context = spec.context_tokens
        if not body.get("trainer"):
            bound_spinning()
        loaded = _resolve(body["load"])(spec, channel)
        if body.get("trainer"):
            training = wire.read_body(TrainingSpec, body["training"])
            self._reports = Reports(training.state_folder)
            trainer = self._trainer = cast(Trainer, _resolve(body["trainer"])(training, loaded, channel))
            told = dict(trainer.survey), tuple(trainer.steps_kept)
        else:
            self._engine, told = cast(Engine, loaded), ({}, ())
        return wire.Started((time.monotonic() - started) * 1000, self._usage().memory_bytes, *told)

    def _adapt(self, number: int, path: str, forgets: Sequence[int], undoes: int) -> None:
        if self._engine is None or not hasattr(self._engine, "adapt"):
            raise ProtocolError("expected load of an engine that takes adapters before adapt")
        engine = cast(SwappingEngine, self._engine)
        unwanted = self._adapters.intersection(forgets)
        if waited := unwanted.intersection(sequence.request.adapter for sequence in self._waiting):
            raise PolicyViolation(f"expected an adapter that no job waits for; {min(waited)} came")
        for known in unwanted:
            self._adapters.discard(known)
            if self._rank == 0:  # which tells the others, after the last batch with it
                engine.forget(known)
        if undoes in self._adapters:
            self._adapters.discard(undoes)
            engine.undo(undoes)
        if path:
            engine.adapt(number, path)
            self._adapters.add(number)

    def _train(self, request: wire.Train) -> None:
        """Run the trainer to its end. What fails in it fails the job, but for a rank that is gone."""
        trainer, reports = self._trainer, self._reports
        if trainer is None or reports is None:
            raise ProtocolError("expected load of a trainer before train")

        def tell(kind: str, step: int, values: Mapping[str, float], error: EdgedError | None = None) -> None:
            described = {"code": error.code, "message": str(error), "remedy": error.remedy} if error else {}
            told = wire.Trained(request.job, request.epoch, self._rank, kind, step, dict(values), described)  # type: ignore[arg-type]
            self._event("trained", told)

        def report(kind: str, step: int, values: Mapping[str, float]) -> None:
            if kind in ("step", "eval"):
                reports.add(kind, step, values)
            tell(kind, step, values)

        left: Callable[[int, str], None] = getattr(trainer, "left", lambda rank, reason: None)
        for rank in request.away:
            left(rank, "it was away when this began")
        for kind, step, values in reports.begin(request.step):
            if step >= request.told:
                tell(kind, step, values)
        try:
            trainer.run(request.step, report, self._asked_to_stop.is_set)
        except PeerError as error:
            self._fail(error)
        except EdgedError as error:
            tell("error", request.step, {}, error)
            self._stopped = True
        except Exception as error:  # the outermost frame of a plugin's training: it tells its error
            log.exception("training failed")
            short = _is_out_of_memory(error)
            text = "expected enough memory" if short else f"the training failed: {type(error).__name__}"
            code = "memory" if short else "training"
            tell("error", request.step, {}, EngineError(f"{text}: {str(error)[:500]}", code=code))
            self._stopped = True

    def _probe(self, body: dict[str, Any]) -> LinkCost:
        """What the connection to the one other rank costs."""
        channel, other = cast(Channel, self._connected(body)), 1 - self._rank
        return measure_burst(channel, other, measure_link(channel, other, PROBE_S))

    def _connected(self, body: dict[str, Any]) -> ZmqChannel:
        if self._channel is None:
            raise ProtocolError("expected prepare before load or probe")
        self._channel.open(body["group"], {rank: End(*end) for rank, end in body["ends"].items()})
        self._channel.spin(body["may_spin"])
        return self._channel

    def _cancel(self, job: str) -> None:
        for sequence in [waiting for waiting in self._waiting if waiting.request.job == job]:
            self._waiting.remove(sequence)
            self._finish(sequence, "cancelled")
        if (running := self._running.get(job)) is not None:
            running.is_cancelled = True
            if not running.given:
                self._end(running, "cancelled")

    # --- work ---

    def _advance(self, engine: Engine) -> None:
        """On rank 0 keep the engine's batches in flight and finish one; elsewhere take one message."""
        if self._rank:
            engine.follow(FOLLOW_S)
            return
        began = time.monotonic()
        self._admit(engine)
        lanes = engine.lanes(len(self._running)) if self._running else 0
        while len(self._flights) < lanes and (batch := self._next_batch(lanes)):
            engine.begin([_step(sequence) for sequence in batch])
            self._flights.append(batch)
        if not self._flights:
            return
        batch = self._flights.popleft()
        for sequence, token in zip(batch, engine.finish(), strict=True):
            self._take(engine, sequence, token)
        self._busy_s += time.monotonic() - began

    def _begin(self, request: wire.Generate) -> None:
        if self._engine is None:
            raise ProtocolError("expected load before generate")
        self._numbers += 1
        known = [*self._running, *(sequence.request.job for sequence in self._waiting)]
        try:
            if request.job in known or len(self._waiting) >= WAITING_MAX:
                raise PolicyViolation(f"expected a new job, and fewer than {WAITING_MAX} waiting")
            prompt = request.raw if request.raw is not None else request.messages
            tokens = self._engine.encode(prompt, raw=request.raw is not None)
            if len(request.history) >= request.tokens_max:
                raise ProtocolError("expected fewer tokens of an earlier epoch than the job shall make")
            if not tokens:
                raise ConfigError("expected a prompt of at least one token; it is empty")
            if request.adapter and request.adapter not in self._adapters:
                raise EngineError("expected an adapter that was loaded before", remedy="run it again")
            if request.history and len(tokens) + len(request.history) >= self._context:
                self._event("finished", wire.Finished(request.job, request.epoch, "length"))
                return
            if len(tokens) >= self._context:
                raise EngineError(
                    f"expected a prompt of fewer than {self._context} tokens; {len(tokens)} came"
                )
        except EdgedError as error:
            self._event("finished", wire.Finished(request.job, request.epoch, "error", str(error)))
            return
        history = request.history
        sequence = _Sequence(request, self._numbers, [*tokens, *history], made=len(history))
        if request.replays:
            sequence.pending, sequence.replay = tokens, deque(history)
        sequence.text.decode(self._engine.decode(request.history))  # a character may be half there
        self._waiting.append(sequence)

    def _admit(self, engine: Engine) -> None:
        """Let in who waits, in order, as long as there is room."""
        while self._waiting and len(self._running) < SEQUENCES_MAX:
            sequence = self._waiting[0]
            left = sequence.request.tokens_max - sequence.made
            most = min(self._context, len(sequence.pending) + len(sequence.replay) + left)
            shared = _open(engine, sequence, most)
            if shared is None:
                if self._running:
                    return
                raise EngineError(f"expected room for {most} positions in an empty KV cache", code="memory")
            self._waiting.popleft()
            del sequence.pending[:shared]
            sequence.position = shared
            self._running[sequence.request.job] = sequence

    def _next_batch(self, lanes: int) -> list[_Sequence]:
        """Sequences that are in no batch: a lane's part of those that decode, and prompts as far as a
        piece goes, so that nobody waits long for another's prompt."""
        free = [sequence for sequence in self._running.values() if not sequence.given]
        batch = [sequence for sequence in free if len(sequence.pending) == 1]
        del batch[-(-len(self._running) // lanes) :]
        for sequence in batch:
            sequence.given = 1
        room = PIECE_TOKENS_SHARED if batch or self._flights else PIECE_TOKENS
        for sequence in free:
            pending = len(sequence.pending)
            if pending == 1 or room < REST_TOKENS_MIN:
                continue
            sequence.given = pending if pending < room + REST_TOKENS_MIN else room
            room -= sequence.given
            batch.append(sequence)
        return batch

    def _take(self, engine: Engine, sequence: _Sequence, token: int | None) -> None:
        """A batch with this sequence is finished: tell the daemon its new token, or end."""
        sequence.position += sequence.given
        del sequence.pending[: sequence.given]
        sequence.given = 0
        if sequence.is_cancelled:
            self._end(sequence, "cancelled")
            return
        if token is None:  # its prompt goes on, or whoever is outside has no token for it yet
            return
        if sequence.replay:  # told in an earlier epoch
            sequence.pending = [sequence.replay.popleft()]
            return
        sequence.pending = [token]
        request = sequence.request
        if token in engine.end_tokens and not request.ignore_eos:
            self._end(sequence, "stop")
            return
        index, sequence.made = sequence.made, sequence.made + 1
        is_last = sequence.made == request.tokens_max or sequence.position + 1 >= self._context
        text = sequence.text.decode(engine.decode([token]), final=is_last)
        self._event("tokens", wire.Tokens(request.job, request.epoch, index, (token,), text))
        if is_last:
            self._end(sequence, "length")

    def _end(self, sequence: _Sequence, reason: wire.Reason) -> None:
        """A running sequence is over, and in no batch."""
        del self._running[sequence.request.job]
        if self._engine is not None:
            self._engine.release(sequence.number)
        self._finish(sequence, reason)

    def _finish(
        self, sequence: _Sequence, reason: wire.Reason, error: str = "", lost_rank: int | None = None
    ) -> None:
        request = sequence.request
        self._event("finished", wire.Finished(request.job, request.epoch, reason, error, lost_rank))

    def _fail(self, error: EdgedError) -> None:
        """A step went wrong; the ranks may not stand at the same place any more, so the worker ends."""
        rank = error.rank if isinstance(error, PeerError) else None
        for sequence in [*self._running.values(), *self._waiting]:
            self._finish(sequence, "error", str(error), rank)
        self._running.clear()
        self._waiting.clear()
        self._event("failed", {"message": str(error), "is_peer": isinstance(error, PeerError), "rank": rank})
        self._stopped = True

    # --- to the daemon ---

    def _event(self, kind: str, body: Any) -> None:
        self._send(wire.pack(kind, body))

    def _send(self, packed: bytes) -> None:
        with self._sending:
            self._pipe.sendall(framing.frame(packed))


def _streams(group: str, rank: int) -> Streams | None:
    """TLS streams to offer; None where `cryptography` is missing, or files in memory: then everything
    goes over ZeroMQ."""
    try:
        return Streams(new_credential(group, rank))
    except (ImportError, OSError, ValueError) as error:  # ValueError: no certificate can hold the name
        log.info("no streams", extra={"reason": str(error)})
        return None


def _open(engine: Engine, sequence: _Sequence, most: int) -> int | None:
    if adapter := sequence.request.adapter:
        return cast(SwappingEngine, engine).open(sequence.number, sequence.pending, most, adapter)
    return engine.open(sequence.number, sequence.pending, most)


def _step(sequence: _Sequence) -> Step:
    """What a sequence has in its next batch; it draws a token when no part of its prompt is left."""
    tokens = tuple(sequence.pending[: sequence.given])
    is_all = sequence.given == len(sequence.pending)
    return Step(sequence.number, tokens, sequence.position, sequence.request.sampling if is_all else None)


def _sent_of(channel: ZmqChannel) -> tuple[wire.Sent, ...]:
    """What went out, by receiver and kind."""
    most = wire.KIND_CHARS_MAX
    rows = [wire.Sent(to, kind[:most], messages, size) for to, kind, messages, size in channel.sent]
    return tuple(rows[: wire.SENT_MAX])


def _is_out_of_memory(error: Exception) -> bool:
    """Tensor libraries say it in a RuntimeError's text; a full disk is an OSError of its own."""
    told = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in told or "out of memory" in told


def _peak_bytes() -> int:
    """This process's largest resident size (VmHWM; ru_maxrss would count the daemon's, before exec)."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) * 1024


def call(params: dict[str, Any], report: object) -> dict[str, Any]:
    """A task: {function, settings} -> {answer}, for an engine's `measure` and `check`."""
    return {"answer": _resolve(params["function"])(params["settings"])}


def ranges(params: dict[str, Any], report: object) -> dict[str, Any]:
    """A task: {function, spec} -> {ranges}, the bytes of its file that an engine's role reads."""
    found = _resolve(params["function"])(wire.read_body(EngineSpec, params["spec"]))
    return {"ranges": [[start, stop] for start, stop in found]}


def search(params: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A task: {searches, model, nodes, request} -> {found}: candidates of each strategy by its search.

    What each search has found at once is reported before any goes on, and all that is better as it comes: who
    cannot wait for the answer has the last report.
    """
    model = wire.read_body(ModelDescription, params["model"])
    nodes = [wire.read_body(NodeView, node) for node in params["nodes"]]
    request = wire.read_body(PlanRequest, params["request"])
    running = {
        name: iter(_resolve(dotted)(model, nodes, request)) for name, dotted in params["searches"].items()
    }
    found: dict[str, list[dict[str, Any]]] = {}
    while running:
        for name, steps in list(running.items()):
            try:
                candidates = next(steps, None)
            except Exception:  # a plugin's search: what the others find is as good as before
                log.exception("search failed", extra={"strategy": name})
                candidates = None
            if candidates is None:
                del running[name]
                continue
            found[name] = [wire.to_map(candidate) for candidate in candidates]
            report({"found": {name: found[name]}})
    return {"found": found}


def _resolve(dotted: str) -> Callable[..., Any]:
    """ "package.module:attribute", imported here and nowhere else."""
    module, _, attribute = dotted.partition(":")
    try:
        return cast("Callable[..., Any]", getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"expected {dotted} in this installation; {error}", remedy="install the extra it needs"
        ) from error


def _bind_to_daemon(parent: int) -> None:
    """Die with the daemon, before it under memory pressure, and not of its terminal's Ctrl-C."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the daemon drains first; it ends us by the pipe
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            score = min(1000, int(file.read()) + OOM_SCORE_ABOVE_DAEMON)
            file.seek(0)
            file.write(str(score))
    except OSError as error:
        log.info("oom score unchanged", extra={"reason": str(error)})


def bound_spinning() -> None:
    """Let OpenMP's waiting threads spin for microseconds, then sleep; read when its library loads.

    By default they spin for milliseconds: beside one busy process, a token of a 135M model on two
    threads then took 195 ms in the mean and 2.8 s at worst. On an idle machine 3000 rounds are as
    fast as that default (10.3 ms a token against 11.8; 1000 rounds: 12.2), and two such workers on
    the same two cores take 54 ms a token (5000: 78, 20000: 250). Sleeping at once (passive) cost
    threefold. One thread has no such wait. Not for a trainer: its waits are between large products, and
    with this bound a step on two threads of an idle machine takes 1.07 times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="edged.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    chosen = parser.parse_args(arguments)
    _bind_to_daemon(chosen.parent)
    logs.to_stderr("worker %(process)d %(levelname)s %(message)s", os.environ.get("EDGED_LOG", "WARNING"))
    Worker(socket.socket(fileno=chosen.fd)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
