"""The engine: one rank of a plan, loaded. `load` is what the worker calls.

Rank 0 drives: `begin` tells every rank what to run and computes its own part, `finish` gathers what
sampling needs from the last stage, and draws. Between the two it may begin other batches, so that
every stage has one to work on. The others `follow`. Ranks of one stage sum their partials so that
all hold bit-identical hidden states (`_reduce`); stages hand hidden states on in float32. Token ids
travel, embeddings do not.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edged import Channel, Computed, EngineError, EngineSpec, ProtocolError, Sampling, Step

from .._gguf import ggml_type
from .._sampling import KEEP_ALL, are_of, best, choose, keep_of, kept
from .._tokenizer import Tokenizer
from . import Settings, _ggml, _pace
from ._adapter import Adapter
from ._adapters import FIRST, Adapters
from ._admission import Admission
from ._cache import BUCKET, Cache, round_up
from ._graph import Graph, Graphs, Times
from ._layers import Shard, Span
from ._messages import (
    BATCH_TOKENS,
    Batch,
    Entry,
    Mailbox,
    Work,
    read_adapt,
    read_forget,
    read_fork,
    read_release,
    read_work,
    send_work,
)
from ._model import read_model
from ._place import find_place
from ._reduce import join
from ._sequences import Sequences
from ._weights import Limit, Weights

Candidates = tuple[np.ndarray, np.ndarray]  # ids, logits
TIMED_EACH = 8  # of so many single tokens one, in the thread's own time as well: 0.6 us for each segment
SLOW_DISK_BYTES_S = 20e6  # an SD card's: a rank that reads its weights again for each token is alive


@dataclass(slots=True)
class Flight:
    """A batch that rank 0 has begun, and this rank's part of the answer."""

    steps: Sequence[Step]
    work: Work
    mine: list[Candidates]


def load(spec: EngineSpec, channel: Channel) -> ShardEngine:
    """Load the role of `spec`: check the plan against the file, copy this rank's weights."""
    return ShardEngine(spec, channel)


class ShardEngine:
    """edged's `Engine` over ggml. Beyond the protocol: `logits`, `memory_bytes`, `hidden`."""

    def __init__(self, spec: EngineSpec, channel: Channel) -> None:
        model = read_model(spec.model_path)
        settings = Settings.read(spec.settings)
        reading_s = sum(tensor.bytes for tensor in model.head.tensors.values()) / SLOW_DISK_BYTES_S
        settings = dataclasses.replace(settings, timeout_s=settings.timeout_s + reading_s)
        if channel.size != len(spec.roles) or channel.rank != spec.rank:
            raise EngineError(
                f"expected a channel of rank {spec.rank} among {len(spec.roles)}, "
                f"got rank {channel.rank} among {channel.size}"
            )
        if spec.context_tokens < 1 or spec.threads < 1:
            raise EngineError("expected a context and threads of at least 1")
        if "position_embd" in model.architecture.embedding and spec.context_tokens > model.context_tokens:
            raise EngineError(
                f"expected a context of at most {model.context_tokens}, for which this model learned "
                f"positions; got {spec.context_tokens}"
            )
        place = find_place(model, spec.roles, spec.rank)
        lib = _ggml.load()
        exact = spec.numerics == "exact"
        cache_type = ggml_type("f32" if exact else spec.cache_type)
        if model.head_dim % lib.blck_size(cache_type):
            raise EngineError(
                f"a KV cache in {spec.cache_type} needs heads of whole blocks; they have {model.head_dim}",
                remedy='use cache_type = "f16"',
            )
        self._lib, self._channel, self._settings = lib, channel, settings
        self._model, self._place = model, place
        self._mailbox = Mailbox(channel, settings.timeout_s)
        if len(place.group) > 1:
            self._reduce = join(lib, channel, spec, place, settings)
        self._tokenizer: Tokenizer | None = None
        self._context_tokens = spec.context_tokens
        limit = Limit(spec.weights_bytes, spec.cache_folder) if spec.weights_bytes else None
        self._weights = Weights(lib, model, place, exact, limit)

        def adapter_at(path: str) -> Adapter:
            return Adapter(lib, path, model, place, exact)

        first = adapter_at(spec.adapter_path) if spec.adapter_path else None
        self._backend = lib.backend_cpu_init()
        lib.backend_cpu_set_n_threads(self._backend, spec.threads)
        factors = model.rope_factors(spec.context_tokens) if model.rope else None
        self._shard = Shard(
            lib, self._backend, model, place, self._weights, exact, cache_type, factors, first
        )
        slots = settings.sequences_max + 1  # one more: a prefix is copied before its source goes
        layers = place.layers[1] - place.layers[0]
        row = self._shard.kv_heads * model.head_dim
        self._cache = Cache(lib, layers, row, slots, spec.context_tokens, cache_type)
        self._sequences = Sequences(self._cache, spec.context_tokens)
        self._adapters, self._leaving = Adapters(first, adapter_at, slots), set[int]()
        self._graphs = Graphs(self._shard, self._cache, self._adapters)
        positions = max(spec.context_tokens, spec.cache_tokens)
        self._admission = Admission(positions, settings.sequences_max)
        self._flights: deque[Flight] = deque()
        self._times: Mapping[int, float] = {}  # of a layer by rows, where rank 0 has stages to keep busy
        if place.rank == 0 and place.stages > 1:
            self._times = _pace.measure(self._shard, self._cache)
        self._lanes: dict[int, int] = {}  # by sequences; asked for before every batch
        self.computed, self._singles = Computed(), 0  # what was computed, and how many batches of one token
        self.hidden: np.ndarray | None = None  # the last batch's, which all ranks of a group agree on
        self._is_closed = False

    # --- text ------------------------------------------------------------------------------------

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._text.end_tokens if self._place.rank == 0 else frozenset()

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        """Token ids of a prompt. `raw`: as it stands; otherwise through the model's chat template."""
        return self._text.encode(prompt, raw)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return self._text.decode(tokens)

    @property
    def _text(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._model.head.path)
        return self._tokenizer

    # --- rank 0 ----------------------------------------------------------------------------------

    def open(self, sequence: int, prompt: Sequence[int], positions: int, adapter: int = FIRST) -> int | None:
        """Admit `sequence`, which will hold at most `positions` and runs with an adapter. How many leading
        tokens of `prompt` it holds already, because another sequence computed them; None while there is no
        room for it."""
        self._check_drives()
        if adapter not in self._adapters or adapter in self._leaving:
            raise EngineError(f"there is no adapter {adapter} here", remedy="run it again")
        opening = self._admission.open(sequence, prompt, min(positions, self._context_tokens), adapter)
        if opening is None:
            return None
        for evicted in opening.evicted:
            self._drop(evicted)
        if opening.shared:
            self._tell({"k": "fork", "s": sequence, "f": opening.source, "n": opening.shared})
            self._sequences.fork(opening.source, sequence, opening.shared)
        if opening.evict_source:
            self._drop(opening.source)
        if adapter != FIRST:
            self._tell({"k": "adapt", "s": sequence, "a": adapter})
            self._adapters.assign(sequence, adapter)
        return opening.shared

    def _open_unasked(self, sequence: int) -> None:
        """A sequence that nobody opened may fill the context."""
        if self.open(sequence, (), self._context_tokens) is None:
            raise EngineError("there is no room for another sequence", remedy="run fewer at a time")

    def lanes(self, sequences: int) -> int:
        """Into how many batches to divide so many decoding sequences: one for a lone stage, and where
        rank 0 is in a later one, which would wait for its own messages."""
        if not self._place.is_first:
            return 1
        if sequences not in self._lanes:
            self._lanes[sequences] = _pace.lanes(sequences, self._place.stages, self._times)
        return self._lanes[sequences]

    def begin(self, steps: Sequence[Step]) -> None:
        """Hand a batch to the ranks; `finish` answers it. In the meantime others may be begun."""
        self._check_drives()
        if not steps:
            raise EngineError("expected a step to run")
        # With more than one stage also a prompt's piece is answered, so that the last stage is never
        # far behind what was begun.
        least = 1 if self._place.stages > 1 else 0
        self._begin(steps, [keep_of(s.sampling, self._model.vocab) or least for s in steps])

    def finish(self) -> list[int | None]:
        """The next token of each step of the oldest batch; None for those without a sampling."""
        flight, found = self._finish()
        kept = iter(found)
        tokens: list[int | None] = []
        for step, entry in zip(flight.steps, flight.work.entries, strict=True):
            candidates = next(kept) if entry.keep else None
            is_drawn = candidates is not None and step.sampling is not None
            tokens.append(_choose(candidates, step, step.sampling) if is_drawn else None)
        return tokens

    def step(self, steps: Sequence[Step]) -> list[int | None]:
        """`begin` and `finish` at once."""
        self.begin(steps)
        return self.finish()

    def logits(self, step: Step) -> np.ndarray:
        """Run one step; all logits of its last token, (vocabulary) float32."""
        self._check_drives()
        self._begin([step], [KEEP_ALL])
        _, ((ids, values),) = self._finish()
        assert len(ids) == self._model.vocab
        return values

    def release(self, sequence: int) -> None:
        """`sequence` is over. Its memory is free; its prompt's rows stay until somebody needs that."""
        self._check_drives()
        if self._adapters.of(sequence) in self._leaving or not self._admission.finish(sequence):
            self._admission.remove(sequence)
            self._drop(sequence)
            self._let_go()

    def forget(self, adapter: int) -> None:
        """Give an adapter's memory back on every rank, once the last sequence that runs with it is over; no
        new one may. EngineError where there is no such."""
        self._check_drives()
        if adapter == FIRST or adapter not in self._adapters:
            raise EngineError(f"there is no adapter {adapter} to forget")
        self._leaving.add(adapter)
        for sequence in self._admission.forget(adapter):
            self._drop(sequence)
        self._let_go()

    def _let_go(self) -> None:
        for adapter in self._adapters.idle(self._leaving):
            self._leaving.discard(adapter)
            self._tell({"k": "forget", "a": adapter})
            self._remove(adapter)

    def _check_drives(self) -> None:
        if self._place.rank != 0:
            raise EngineError("rank 0 drives; other ranks follow")

    def _tell(self, header: Mapping[str, object]) -> None:
        for rank in range(1, self._place.size):
            self._channel.send(rank, header)

    def _drop(self, sequence: int) -> None:
        """Forget `sequence` on every rank and give its memory back."""
        self._tell({"k": "release", "s": sequence})
        self._release(sequence)

    def _release(self, sequence: int) -> None:
        self._adapters.release(sequence)
        slot = self._sequences.release(sequence)
        if slot is not None:
            self._graphs.forget(slot)

    def _begin(self, steps: Sequence[Step], keeps: Sequence[int]) -> None:
        if self._flights and not self._place.is_first:
            raise EngineError("rank 0 of a later stage runs one batch at a time")
        work = self._plan(steps, keeps)
        send_work(self._channel, work, self._place.first_stage)
        self._flights.append(Flight(steps, work, self._execute(work)))

    def _finish(self) -> tuple[Flight, list[Candidates]]:
        """The oldest batch, and the candidates of its steps that keep any, over the vocabulary."""
        if not self._flights:
            raise EngineError("no batch was begun")
        flight = self._flights.popleft()
        return flight, self._gather(flight.work, flight.mine)

    def _plan(self, steps: Sequence[Step], keeps: Sequence[int]) -> Work:
        """The steps as work, each checked, so that a bad one fails here before any rank computes."""
        if len({s.sequence for s in steps}) != len(steps):
            raise EngineError("a step runs each sequence once")
        for s in steps:
            self._sequences.check(s.sequence, s.position, len(s.tokens))
        tokens = np.array([t for s in steps for t in s.tokens], dtype=np.int64)
        if tokens.min() < 0 or tokens.max() >= self._model.vocab:
            raise EngineError(f"expected token ids below {self._model.vocab}")
        for s in steps:
            if not self._admission.has(s.sequence):
                self._open_unasked(s.sequence)
            self._admission.note(s.sequence, s.position, s.tokens)
        entries = tuple(
            Entry(s.sequence, s.position, len(s.tokens), keep) for s, keep in zip(steps, keeps, strict=True)
        )
        longest = max(entry.count for entry in entries)
        rows = BATCH_TOKENS
        if self._place.stages > 1 and longest > 1:
            rows = _pace.batch_tokens(longest, self._place.stages, self._times)
        return Work(entries, tokens.astype(np.int32), rows)

    def _gather(self, work: Work, mine: list[Candidates]) -> list[Candidates]:
        """Each entry's candidates, joined over the ranks of the last stage."""
        keeps = [e.keep for e in work.entries if e.keep]
        if not keeps:
            return []
        by_rank = []
        for rank, (start, end) in zip(self._place.final, self._place.vocabs, strict=True):
            if rank == self._place.rank:
                by_rank.append(mine)
                continue
            sizes = [kept(keep, end - start) for keep in keeps]
            shapes = (("<i4", (sum(sizes),)), ("<f4", (sum(sizes),)))
            ids, values = self._mailbox.expect(rank, "result", shapes, work.count)
            cuts = np.cumsum(sizes)[:-1]
            found = list(zip(np.split(ids, cuts), np.split(values, cuts), strict=True))
            if not all(are_of(own, keep, start, end) for (own, _), keep in zip(found, keeps, strict=True)):
                raise ProtocolError(f"expected token ids {start} to {end} of rank {rank}")
            by_rank.append(found)
        return [
            (np.concatenate([ids for ids, _ in parts]), np.concatenate([values for _, values in parts]))
            for parts in zip(*by_rank, strict=True)
        ]

    # --- every rank ------------------------------------------------------------------------------

    def adapt(self, adapter: int, path: str) -> None:
        """Load an adapter beside the weights, of which it takes none. EngineError where it does not fit."""
        self._adapters.add(adapter, path)

    def undo(self, adapter: int) -> None:
        """Give back, on this rank alone, an adapter that no sequence was given."""
        if adapter == FIRST or adapter not in self._adapters or not self._adapters.idle([adapter]):
            raise EngineError(f"there is no unused adapter {adapter}")
        self._remove(adapter)

    def _remove(self, adapter: int) -> None:
        self._graphs.drop_prompt()
        self._graphs.forget_adapter(adapter)
        self._adapters.remove(adapter)

    def follow(self, timeout_s: float) -> None:
        """Serve one message of rank 0; returns without one when none came within `timeout_s`."""
        if not self._channel.poll(0, timeout_s):
            return
        header, frames = self._channel.receive(0, self._settings.timeout_s)
        match header.get("k"):
            case "release":
                self._release(read_release(header))
            case "adapt":
                self._follow_adapt(*read_adapt(header))
            case "forget":
                self._follow_forget(read_forget(header))
            case "fork":
                self._sequences.fork(*read_fork(header))
            case "step":
                self._follow_step(read_work(header, frames, self._place.is_first, self._model.vocab))
            case other:
                raise ProtocolError(f"expected a message of rank 0, got {str(other)[:32]!r}")

    def _follow_adapt(self, sequence: int, adapter: int) -> None:
        try:
            self._adapters.assign(sequence, adapter)
        except EngineError as error:
            raise ProtocolError(f"expected an adapter that is here; {error}") from error

    def _follow_forget(self, adapter: int) -> None:
        if adapter not in self._adapters or not self._adapters.idle([adapter]):
            raise ProtocolError(f"expected an adapter that nothing runs with; {adapter} came")
        self._remove(adapter)

    def _follow_step(self, work: Work) -> None:
        if len({entry.sequence for entry in work.entries}) != len(work.entries):
            raise ProtocolError("expected each sequence of a step once")
        for entry in work.entries:
            self._sequences.check(entry.sequence, entry.position, entry.count)
        found = self._execute(work)
        if found:
            ids, values = (np.concatenate(column) for column in zip(*found, strict=True))
            self._channel.send(0, {"k": "result"}, [ids.tobytes(), values.tobytes()])

    def close(self) -> None:
        """Give all memory back. Other ranks are not told: the supervisor ends a group."""
        if self._is_closed:
            return
        self._is_closed = True
        self.hidden = None
        self._graphs.close()
        self._sequences.close()
        self._lib.backend_free(self._backend)
        self._weights.close()
        self._adapters.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

    @property
    def memory_bytes(self) -> int:
        """Bytes of this rank's copied weights, and of its adapters'."""
        return self._weights.bytes + self._adapters.bytes

    def _execute(self, work: Work) -> list[Candidates]:
        """Run this rank's part; on the last stage, its slice's candidates per entry that keeps."""
        if self._is_closed:
            raise EngineError("this engine is closed")
        found: dict[int, Candidates] = {}
        for batch in work.batches(self._adapters.of):
            graph = self._run(batch, work)
            if graph.logits is None:
                continue
            kept = (piece.entry for piece in batch if piece.keeps)
            for entry, row in zip(kept, graph.logits, strict=True):
                found[entry] = best(row, work.entries[entry].keep, self._place.vocab[0])
        self._graphs.drop_prompt()
        return [found[entry] for entry in sorted(found)]

    def _run(self, batch: Batch, work: Work) -> Graph:
        """One batch: take hidden states in, compute, hand them on."""
        place, capacity = self._place, self._cache.capacity
        spans = []
        for piece in batch:
            end = piece.position + piece.count
            slot = self._sequences.advance(piece.sequence, piece.position, piece.count)
            kv_length = min(round_up(end, BUCKET), capacity)
            spans.append(Span(slot, piece.count, kv_length, piece.keeps and place.is_last))
        graph = self._graphs.get(tuple(spans), self._adapters.of(batch[0].sequence))
        if place.is_first:
            given = np.concatenate([work.tokens[p.offset : p.offset + p.count] for p in batch])
        else:
            shapes = (("<f4", (graph.count, self._model.hidden)),)
            (given,) = self._mailbox.expect(place.source, "hidden", shapes, work.count)

        def reduce(partial: np.ndarray, hidden: np.ndarray) -> None:
            hidden += self._reduce(partial)

        times = self._times_of(graph, work)
        graph.run([piece.position for piece in batch], given, reduce, times)
        self._count(times, batch[0].position)
        if len(place.group) > 1:
            self.hidden = graph.hidden.copy()
        if place.targets:
            frame = graph.hidden.tobytes()
            for rank in place.targets:
                self._channel.send(rank, {"k": "hidden"}, [frame])
        return graph

    def _times_of(self, graph: Graph, work: Work) -> Times:
        """Of a batch: of single tokens every so many one is looked at closely."""
        if graph.count != 1 or work.count != 1:
            return Times()
        self._singles += 1
        return Times(is_timed=self._singles % TIMED_EACH == 0)

    def _count(self, times: Times, position: int) -> None:
        done = self.computed
        if times.is_timed:
            self.computed = Computed(
                done.compute_s + times.clock_s,
                done.tokens + 1,
                done.token_s + times.clock_s,
                done.token_cpu_s + times.cpu_s,
                done.positions + position,
            )
        else:
            self.computed = dataclasses.replace(done, compute_s=done.compute_s + times.clock_s)


def _choose(candidates: Candidates, step: Step, sampling: Sampling) -> int:
    return choose(*candidates, sampling, step.position + len(step.tokens))
