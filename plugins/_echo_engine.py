"""The echo engine: tokens are bytes, and the next token is the next byte of the prompt.

The end token follows the prompt's last byte; asked for more, the engine says the prompt again. Like
a real model's, its answer is a function of the tokens so far and of nothing else: `encode` ends a
prompt with the end token, as a chat template ends a turn, so a job that was cut short goes on
elsewhere with the same bytes. Tokens that no `encode` made are taken whole as the prompt.
"""

from __future__ import annotations

import timeit
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edged import Channel, EngineError, EngineSpec, EngineSpeed, ModelDescription, Step

END = 0
FIRST_LINE = "edged-echo 1"
ANSWER_TIMEOUT_S = 10.0  # for a message of a few bytes, on the slowest link
_LAYERS, _HIDDEN, _FFN, _VOCAB = 6, 48, 96, 256
_LAYER_BYTES = 4 * _HIDDEN * _HIDDEN + 3 * _HIDDEN * _FFN  # q, k, v, o and gate, up, down; a byte each
_VOCAB_BYTES = _VOCAB * _HIDDEN


def describe(path: str) -> dict[str, Any]:
    """The model in `path`, a text file; EngineError when its first line is not `edged-echo 1`."""
    with Path(path).open("rb") as file:
        first = file.readline(len(FIRST_LINE) + 2).rstrip(b"\r\n")
    if first != FIRST_LINE.encode():
        raise EngineError(f"expected a file whose first line is {FIRST_LINE!r}", remedy="name an echo model")
    model = ModelDescription(
        architecture="echo",
        parameters=_LAYERS * _LAYER_BYTES + 2 * _VOCAB_BYTES,
        layers=_LAYERS,
        hidden=_HIDDEN,
        heads=6,
        kv_heads=6,
        head_dim=_HIDDEN // 6,
        ffn=_FFN,
        vocab=_VOCAB,
        head_unit=1,
        ffn_unit=1,
        vocab_unit=1,
        context_tokens=4096,
        weight_type="u8",
        layer_bytes=(_LAYER_BYTES,) * _LAYERS,
        embedding_bytes=_VOCAB_BYTES,
        head_bytes=_VOCAB_BYTES,
    )
    return asdict(model)


def measure(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bytes copied and numbers added a second: what an engine that only moves bytes can do."""
    block = bytearray(1_000_000)
    copying = min(timeit.repeat(lambda: bytes(block), number=1))  # the shortest: nothing else ran
    adding = min(timeit.repeat(lambda: sum(range(100_000)), number=1))
    return [asdict(EngineSpeed("echo", "u8", 1_000_000 / copying, 100_000 / adding))]


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An engine that computes nothing is never wrong."""
    return {"version": "1", "max_error": 0.0}


class EchoEngine:
    """Any number of ranks: rank 0 echoes, and hears each step's tokens back from every follower."""

    def __init__(self, spec: EngineSpec, channel: Channel) -> None:
        self.end_tokens = frozenset({END})
        self._context = spec.context_tokens
        self._channel = channel
        self._tokens: dict[int, bytearray] = {}  # by sequence, what a real engine has in its KV cache
        self._begun: deque[Sequence[Step]] = deque()
        self._prompts: dict[int, int] = {}  # by sequence, the prompt's length

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        return [*text.encode().replace(bytes([END]), b""), END]

    def decode(self, tokens: Sequence[int]) -> bytes:
        return bytes(token for token in tokens if token != END)

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        return 0

    def lanes(self, sequences: int) -> int:
        return 1

    def begin(self, steps: Sequence[Step]) -> None:
        self._begun.append(steps)

    def finish(self) -> list[int | None]:
        steps = self._begun.popleft()
        for follower in range(1, self._channel.size):
            self._ask(follower, b"".join(bytes(step.tokens) for step in steps))
        return [self._next(step) for step in steps]

    def release(self, sequence: int) -> None:
        self._tokens.pop(sequence, None)
        self._prompts.pop(sequence, None)

    def follow(self, timeout_s: float) -> None:
        header, frames = self._channel.receive(0, timeout_s)
        self._channel.send(0, header, frames)

    def close(self) -> None:
        self._tokens.clear()

    def _ask(self, follower: int, tokens: bytes) -> None:
        self._channel.send(follower, {"bytes": len(tokens)}, [tokens])
        _, frames = self._channel.receive(follower, ANSWER_TIMEOUT_S)
        if b"".join(frames) != tokens:
            raise EngineError(f"expected rank {follower} to answer with the {len(tokens)} bytes it was sent")

    def _next(self, step: Step) -> int | None:
        tokens = self._tokens.setdefault(step.sequence, bytearray())
        if not 0 <= step.position <= len(tokens):
            raise EngineError(f"expected position 0 to {len(tokens)}; {step.position} came")
        if step.position + len(step.tokens) > self._context:
            raise EngineError(f"expected at most {self._context} tokens of context; more came")
        if step.position < self._prompts.get(step.sequence, 0):
            del self._prompts[step.sequence]  # another prompt with the same beginning
        tokens[step.position :] = bytes(step.tokens)
        if step.sampling is None:
            return None
        whole = tokens.index(END) if END in tokens else len(tokens)
        prompt = self._prompts.setdefault(step.sequence, whole)
        said = len(tokens) - prompt - (tokens[prompt : prompt + 1] == bytes([END]))
        answer: list[int] = [*tokens[:prompt], END]
        return answer[said % (prompt + 1)]
