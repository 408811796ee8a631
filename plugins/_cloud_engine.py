"""The engine that has its tokens written elsewhere, by an OpenAI-compatible endpoint.

A sequence is one connection. Its prompt goes out as text, and the text that comes back becomes tokens of
the model's own vocabulary, so that whoever goes on with the job, here or on another node, has its history.
`finish` waits for a moment only: a slow sequence neither holds up the others nor a cancel.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edged import Channel, EdgedError, EngineError, EngineSpec, Step

from ._cloud_settings import address_of, read, read_key, seconds_of
from ._cloud_stream import End, News, Stream
from ._settling import Settling
from ._tokenizer import Tokenizer

END_S = 1.0  # for the threads of all closed streams together
WAIT_S = 0.05  # for the first token of a batch, before the worker looks at its daemon's requests


def load(spec: EngineSpec, channel: Channel) -> CloudEngine:
    """Speak for the model of `spec`; EngineError or ConfigError where the endpoint cannot be asked."""
    if len(spec.roles) != 1:
        raise EngineError(f"cloud runs on the submitting node alone; a plan of {len(spec.roles)} roles came")
    if spec.numerics != "fast":
        raise EngineError("nobody can check the numerics of an endpoint", remedy="drop --numerics")
    return CloudEngine(spec)


def describe(path: str) -> dict[str, Any]:
    """Nothing is stored under this engine: whether a model can run here or elsewhere, another says."""
    raise EngineError("cloud takes models that another engine describes", remedy="load shard or llama_cpp")


def measure(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nothing: the profile says what a token takes, until jobs do."""
    return []


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without asking the endpoint, which may cost."""
    return {"version": "1", "max_error": 0.0}


def ranges(spec: EngineSpec) -> list[tuple[int, int]]:
    """The file's head, which has the vocabulary and the chat template."""
    return [(0, min(tensor.offset for tensor in spec.model.tensors))]


@dataclass(slots=True)
class _Sequence:
    """A job here. `tokens`: all that the worker has shown; `ready`: settled and not given yet."""

    positions: int
    tokens: list[int] = field(default_factory=list)
    ready: deque[int] = field(default_factory=deque)
    stream: Stream | None = None
    settling: Settling | None = None
    heard_at: float = 0.0  # monotonic, when its last text came
    made: int = 0  # tokens of its stream
    reason: str = ""  # why the stream ended
    error: EdgedError | None = None  # or broke; what came before is good
    is_ended: bool = False  # and the end was given


class CloudEngine:
    """edged's `Engine` over an endpoint. `bytes_sent`: to it, before encryption."""

    def __init__(self, spec: EngineSpec) -> None:
        settings = read(spec.settings)
        if spec.model_name not in settings.models:
            raise EngineError(
                f"the profile names no model of the endpoint for {spec.model_name!r}",
                remedy="add it to plugin.cloud.models",
            )
        self._model = settings.models[spec.model_name]
        self._address, self._timeout_s = address_of(settings.endpoint), seconds_of(settings, "timeout")
        self._key = read_key(settings.key_file)
        self._text = Tokenizer(spec.model_path)
        self.end_tokens = self._text.end_tokens
        if not self.end_tokens:
            self._text.close()
            raise EngineError("this model's vocabulary has no token that ends an answer")
        self._sequences: dict[int, _Sequence] = {}
        self._owners: dict[Stream, _Sequence] = {}
        self._begun: deque[Sequence[Step]] = deque()
        self._news: queue.SimpleQueue[tuple[Stream, News]] = queue.SimpleQueue()
        self._bytes_earlier = 0  # by streams that are closed
        self._ending: list[Stream] = []  # closed, their threads perhaps not over

    @property
    def bytes_sent(self) -> int:
        """On any thread."""
        return self._bytes_earlier + sum(stream.bytes_sent for stream in list(self._owners))

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        """Token ids of a prompt. `raw`: as it stands; otherwise through the model's chat template."""
        return self._text.encode(prompt, raw)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return self._text.decode(tokens)

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        """Admit a new sequence of at most `positions` tokens: always. All of its prompt is to be shown."""
        self._sequences[sequence] = _Sequence(positions)
        return 0

    def lanes(self, sequences: int) -> int:
        """One: connections wait for themselves."""
        return 1

    def begin(self, steps: Sequence[Step]) -> None:
        self._begun.append(steps)

    def finish(self) -> list[int | None]:
        """The next token of each step of the oldest batch; None without a sampling, and where none is there
        yet: then a step without tokens asks again."""
        steps = self._begun.popleft()
        for step in steps:
            self._show(step)
        asked = [self._sequences[step.sequence] for step in steps if step.sampling is not None]
        self._listen(asked)
        return [None if step.sampling is None else self._next(step.sequence) for step in steps]

    def release(self, sequence: int) -> None:
        if (found := self._sequences.pop(sequence, None)) is not None:
            self._hang_up(found)

    def follow(self, timeout_s: float) -> None:
        raise EngineError("an endpoint has no other ranks")

    def close(self) -> None:
        """Hang up everywhere; a second call does nothing."""
        for sequence in list(self._sequences):
            self.release(sequence)
        deadline = time.monotonic() + END_S
        for stream in self._ending:
            stream.join(max(0.0, deadline - time.monotonic()))
        self._text.close()

    # --- asking ---

    def _show(self, step: Step) -> None:
        """Take a step's tokens, and ask for what follows them where nothing is on its way."""
        found = self._sequences.get(step.sequence)
        if found is None or step.position != len(found.tokens):
            raise EngineError(f"expected a step at the end of an open sequence; one of {step.sequence} came")
        found.tokens += step.tokens
        if step.sampling is None or found.ready or found.reason == "stop" or found.error:
            return
        if found.reason == "length" and not found.made:
            raise EngineError("the endpoint ends its answer before the first word; run it elsewhere")
        if found.stream is None or found.reason == "length":  # the endpoint's limit, and ours is higher
            self._ask(found, step)

    def _ask(self, found: _Sequence, step: Step) -> None:
        assert step.sampling is not None
        self._hang_up(found)
        request = {
            "model": self._model,
            "prompt": self._text.text_of(found.tokens),
            "max_tokens": max(1, found.positions - len(found.tokens)),
            "temperature": step.sampling.temperature,
            "top_p": step.sampling.top_p,
            "seed": step.sampling.seed,
        }
        found.stream = Stream(self._address, self._key, request, self._news, self._timeout_s)
        found.settling, found.heard_at = Settling(self._text), time.monotonic()
        found.made, found.reason = 0, ""
        self._owners[found.stream] = found

    def _hang_up(self, found: _Sequence) -> None:
        if found.stream is not None:
            found.stream.close()
            self._ending = [*(each for each in self._ending if each.is_alive), found.stream]
            del self._owners[found.stream]
            self._bytes_earlier += found.stream.bytes_sent
            found.stream = None

    # --- hearing ---

    def _listen(self, asked: Sequence[_Sequence]) -> None:
        """Take what has come; where that is nothing for any of `asked`, wait for a moment."""
        until = time.monotonic() + WAIT_S
        while True:
            has_any = not asked or any(found.ready or found.reason or found.error for found in asked)
            try:
                stream, item = self._news.get(timeout=0 if has_any else max(0, until - time.monotonic()))
            except queue.Empty:
                break
            if (owner := self._owners.get(stream)) is not None:  # else it was released
                self._hear(owner, item)
        now = time.monotonic()
        for found in asked:
            is_waiting = not (found.ready or found.reason or found.error)
            if is_waiting and now - found.heard_at > self._timeout_s:
                raise EngineError(
                    f"expected a word of the endpoint within {self._timeout_s:g} s; none came; "
                    "run it elsewhere, or raise plugin.cloud.timeout"
                )

    def _hear(self, owner: _Sequence, item: News) -> None:
        assert owner.settling is not None
        if isinstance(item, EdgedError):
            owner.error = item
            return
        if isinstance(item, End):
            tokens, owner.reason = owner.settling.rest(), item.reason
        else:
            tokens, owner.heard_at = owner.settling.add(item), time.monotonic()
        owner.made += len(tokens)
        owner.ready.extend(tokens)

    def _next(self, sequence: int) -> int | None:
        found = self._sequences[sequence]
        if found.ready:
            return found.ready.popleft()
        if found.error is not None:
            raise found.error
        if found.reason != "stop":
            return None
        if found.is_ended:
            raise EngineError("the endpoint has ended its answer and says nothing more; drop --ignore-eos")
        found.is_ended = True
        return min(self.end_tokens)
