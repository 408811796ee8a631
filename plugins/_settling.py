"""Text that comes piece by piece, as tokens of a vocabulary.

How a word is cut into tokens depends on what follows it, so the tail is held back until it is settled: up to
a single space after a word, where vocabularies begin a new one. A text without such spaces (Chinese, say) is
settled but for its last tokens once it is long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from edged import EngineError

HELD_CHARS_MAX = 64  # more is settled even without a space
KEPT_TOKENS = 8  # of such a text, that what follows may still change
CHARACTER_BYTES_MAX = 4
ANCHORS = ("", "\n", "a")  # what a text is tokenised behind: some vocabularies put a space before a text
SETTLED = re.compile(r"(?<=\S) ")


class Vocabulary(Protocol):
    def decode(self, tokens: Sequence[int]) -> bytes: ...

    def spell(self, text: str) -> list[int]:
        """Tokens of ordinary text: nothing in it is read as a special token."""
        ...


class Settling:
    """One answer. Tokens given out decode to the text put in, in order and whole."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._held = ""

    def add(self, text: str) -> list[int]:
        """The tokens that are settled with this further text."""
        self._held += text
        cuts = [found.start() for found in SETTLED.finditer(self._held)]
        tokens: list[int] = []
        if cuts:
            tokens = self._tokens(self._held[: cuts[-1]])
            self._held = self._held[cuts[-1] :]
        return tokens + self._of_long() if len(self._held) > HELD_CHARS_MAX else tokens

    def rest(self) -> list[int]:
        """What was held back: the answer is over."""
        tokens, self._held = self._tokens(self._held), ""
        return tokens

    def _of_long(self) -> list[int]:
        """All but the last tokens of what is held, as far as they are whole characters."""
        tokens = self._tokens(self._held)
        for count in range(len(tokens) - KEPT_TOKENS, 0, -1):
            said = self._vocabulary.decode(tokens[:count])
            try:
                text = said.decode()
            except UnicodeDecodeError:
                if len(tokens) - KEPT_TOKENS - count >= CHARACTER_BYTES_MAX:
                    break
                continue
            self._held = self._held[len(text) :]
            return tokens[:count]
        return []

    def _tokens(self, text: str) -> list[int]:
        """Tokens whose text is this one to the byte."""
        for anchor in ANCHORS if text else ():
            before, all_ = self._vocabulary.spell(anchor), self._vocabulary.spell(anchor + text)
            after = all_[len(before) :]
            if all_[: len(before)] == before and self._vocabulary.decode(after) == text.encode():
                return after
        if not text:
            return []
        raise EngineError(
            "this model's vocabulary cannot spell what the endpoint said; "
            "see that plugin.cloud.models names the same model there"
        )
