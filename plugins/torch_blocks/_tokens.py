"""Text and messages to tokens, for training: with llama.cpp for a GGUF, with `tokenizers` otherwise.

Messages go through the model's chat template, rendered as for generation, so that what a model is trained on
is what it will be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

Messages = Sequence[Mapping[str, str]]


class Tokenizer(Protocol):
    """What a training asks of a model's vocabulary of `vocab` tokens. `end`: the token that ends a text;
    `sha256`: of the vocabulary and the chat template, hexadecimal."""

    end: int
    vocab: int
    sha256: str

    def chat(self, messages: Messages, *, answers: bool) -> list[int]:
        """Tokens of a conversation by the model's chat template. Without `answers` they end where the
        assistant's answer begins; with, the last message is the answer, ended as the template ends it."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with what the model has at the beginning of a text (BOS)."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class LlamaTokenizer:
    """The vocabulary of a GGUF, llama.cpp's own. Without a chat template messages are joined by newlines."""

    def __init__(self, path: str, has_template: bool, sha256: str) -> None:
        from .._tokenizer import Tokenizer as Vocabulary  # a rank without text needs no llama.cpp

        self._vocabulary = Vocabulary(path)
        self.sha256 = sha256
        self.vocab = self._vocabulary.count
        self.end = self._vocabulary.end
        self._has_template = has_template

    def chat(self, messages: Messages, *, answers: bool) -> list[int]:
        if not answers:
            return self._vocabulary.encode(list(messages), raw=False)
        if not self._has_template:
            before = self._vocabulary.encode(list(messages[:-1]), raw=False)
            return [*before, *self._vocabulary.spell("\n" + messages[-1].get("content", "")), self.end]
        return self._vocabulary.encode_finished(messages)

    def encode(self, text: str) -> list[int]:
        return self._vocabulary.encode(text, raw=True)

    def decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(list(ids)).decode("utf-8", "replace")
