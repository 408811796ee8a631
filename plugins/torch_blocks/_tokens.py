"""Text and messages to tokens, for training, by `tokenizers`; a GGUF's are in `_tensors.vocabulary`.

Messages go through the model's chat template, rendered as for generation, so that what a model is trained on
is what it will be asked.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2.ext
import jinja2.sandbox

from edged import EngineError

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

    def close(self) -> None: ...


class HubTokenizer:
    """The vocabulary of a packed safetensors file, by `tokenizers`. `texts`: those that `_packing` wrote."""

    def __init__(self, path: str, texts: Mapping[str, str]) -> None:
        if "tokenizer" not in texts:
            raise EngineError(f"{path} holds no tokenizer", remedy="pack the model's folder again, with it")
        self._texts = texts
        tokenizers = importlib.import_module("tokenizers")
        try:
            self._vocabulary = tokenizers.Tokenizer.from_str(texts["tokenizer"])
        except Exception as error:  # tokenizers raises nothing more special
            raise EngineError(f"{path}: expected a tokenizer that `tokenizers` reads; {error}") from error
        self._vocabulary.no_truncation()
        self._vocabulary.no_padding()
        self._template = _template(texts["chat_template"]) if "chat_template" in texts else None
        self.vocab: int = self._vocabulary.get_vocab_size()
        self.end = self._end(path)
        parts = [
            texts[name] for name in ("tokenizer", "chat_template", "eos_token", "bos_token") if name in texts
        ]
        self.sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def chat(self, messages: Messages, *, answers: bool) -> list[int]:
        if self._template is not None:
            return self._plain(self._render(messages, asks=not answers))
        asked = messages[:-1] if answers else messages
        before = self.encode("\n".join(message.get("content", "") for message in asked))
        if not answers:
            return before
        return [*before, *self._plain("\n" + messages[-1].get("content", "")), self.end]

    def encode(self, text: str) -> list[int]:
        return list(self._vocabulary.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._vocabulary.decode(list(ids), skip_special_tokens=True))

    def close(self) -> None:
        """Nothing is held."""

    def _plain(self, text: str) -> list[int]:
        return list(self._vocabulary.encode(text, add_special_tokens=False).ids)

    def _render(self, messages: Messages, asks: bool) -> str:
        try:
            return str(
                self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=asks,
                    bos_token=self._texts.get("bos_token", ""),
                    eos_token=self._texts.get("eos_token", ""),
                    raise_exception=_refuse,
                    strftime_now=lambda form: datetime.now().strftime(form),
                )
            )
        except Exception as error:  # a template is a program of the model's author
            raise EngineError(f"the model's chat template refuses these messages: {error}") from error

    def _end(self, path: str) -> int:
        named = self._vocabulary.token_to_id(self._texts.get("eos_token", ""))
        if named is not None:
            return int(named)
        try:
            found = json.loads(self._texts.get("config", "{}")).get("eos_token_id")
        except (ValueError, AttributeError):
            found = None
        found = found[0] if isinstance(found, list) and found else found
        if not isinstance(found, int):
            raise EngineError(
                f"{path}: expected a token that ends a text; neither eos_token nor config names one"
            )
        return found


class _Generation(jinja2.ext.Extension):
    """The tag with which transformers' templates mark an answer: what is inside stands as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template(text: str) -> Any:
    """A chat template, compiled as transformers does, in a sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    try:
        return environment.from_string(text)
    except Exception as error:  # a template is a program of the model's author
        raise EngineError(f"expected a chat template that Jinja reads; {error}") from error


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)
