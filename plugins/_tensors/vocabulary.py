"""Text and messages to tokens, for training, by the vocabulary of a GGUF.

Messages go through the model's chat template, rendered as for generation, so that what a model is trained on
is what it will be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._gguf import Head, section_sha256


class LlamaTokenizer:
    """The vocabulary of a GGUF, llama.cpp's own. Without a chat template messages are joined by newlines."""

    def __init__(self, head: Head) -> None:
        """`sha256`: of every key that says how text becomes tokens, the chat template too."""
        from .._tokenizer import Tokenizer as Vocabulary  # a rank without text needs no llama.cpp

        self._vocabulary = Vocabulary(head.path)
        self.sha256 = section_sha256(head.path, "tokenizer.")
        self.vocab = self._vocabulary.count
        self.end = self._vocabulary.end
        self._has_template = "tokenizer.chat_template" in head.keys

    def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
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

    def close(self) -> None:
        self._vocabulary.close()
