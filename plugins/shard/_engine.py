"""The engine: one rank of a plan, loaded. `load` is what the worker calls.

Rank 0 drives: `step` tells every rank what to run, computes its own part, gathers what sampling
needs from the last stage, and draws. The others `follow`. Ranks of one stage sum their partials so
that all hold bit-identical hidden states (`_reduce`); stages hand hidden states on in float32. Token
ids travel, embeddings do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edged import Channel, EngineError, EngineSpec, ProtocolError, Sampling, Step

from .._sampling import KEEP_ALL, are_of, best, choose, keep_of, kept
from .._tokenizer import Tokenizer
from . import Settings, _ggml
from ._graph import Graph
from ._layers import Shard
from ._messages import Entry, Mailbox, Work, read_work, send_work
from ._model import read_model
from ._place import find_place
from ._reduce import join
from ._sequences import Sequences
from ._weights import Limit, Weights

Candidates = tuple[np.ndarray, np.ndarray]  # ids, logits


def load(spec: EngineSpec, channel: Channel) -> ShardEngine:
    """Load the role of `spec`: check the plan against the file, copy this rank's weights."""
    return ShardEngine(spec, channel)


class ShardEngine:
    """edged's `Engine` over ggml. Beyond the protocol: `logits`, `memory_bytes`, `hidden`."""

    def __init__(self, spec: EngineSpec, channel: Channel) -> None:
        settings = Settings.read(spec.settings)
        model = read_model(spec.model_path)
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
        self._lib, self._channel, self._settings = lib, channel, settings
        self._model, self._place = model, place
        self._mailbox = Mailbox(channel, settings.timeout_s)
        if len(place.group) > 1:
            self._reduce = join(lib, channel, spec, place, settings)
        self._tokenizer: Tokenizer | None = None
        limit = Limit(spec.weights_bytes, spec.cache_folder) if spec.weights_bytes else None
        self._weights = Weights(lib, model, place, exact, limit)
        self._backend = lib.backend_cpu_init()
        lib.backend_cpu_set_n_threads(self._backend, spec.threads)
        factors = model.rope_factors(spec.context_tokens) if model.rope else None
        shard = Shard(lib, self._backend, model, place, self._weights, exact, factors)
        self._sequences = Sequences(shard, spec.context_tokens, settings.sequences_max)
        self.hidden: np.ndarray | None = None  # the last batch's, valid until the next
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

    def step(self, steps: Sequence[Step]) -> list[int | None]:
        """Run each step's tokens; the next token of each that has a sampling."""
        found = iter(self._drive(steps, [keep_of(s.sampling, self._model.vocab) for s in steps]))
        return [None if s.sampling is None else _choose(next(found), s, s.sampling) for s in steps]

    def logits(self, step: Step) -> np.ndarray:
        """Run one step; all logits of its last token, (vocabulary) float32."""
        ((ids, values),) = self._drive([step], [KEEP_ALL])
        assert len(ids) == self._model.vocab
        return values

    def release(self, sequence: int) -> None:
        """Forget `sequence` on every rank and give its memory back."""
        if self._place.rank != 0:
            raise EngineError("rank 0 releases sequences")
        for rank in range(1, self._place.size):
            self._channel.send(rank, {"k": "release", "s": sequence})
        self._sequences.release(sequence)

    def _drive(self, steps: Sequence[Step], keeps: Sequence[int]) -> list[Candidates]:
        """Candidates of every step that keeps any, over the whole vocabulary."""
        if self._place.rank != 0:
            raise EngineError("rank 0 drives; other ranks follow")
        if not steps:
            return []
        work = self._plan(steps, keeps)
        send_work(self._channel, work, self._place.first_stage)
        mine = self._execute(work)
        return self._gather(work, mine)

    def _plan(self, steps: Sequence[Step], keeps: Sequence[int]) -> Work:
        """The steps as work, each checked, so that a bad one fails here before any rank computes."""
        if len({s.sequence for s in steps}) != len(steps):
            raise EngineError("a step runs each sequence once")
        for s in steps:
            self._sequences.check(s.sequence, s.position, len(s.tokens))
        tokens = np.array([t for s in steps for t in s.tokens], dtype=np.int64)
        if tokens.min() < 0 or tokens.max() >= self._model.vocab:
            raise EngineError(f"expected token ids below {self._model.vocab}")
        entries = tuple(
            Entry(s.sequence, s.position, len(s.tokens), keep) for s, keep in zip(steps, keeps, strict=True)
        )
        return Work(entries, tokens.astype(np.int32))

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
            if not are_of(ids, start, end):
                raise ProtocolError(f"expected token ids {start} to {end} of rank {rank}")
            cuts = np.cumsum(sizes)[:-1]
            by_rank.append(list(zip(np.split(ids, cuts), np.split(values, cuts), strict=True)))
        return [
            (np.concatenate([ids for ids, _ in parts]), np.concatenate([values for _, values in parts]))
            for parts in zip(*by_rank, strict=True)
        ]

    # --- every rank ------------------------------------------------------------------------------

    def follow(self, timeout_s: float) -> None:
        """Serve one message of rank 0; returns without one when none came within `timeout_s`."""
        if not self._channel.poll(0, timeout_s):
            return
        header, frames = self._channel.receive(0, self._settings.timeout_s)
        if header.get("k") == "release":
            self._sequences.release(_sequence_of(header))
            return
        if header.get("k") != "step":
            raise ProtocolError(f"expected step or release of rank 0, got {str(header.get('k'))[:32]!r}")
        work = read_work(header, frames, self._place.is_first, self._model.vocab)
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
        self._sequences.close()
        self._lib.backend_free(self._backend)
        self._weights.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

    @property
    def memory_bytes(self) -> int:
        """Bytes of this rank's copied weights."""
        return self._weights.bytes

    def _execute(self, work: Work) -> list[Candidates]:
        """Run this rank's part; on the last stage, its slice's candidates per entry that keeps."""
        if self._is_closed:
            raise EngineError("this engine is closed")
        found: list[Candidates] = []
        at = 0
        for entry in work.entries:
            sequence = self._sequences.get(entry.sequence)
            for offset, count, is_kept in entry.batches():
                position = entry.position + offset
                graph = sequence.graph(position, count, is_kept)
                self._run(graph, position, work, work.tokens[at + offset : at + offset + count])
                sequence.length = position + count
                if graph.logits is not None:
                    found.append(best(graph.logits, entry.keep, self._place.vocab[0]))
            at += entry.count
        return found

    def _run(self, graph: Graph, position: int, work: Work, tokens: np.ndarray) -> None:
        """One batch: take hidden states in, compute, hand them on."""
        given, place = tokens, self._place
        if not place.is_first:
            shapes = (("<f4", (graph.count, self._model.hidden)),)
            (given,) = self._mailbox.expect(place.source, "hidden", shapes, work.count)

        def reduce(partial: np.ndarray, hidden: np.ndarray) -> None:
            hidden += self._reduce(partial)

        graph.run(position, given, reduce)
        self.hidden = graph.hidden
        if place.targets:
            frame = graph.hidden.tobytes()
            for rank in place.targets:
                self._channel.send(rank, {"k": "hidden"}, [frame])


def _choose(candidates: Candidates, step: Step, sampling: Sampling) -> int:
    return choose(*candidates, sampling, step.position + len(step.tokens))


def _sequence_of(header: Mapping[str, object]) -> int:
    sequence = header.get("s")
    if type(sequence) is not int:
        raise ProtocolError("expected a release with a sequence")
    return sequence
