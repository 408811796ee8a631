"""How rank 0 shares out its engine: lanes, prompts in pieces, waiting, cancelling; with a fake engine."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from edged import wire
from edged.errors import PolicyViolation, ProtocolError
from edged.types import Computed, EngineSpec, ModelDescription, Sampling, Step, TrainingSpec
from edged.worker import PIECE_TOKENS, PIECE_TOKENS_SHARED, WAITING_MAX, Worker

GREEDY = Sampling(temperature=0)


class Lanes:
    """An engine whose tokens are 7, and that remembers its batches."""

    end_tokens = frozenset({0})

    def __init__(self, lanes: int, room: int = 100_000) -> None:
        self._lanes, self.room = lanes, room
        self.batches: list[dict[int, int]] = []  # sequence -> tokens given
        self.in_flight: deque[Sequence[Step]] = deque()
        self.most_in_flight = 0
        self.positions: dict[int, int] = {}

    def encode(self, prompt: str, raw: bool) -> list[int]:
        return [7] * len(prompt)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return b"x" * len(tokens)

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        if sum(self.positions.values()) + positions > self.room:
            return None
        self.positions[sequence] = positions
        return 0

    def lanes(self, sequences: int) -> int:
        return min(self._lanes, sequences)

    def begin(self, steps: Sequence[Step]) -> None:
        assert not {s.sequence for s in steps} & {s.sequence for batch in self.in_flight for s in batch}
        self.batches.append({step.sequence: len(step.tokens) for step in steps})
        self.in_flight.append(steps)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def finish(self) -> list[int | None]:
        return [7 if step.sampling else None for step in self.in_flight.popleft()]

    def release(self, sequence: int) -> None:
        assert sequence not in {s.sequence for batch in self.in_flight for s in batch}
        del self.positions[sequence]


@pytest.fixture
def pipe() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    with ours, theirs:
        yield theirs


def worker_of(pipe: socket.socket, engine: Lanes) -> Worker:
    worker = Worker(pipe)
    worker._engine, worker._context = engine, 4096
    return worker


def order(job: str, prompt: str = "p", tokens: int = 40) -> wire.Generate:
    return wire.Generate("g", job, 1, (), prompt, tokens, GREEDY, True)


def advance(worker: Worker, times: int) -> None:
    for _ in range(times):
        worker._advance(worker._engine)


@pytest.mark.parametrize(("jobs", "lanes", "sizes"), [(8, 2, [4, 4]), (7, 2, [4, 3]), (6, 3, [2, 2, 2])])
def test_decoding_jobs_are_divided_among_the_lanes(
    pipe: socket.socket, jobs: int, lanes: int, sizes: list[int]
) -> None:
    engine = Lanes(lanes)
    worker = worker_of(pipe, engine)
    for job in range(jobs):
        worker._begin(order(str(job)))
    advance(worker, 10)
    assert [len(batch) for batch in engine.batches[: len(sizes)]] == sizes
    assert sorted(len(batch) for batch in engine.batches[-len(sizes) :]) == sorted(sizes)
    assert engine.most_in_flight == lanes


def test_a_prompt_is_given_in_pieces_beside_those_that_decode(pipe: socket.socket) -> None:
    engine = Lanes(1)
    worker = worker_of(pipe, engine)
    worker._begin(order("long", "p" * 1000))
    advance(worker, 2)
    assert engine.batches == [{1: PIECE_TOKENS}, {1: 1000 - PIECE_TOKENS}]
    worker._begin(order("other", "p" * 300))
    advance(worker, 2)
    assert engine.batches[2:] == [{1: 1, 2: PIECE_TOKENS_SHARED}, {1: 1, 2: 300 - PIECE_TOKENS_SHARED}]


def test_a_job_waits_for_room_and_is_let_in_when_another_ends(pipe: socket.socket) -> None:
    engine = Lanes(1, room=50)
    worker = worker_of(pipe, engine)
    worker._begin(order("a", tokens=3))
    worker._begin(order("b", tokens=49))
    advance(worker, 3)
    assert engine.batches == [{1: 1}] * 3
    advance(worker, 1)
    assert engine.batches[-1] == {2: 1}


def test_a_cancelled_job_leaves_its_lane_to_the_others(pipe: socket.socket) -> None:
    engine = Lanes(2)
    worker = worker_of(pipe, engine)
    for job in "abcd":
        worker._begin(order(job))
    advance(worker, 3)
    worker._cancel("b")
    advance(worker, 3)
    assert set(engine.positions) == {1, 3, 4}
    assert sorted(len(batch) for batch in engine.batches[-2:]) == [1, 2]


def test_what_was_computed_is_the_engines_word_else_rank_0s_time_within_it(pipe: socket.socket) -> None:
    engine = Lanes(1)
    worker = worker_of(pipe, engine)
    worker._begin(order("a"))
    advance(worker, 3)
    found = worker._computed()
    assert found is not None
    assert found.compute_s > 0
    assert found.tokens == 0
    worker._rank = 1
    assert worker._computed() is None
    engine.computed = Computed(3.0, 2, 1.0)  # type: ignore[attr-defined]
    assert worker._computed() == Computed(3.0, 2, 1.0)
    worker._engine = None
    assert worker._computed() is None


def test_a_flood_of_jobs_is_refused_and_harms_nobody(pipe: socket.socket) -> None:
    engine = Lanes(1, room=41)
    worker = worker_of(pipe, engine)
    worker._begin(order("0"))
    advance(worker, 1)
    for job in range(1, WAITING_MAX + 50):
        worker._begin(order(str(job)))
    worker._begin(order("0"))  # and one that runs already
    assert len(worker._waiting) == WAITING_MAX
    advance(worker, 2)
    assert engine.batches == [{1: 1}] * 3


def remembers(*arguments: object) -> SimpleNamespace:
    """What a plugin's function finds when it is called, as OpenMP would that it then imports."""
    SPINS.append(os.environ.get("GOMP_SPINCOUNT"))
    return SimpleNamespace(survey={}, steps_kept=())


SPINS: list[str | None] = []
MINE = f"{__name__}:remembers"
TINY = ModelDescription("llama", 1, 1, 8, 1, 1, 8, 8, 8, 64, "F32", 1, 1, 1, (1,), 1, 1)
SPEC = wire.to_map(EngineSpec("m.gguf", TINY, (), 0, 64))
TRAINING = wire.to_map(TrainingSpec("j", {}, (), 0, "", "state", 0, "m", "0" * 64))


@pytest.mark.parametrize(
    ("kind", "body", "spins"),
    [
        ("task", {"function": MINE, "params": {}}, "3000"),
        ("load", {"spec": SPEC, "load": MINE}, "3000"),
        ("load", {"spec": SPEC, "load": MINE, "trainer": MINE, "training": TRAINING}, None),
    ],
    ids=["task", "engine", "trainer"],
)
def test_threads_wait_in_sleep_for_tokens_and_awake_for_training(
    pipe: socket.socket, monkeypatch: pytest.MonkeyPatch, kind: str, body: dict[str, Any], spins: str | None
) -> None:
    """It is settled before anything of a plugin is called: OpenMP reads it when it is loaded."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is as before afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(Worker, "_connected", lambda worker, body: None)
    SPINS.clear()
    Worker(pipe)._handle(wire.Message(kind, body, 1, 0))
    assert set(SPINS) == {spins}


def test_an_engine_without_a_token_yet_is_asked_again_by_a_step_without_tokens(pipe: socket.socket) -> None:
    class Waits(Lanes):
        """Its answers come every third time."""

        def finish(self) -> list[int | None]:
            found = super().finish()
            return found if len(self.batches) % 3 == 0 else [None] * len(found)

    engine = Waits(1)
    worker = worker_of(pipe, engine)
    worker._begin(order("slow", "pp", tokens=3))
    advance(worker, 5)
    assert engine.batches == [{1: 2}, {1: 0}, {1: 0}, {1: 1}, {1: 0}]
    assert worker._running["slow"].position == 3
    worker._cancel("slow")
    assert engine.positions == {}
    worker._begin(order("whole", tokens=2))
    advance(worker, 6)
    assert engine.positions == {}


class Counting(Lanes):
    """Its token at a position is the position's number and 100; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.given: list[tuple[int, ...]] = []

    def begin(self, steps: Sequence[Step]) -> None:
        self.given += [tuple(step.tokens) for step in steps]
        super().begin(steps)

    def finish(self) -> list[int | None]:
        steps = self.in_flight.popleft()
        return [100 + s.position + len(s.tokens) if s.sampling else None for s in steps]


@pytest.mark.parametrize("replays", [False, True])
def test_a_job_goes_on_after_its_history_as_a_prompt_or_as_it_was_made(
    pipe: socket.socket, replays: bool
) -> None:
    engine, told = Counting(), []
    worker = worker_of(pipe, engine)
    worker._event = lambda kind, body: told.append((kind, body))
    history = (102, 103, 104)
    worker._begin(dataclasses.replace(order("j", "pp", 6), history=history, replays=replays))
    advance(worker, 8)
    given = [(7, 7), (102,), (103,), (104,)] if replays else [(7, 7, 102, 103, 104)]
    assert engine.given == [*given, (105,), (106,)]
    tokens = [(body.index, body.tokens) for kind, body in told if kind == "tokens"]
    assert tokens == [(3, (105,)), (4, (106,)), (5, (107,))]
    assert [body.reason for kind, body in told if kind == "finished"] == ["length"]


@pytest.mark.parametrize("replays", [False, True])
def test_a_history_that_fills_the_context_is_all_of_the_answer(pipe: socket.socket, replays: bool) -> None:
    worker, told = worker_of(pipe, Counting()), []
    worker._context = 5
    worker._event = lambda kind, body: told.append((kind, body))
    worker._begin(dataclasses.replace(order("j", "pp"), history=(102, 103, 104), replays=replays))
    [(kind, body)] = told
    assert (kind, body.reason, body.error) == ("finished", "length", "")


def finished(worker: Worker) -> list[str]:
    """Errors of the jobs that ended, as the daemon would hear them."""
    told: list[str] = []
    worker._event = lambda kind, body: told.append(body.error) if kind == "finished" else None
    return told


class Swapping(Lanes):
    """Beside its model it has adapters; which sequence has which."""

    def __init__(self) -> None:
        super().__init__(1)
        self.beside: dict[int, str] = {}
        self.of: dict[int, int] = {}
        self.forgotten: list[int] = []

    def open(self, sequence: int, prompt: Sequence[int], positions: int, adapter: int = 0) -> int | None:
        self.of[sequence] = adapter
        return super().open(sequence, prompt, positions)

    def adapt(self, adapter: int, path: str) -> None:
        self.beside[adapter] = path

    def forget(self, adapter: int) -> None:
        self.forgotten.append(adapter)

    def undo(self, adapter: int) -> None:
        del self.beside[adapter]


def adapt(worker: Worker, **changes: Any) -> None:
    body = {"number": 0, "path": "", "forgets": (), "undoes": 0} | changes
    worker._handle(wire.Message("adapt", body))


def test_each_job_runs_with_its_own_adapter(pipe: socket.socket) -> None:
    engine = Swapping()
    worker = worker_of(pipe, engine)
    told = finished(worker)
    adapt(worker, number=3, path="a")
    adapt(worker, number=4, path="b")
    for job, adapter in (("x", 3), ("y", 0), ("z", 4)):
        worker._begin(dataclasses.replace(order(job), adapter=adapter))
    adapt(worker, number=2, path="c")
    with pytest.raises(PolicyViolation, match="no job waits for; 4 came"):
        adapt(worker, forgets=(2, 4))  # of both, or neither
    assert engine.forgotten == []
    adapt(worker, undoes=2)
    advance(worker, 2)
    assert engine.of == {1: 3, 2: 0, 3: 4}
    adapt(worker, forgets=(4,), undoes=3)
    assert engine.forgotten == [4]
    assert engine.beside == {4: "b"}  # the engine's own business, while a sequence runs with it
    for adapter in (3, 4, 5):
        worker._begin(dataclasses.replace(order(f"late{adapter}"), adapter=adapter))
    assert len(told) == 3
    assert all("expected an adapter that was loaded before" in error for error in told)


def test_an_engine_that_takes_no_adapter_beside_its_model_says_so(pipe: socket.socket) -> None:
    with pytest.raises(ProtocolError, match="an engine that takes adapters"):
        adapt(worker_of(pipe, Lanes(1)), number=1, path="a")


@pytest.mark.parametrize("listens", [True, False], ids=["a server", "a member"])
def test_a_trainer_hears_who_was_away_when_an_epoch_began_if_it_wants_to(
    pipe: socket.socket, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    left: list[int] = []
    trainer = SimpleNamespace(run=lambda step, report, is_stopped: left.append(-1))
    if listens:
        trainer.left = lambda rank, reason: left.append(rank)
    worker = Worker(pipe)
    worker._trainer, worker._reports = trainer, SimpleNamespace(begin=lambda step: [])
    worker._train(wire.Train("g", "j", 2, 0, 0, (1, 3)))
    assert left == ([1, 3, -1] if listens else [-1])
