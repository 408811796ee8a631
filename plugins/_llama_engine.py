"""The engine over libllama: a whole model, several sequences in one `llama_batch`.

Sampling is not libllama's: the logits go through the rule the shard engine uses, so that a job draws
the same tokens wherever it runs. The context begins with room for one sequence and grows by copying
what the sequences hold when more come at once, up to what the plan counts.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Mapping, Sequence

import llama_cpp
import numpy as np

from edged import Channel, EngineError, EngineSpec, Step

from . import _libllama
from ._gguf import ggml_type
from ._llama_settings import SEQUENCES_MAX
from ._sampling import best, choose, keep_of
from ._tokenizer import Tokenizer

log = logging.getLogger(__name__)
BATCH_TOKENS = 512  # of one llama_decode: llama.cpp's own n_ubatch


def load(spec: EngineSpec, channel: Channel) -> LlamaEngine:
    """Load the whole model of `spec`; EngineError where the plan wants a part of it."""
    if len(spec.roles) != 1:
        raise EngineError(f"llama_cpp runs a model whole, on one node; a plan of {len(spec.roles)} came")
    return LlamaEngine(spec, _libllama.open_model(spec.model_path, n_gpu_layers=0))


class LlamaEngine:
    """edged's `Engine` over a loaded llama_model, which it owns."""

    def __init__(self, spec: EngineSpec, model: int) -> None:
        self._model: int | None = model
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        try:
            if spec.numerics != "fast":
                raise EngineError("llama_cpp computes in the file's own types; exact numerics need shard")
            most = int(spec.settings.get("sequences_max", SEQUENCES_MAX))
            self._text = Tokenizer(spec.model_path)
            adapter = _libllama.open_adapter(model, spec.adapter_path) if spec.adapter_path else None
            self._sequences = Sequences(model, spec, most, adapter)
        except BaseException:
            llama_cpp.llama_model_free(model)
            raise
        self._begun: deque[Sequence[Step]] = deque()
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._text.end_tokens

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        """Token ids of a prompt. `raw`: as it stands; otherwise through the model's chat template."""
        return self._text.encode(prompt, raw)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return self._text.decode(tokens)

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        """Admit a new sequence of at most `positions` tokens: 0, since all of the prompt is to be run;
        None while the cache has no room for it."""
        return 0 if self._sequences.reserve(sequence, positions) else None

    def lanes(self, sequences: int) -> int:
        """One: nothing waits for anything while libllama computes."""
        return 1

    def begin(self, steps: Sequence[Step]) -> None:
        """Hand a batch in; it is computed when it is finished."""
        self._begun.append(steps)

    def finish(self) -> list[int | None]:
        """The next token of each step of the oldest batch; None where it has no sampling."""
        steps = self._begun.popleft()
        self._check(steps)
        places = [self._sequences.place(step.sequence, step.position) for step in steps]
        found: dict[int, int] = {}  # by step, the token drawn
        rows = [
            (index, at, at == len(step.tokens) - 1)
            for index, step in enumerate(steps)
            for at in range(len(step.tokens))
        ]
        for start in range(0, len(rows), BATCH_TOKENS):
            self._run(steps, places, rows[start : start + BATCH_TOKENS], found)
        for step in steps:
            self._sequences.wrote(step.sequence, step.position + len(step.tokens))
        return [found.get(index) for index in range(len(steps))]

    def release(self, sequence: int) -> None:
        self._sequences.release(sequence)

    def follow(self, timeout_s: float) -> None:
        raise EngineError("a model that runs whole has no other ranks")

    def close(self) -> None:
        """Give all memory back; a second call does nothing."""
        if self._model is None:
            return
        llama_cpp.llama_batch_free(self._batch)
        self._sequences.close()
        self._text.close()
        llama_cpp.llama_model_free(self._model)
        self._model = None

    def _check(self, steps: Sequence[Step]) -> None:
        """libllama aborts or answers with a number where these do not hold."""
        if len({step.sequence for step in steps}) != len(steps):
            raise EngineError("expected each sequence once in a batch")
        for step in steps:
            if not step.tokens or not all(0 <= token < self._vocab for token in step.tokens):
                raise EngineError(f"expected one token or more, with ids below {self._vocab}")
            self._sequences.check(step.sequence, step.position, len(step.tokens))

    def _run(
        self,
        steps: Sequence[Step],
        places: Sequence[int],
        rows: Sequence[tuple[int, int, bool]],
        found: dict[int, int],
    ) -> None:
        """One llama_decode of `rows` (step, token of it, whether it is the last), and what it draws."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (index, at, is_last) in enumerate(rows):
            step = steps[index]
            batch.token[row] = step.tokens[at]
            batch.pos[row] = step.position + at
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = places[index]
            batch.logits[row] = is_last and step.sampling is not None
        context = self._sequences.context
        if code := llama_cpp.llama_decode(context, batch):
            raise EngineError(f"libllama could not run a batch of {len(rows)} tokens (code {code})")
        for row, (index, _, _) in enumerate(rows):
            sampling = steps[index].sampling
            if batch.logits[row] and sampling is not None:
                ids, values = best(self._logits(row), keep_of(sampling, self._vocab))
                end = steps[index].position + len(steps[index].tokens)
                found[index] = choose(ids, values, sampling, end)

    def _logits(self, row: int) -> np.ndarray:
        """A row's logits, (vocabulary) float32, uncopied: valid until the next batch."""
        found = llama_cpp.llama_get_logits_ith(self._sequences.context, row)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self._vocab,))


class Sequences:
    """The sequences a context holds: which place of libllama's each has, how long it is and may become.

    Cells of the KV cache belong to no sequence (`kv_unified`), so that the context can grow by copying:
    to twice the places, or twice the cells, whenever one more sequence asks for them. While it is copied
    both are held, the smaller beside the larger, which no plan counts; a new sequence for which that fails
    is refused, and those that run keep the smaller.
    """

    def __init__(self, model: int, spec: EngineSpec, most: int, adapter: int | None = None) -> None:
        """`adapter`: one of the model's, which every context runs with."""
        self._model, self._threads, self._max = model, spec.threads, most
        self._adapter = adapter
        self._cells_max = max(spec.context_tokens, spec.cache_tokens)
        self._cache_type = ggml_type(spec.cache_type)
        self._places: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._reserved: dict[int, int] = {}
        self._room, self._cells = 1, spec.context_tokens
        self.context = self._open(self._room, self._cells)

    def reserve(self, sequence: int, positions: int) -> bool:
        """Keep so many positions for a new sequence, in a larger context if need be; False while others
        hold them, or all places, or the memory to grow."""
        wanted = positions + sum(self._reserved.values())
        if len(self._reserved) >= self._max or wanted > self._cells_max:
            return False
        try:
            self._make_room(len(self._reserved) + 1, wanted)
        except EngineError as error:
            if not self._reserved:
                raise  # there is nothing to wait for
            log.warning("llama_cpp cannot grow its context", extra={"reason": str(error)})
            return False
        self._reserved[sequence] = positions
        return True

    def check(self, sequence: int, position: int, count: int) -> None:
        """EngineError unless `count` tokens can run from `position` of `sequence`."""
        most = self._reserved.get(sequence)
        if most is None:
            raise EngineError(f"expected sequence {sequence} to be opened before a step of it")
        length = self._lengths.get(sequence, 0)
        if not 0 <= position <= length:
            raise EngineError(
                f"sequence {sequence} holds {length} positions; tokens cannot start at {position}"
            )
        if position + count > most:
            raise EngineError(
                f"sequence {sequence} would have {position + count} tokens; it may have {most}",
                remedy="shorten the prompt or ask for a larger context",
            )

    def place(self, sequence: int, position: int) -> int:
        """libllama's number of a reserved sequence, cut to `position`; a new one gets a free place."""
        if sequence not in self._places:
            self._places[sequence] = self._free_place()
            self._lengths[sequence] = 0
        place = self._places[sequence]
        if position < self._lengths[sequence]:
            memory = llama_cpp.llama_get_memory(self.context)
            if not llama_cpp.llama_memory_seq_rm(memory, place, position, -1):
                raise EngineError("this architecture's state cannot go back to an earlier position")
            self._lengths[sequence] = position
        return place

    def wrote(self, sequence: int, length: int) -> None:
        self._lengths[sequence] = length

    def release(self, sequence: int) -> None:
        place = self._places.pop(sequence, None)
        self._lengths.pop(sequence, None)
        self._reserved.pop(sequence, None)
        if place is not None:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), place, -1, -1)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        self._places.clear()
        self._lengths.clear()
        self._reserved.clear()

    def _free_place(self) -> int:
        taken = set(self._places.values())
        return next(place for place in range(self._room) if place not in taken)

    def _make_room(self, sequences: int, positions: int) -> None:
        room, cells = self._room, self._cells
        while room < sequences:
            room = min(2 * room, self._max)
        while cells < positions:
            cells = min(2 * cells, self._cells_max)
        if (room, cells) != (self._room, self._cells):
            self._grow(room, cells)

    def _grow(self, room: int, cells: int) -> None:
        """A larger context, with what the sequences hold copied into it; EngineError leaves the smaller."""
        larger = self._open(room, cells)
        try:
            for place in self._places.values():
                _copy(self.context, larger, place)
        except BaseException:
            llama_cpp.llama_free(larger)
            raise
        smaller, self.context = self.context, larger
        self._room, self._cells = room, cells
        llama_cpp.llama_free(smaller)

    def _open(self, room: int, cells: int) -> int:
        context = _libllama.open_context(
            self._model,
            n_ctx=cells,
            n_seq_max=room,
            kv_unified=True,  # else a sequence's state fits only a context of as many sequences
            n_batch=BATCH_TOKENS,
            n_ubatch=BATCH_TOKENS,
            n_outputs_max=room,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
            type_k=self._cache_type,
            type_v=self._cache_type,
        )
        if self._adapter is not None:
            _libllama.apply_adapter(context, self._adapter)
        return context


def _copy(source: int, target: int, place: int) -> None:
    size = llama_cpp.llama_state_seq_get_size(source, place)
    state = (ctypes.c_uint8 * size)()
    taken = llama_cpp.llama_state_seq_get_data(source, state, size, place)
    if taken != size or not llama_cpp.llama_state_seq_set_data(target, state, size, place):
        raise EngineError("libllama could not move a sequence to a larger context")
