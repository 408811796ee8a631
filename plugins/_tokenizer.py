"""Text to tokens and back, with llama.cpp's own vocabulary and the model's chat template.

Loaded on first use and on rank 0 only: llama_cpp reads the vocabulary and no weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from edged import EngineError

PIECE_BYTES = 256
SPECIAL = (
    llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
    | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
    | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
)  # tokens that a text is divided at before it is tokenised


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user: ctypes.c_void_p) -> None:
    """llama.cpp's log; errors reach us as return values."""


def silence() -> None:
    """Drop llama.cpp's log and, by the same call, ggml's; importing llama_cpp had turned both on."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())


class Tokenizer:
    """The vocabulary of the GGUF at `path`, `count` tokens. `end_tokens`: all that end a generation."""

    def __init__(self, path: str) -> None:
        silence()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise EngineError(f"llama.cpp cannot read the vocabulary of {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.count = llama_cpp.llama_vocab_n_tokens(self._vocab)
        is_end = llama_cpp.llama_vocab_is_eog
        self.end_tokens = frozenset(t for t in range(self.count) if is_end(self._vocab, t))
        self._formatter = self._make_formatter(asks=True)

    def close(self) -> None:
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = self._vocab = None

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        """`raw` prompts are tokenised as they stand, special tokens parsed, BOS as the model wants;
        others go through the chat template, a string being one message of the user."""
        if raw and not isinstance(prompt, str):
            raise EngineError("a raw prompt is a string, not messages")
        if isinstance(prompt, str):
            if raw or self._formatter is None:
                return self._tokenize(prompt, add_special=True)
            prompt = [{"role": "user", "content": prompt}]
        if self._formatter is None:
            return self._tokenize("\n".join(m.get("content", "") for m in prompt), add_special=True)
        return self._format(self._formatter, prompt)

    def encode_finished(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages of which the last is the answer, ended as the chat template ends it; EngineError where the
        model has none."""
        formatter = self._make_formatter(asks=False)
        if formatter is None:
            raise EngineError("expected a model with a chat template; this one has none")
        return self._format(formatter, messages)

    @property
    def end(self) -> int:
        """The token that ends a text by the model's setting."""
        found: int = llama_cpp.llama_vocab_eos(self._vocab)
        return found if found >= 0 else min(self.end_tokens, default=0)

    def _format(self, formatter: Jinja2ChatFormatter, prompt: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            messages: list[Any] = [dict(m) for m in prompt]
            formatted = formatter(messages=messages)
        except Exception as exc:  # a template is a program of the model's author
            raise EngineError(f"the model's chat template refuses these messages: {exc}") from exc
        return self._tokenize(formatted.prompt, add_special=not formatted.added_special)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._piece(token) for token in tokens)

    def spell(self, text: str) -> list[int]:
        """Tokens of ordinary text as it stands: nothing is added, and nothing in it is a special token."""
        return self._tokenize(text, add_special=False, parse_special=False)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that, tokenised as a raw prompt, gives these tokens: special ones written out, without
        the BOS and the spaces that tokenising adds. EngineError where they end within a character."""
        adds_bos = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        bos = llama_cpp.llama_vocab_bos(self._vocab) if adds_bos else None
        adds_space = self.decode(self.spell("a")) == b" a"
        pieces, is_start = [], True
        for token in tokens[1:] if tokens and tokens[0] == bos else tokens:
            piece = self._piece(token, special=True)
            is_special = bool(llama_cpp.llama_vocab_get_attr(self._vocab, token) & SPECIAL)
            is_added = adds_space and is_start and not is_special
            pieces.append(piece.removeprefix(b" ") if is_added else piece)
            is_start = is_special
        try:
            return b"".join(pieces).decode()
        except UnicodeDecodeError as error:
            raise EngineError("expected tokens of whole characters; they end within one") from error

    def _tokenize(self, text: str, add_special: bool, parse_special: bool = True) -> list[int]:
        encoded = text.encode()
        room = len(encoded) + 8
        for _ in range(2):
            found = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(
                self._vocab, encoded, len(encoded), found, room, add_special, parse_special
            )
            if count >= 0:
                return list(found[:count])
            room = -count
        raise EngineError("llama.cpp could not tokenise the prompt")

    def _piece(self, token: int, special: bool = False) -> bytes:
        if not 0 <= token < self.count:
            raise EngineError(f"expected token ids below {self.count}")
        room = PIECE_BYTES
        for _ in range(2):
            piece = ctypes.create_string_buffer(room)
            size = llama_cpp.llama_token_to_piece(self._vocab, token, piece, room, 0, special)
            if size >= 0:
                return piece.raw[:size]
            room = -size
        raise EngineError("llama.cpp could not spell a token")

    def _make_formatter(self, asks: bool) -> Jinja2ChatFormatter | None:
        """`asks`: what it makes of messages ends where the assistant's answer begins."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        if not template:
            return None
        ends = [
            self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
            for token in (llama_cpp.llama_vocab_eos(self._vocab), llama_cpp.llama_vocab_bos(self._vocab))
        ]
        return Jinja2ChatFormatter(
            template.decode(), eos_token=ends[0], bos_token=ends[1], add_generation_prompt=asks
        )
