"""Data rows: JSONL to token ids, and the batch of every step as a function of the step alone.

A file has one JSON object a line, in one of three forms. Where a row has keys of several, the first of
this list counts; keys that mean nothing here are left alone. Empty lines are skipped.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}      "input" may be missing or empty
    {"text": "..."}

Of preferences, which a training of them reads instead, a row is a prompt with a better and a worse answer:

    {"prompt": "...", "chosen": "...", "rejected": "..."}

Each may be a list of messages; without a prompt `chosen` and `rejected` begin with it (TRL's formats). Both
answer the same prompt: they differ in their last message alone. `"rehearsal": true` marks a row that is
mixed into the batches of a training that rehearses; elsewhere it says nothing.

`"split": "test"` keeps a row out of training, for evaluation; "train" is what a row is without it.

The format of instruction rows is Stanford Alpaca's, of messages OpenAI's. Needs numpy, never torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from edged import ConfigError

IGNORED = -100  # a label that is not in the loss: the number that torch's cross_entropy leaves out
ROW_BYTES_MOST = 4 << 20  # a long book is 2 MB; a file that is one endless line is read no further
LENGTH_MULTIPLE = 8  # of a batch, so that few different lengths occur
MERGED_TOKENS_MOST = 4  # that a prompt may end with and its answer begins otherwise
ROLES = ("system", "user", "assistant")
FORMS = "messages, or instruction and output, or text"
PAIR = "chosen and rejected, with a prompt"


class Tokenizer(Protocol):
    """What turns text into ids and back. `vocab`: how many ids there are; `end`: the one that ends a text."""

    vocab: int
    end: int

    def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
        """Through the model's chat template. Without `answers` up to where the answer begins; with it the
        last message is the answer, ended as the template ends it."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Row:
    """`number`: its line, from 1. Either `messages`, the last one the assistant's, or `text`."""

    number: int
    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""
    split: Literal["train", "test"] = "train"
    rejected: tuple[Mapping[str, str], ...] = ()  # of a pair: `messages` with the worse answer
    is_rehearsal: bool = False

    @property
    def prompt(self) -> tuple[Mapping[str, str], ...]:
        """What comes before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer; "" of a text."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A row as ids. `labels[i]` is the id at i where that is in the loss, else IGNORED: not shifted."""

    number: int
    ids: np.ndarray  # (S) int32
    labels: np.ndarray  # (S) int32
    split: Literal["train", "test"] = "train"
    rejected: Encoded | None = None  # of a pair
    is_rehearsal: bool = False

    @property
    def predicted(self) -> int:
        """How many ids are in the loss, of a pair the fewer. The first has nothing before it that could
        predict it."""
        found = int(np.count_nonzero(self.labels[1:] != IGNORED))
        return found if self.rejected is None else min(found, self.rejected.predicted)


# --- reading ----------------------------------------------------------------------------------------


def read_rows(path: str | Path, pairs: bool = False) -> list[Row]:
    """The rows of a JSONL file in UTF-8; `pairs`: those of preferences.

    Raises ConfigError, with the number of the line and none of its text, for the first row that is none,
    and for a file without a row to train on. OSError where the file cannot be read.
    """
    rows = [_row(number, line, pairs) for number, line in _lines(path)]
    if not rows:
        raise ConfigError(
            f"{path} has no rows", remedy=f"one JSON object a line, with {PAIR if pairs else FORMS}"
        )
    if all(row.split == "test" for row in rows):
        raise ConfigError(
            f'all {len(rows)} rows of {path} have "split": "test"', remedy="leave some to train"
        )
    return rows


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(ROW_BYTES_MOST + 1):
            number += 1
            if len(line) > ROW_BYTES_MOST:
                raise _fault(number, f"expected at most {ROW_BYTES_MOST >> 20} MiB", "a longer line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors write
            if line.strip():
                yield number, line


def _row(number: int, line: bytes, pairs: bool = False) -> Row:
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _fault(number, "expected UTF-8", f"another byte at {error.start}") from None
    except json.JSONDecodeError as error:
        raise _fault(number, "expected JSON", f"a fault at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):
        raise _fault(number, "expected JSON", "a number too long or nesting too deep") from None
    if not isinstance(found, dict):
        raise _fault(number, "expected a JSON object", _kind(found))
    split = found.get("split", "train")
    if split not in ("train", "test"):
        raise _fault(number, '"split": expected "train" or "test"', "something else")
    more: dict[str, Any] = {"split": split, "is_rehearsal": _is_rehearsal(number, found)}
    if pairs:
        chosen, rejected = _pair(number, found)
        return Row(number, chosen, rejected=rejected, **more)
    if "messages" in found:
        return Row(number, _messages(number, found["messages"]), **more)
    if "instruction" in found or "output" in found:
        return Row(number, _instruction(number, found), **more)
    if "text" in found:
        return Row(number, text=_text(number, found, "text"), **more)
    if "chosen" in found:
        raise _fault(number, f"expected {FORMS}", 'a pair of preferences, for objective = "dpo"')
    raise _fault(number, f"expected {FORMS}", "none of them")


def _is_rehearsal(number: int, found: Mapping[str, Any]) -> bool:
    is_rehearsal = found.get("rehearsal", False)
    if not isinstance(is_rehearsal, bool):
        raise _fault(number, '"rehearsal": expected true or false', _kind(is_rehearsal))
    return is_rehearsal


def _pair(
    number: int, found: Mapping[str, Any]
) -> tuple[tuple[Mapping[str, str], ...], tuple[Mapping[str, str], ...]]:
    """The better conversation and the worse one."""
    if "chosen" not in found or "rejected" not in found:
        raise _fault(number, f"expected {PAIR}", "none of it")
    prompt = _said(number, found, "prompt", "user") if "prompt" in found else []
    chosen, rejected = (
        _messages(number, [*prompt, *_said(number, found, name, "assistant")])
        for name in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        raise _fault(number, '"chosen" and "rejected": expected answers to the same prompt', "others")
    return chosen, rejected


def _said(number: int, found: Mapping[str, Any], key: str, role: str) -> list[Any]:
    """Messages as they stand there, or a text as one of them."""
    if isinstance(found[key], list):
        return list(found[key])
    return [{"role": role, "content": _text(number, found, key)}]


def _messages(number: int, found: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise _fault(number, '"messages": expected a list of messages', _kind(found))
    messages = []
    for message in found:
        if not isinstance(message, dict):
            raise _fault(number, '"messages": expected objects', _kind(message))
        role, content = _text(number, message, "role"), _text(number, message, "content", may_be_empty=True)
        if role not in ROLES:
            raise _fault(number, f'"role": expected one of {", ".join(ROLES)}', "another")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise _fault(
            number, '"messages": expected a question and, last, the answer of the assistant', "other"
        )
    return tuple(messages)


def _instruction(number: int, found: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    question, answer = _text(number, found, "instruction"), _text(number, found, "output")
    more = _text(number, {"input": "", **found}, "input", may_be_empty=True)
    if more:
        question = f"{question}\n\n{more}"
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _text(number: int, found: Mapping[str, Any], key: str, may_be_empty: bool = False) -> str:
    if key not in found:
        raise _fault(number, f'"{key}": expected text', "nothing")
    text = found[key]
    if not isinstance(text, str):
        raise _fault(number, f'"{key}": expected text', _kind(text))
    if not text and not may_be_empty:
        raise _fault(number, f'"{key}": expected text', "an empty text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a character that UTF-16 needs two units for
        raise _fault(number, f'"{key}": expected Unicode text', "half of a surrogate pair") from None
    return text


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else kinds.get(type(value), "a number")


def _fault(number: int, expected: str, found: str) -> ConfigError:
    return ConfigError(f"row {number}: {expected}, found {found}", remedy="correct that line of the file")


# --- encoding ---------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int,
    loss_on: Literal["answer", "all"] = "answer",
) -> list[Encoded]:
    """Rows as ids, cut after `max_length`. The loss is on the assistant's messages, or on all; on all of
    a text, which is ended with the end token.

    A row whose answer is cut off entirely is left out: `len(rows) - len(encoded)` says how many. A few
    chat templates write an earlier answer differently once more follows; the loss is then on the answers
    after it, which the model sees as it will when it is used.

    Raises ConfigError naming the row for an id that the vocabulary has not and for a template whose prompt
    does not lead to its answer, and where no row to train on is left.
    """
    if max_length < 2:
        raise ConfigError(f"max_length: expected at least 2, got {max_length}")
    if loss_on not in ("answer", "all"):
        raise ConfigError(f'loss_on: expected "answer" or "all", got {loss_on!r}')
    encoded = [_encode(row, tokenizer, max_length, loss_on) for row in rows]
    kept = [one for one in encoded if one.predicted]
    if not any(one.split == "train" for one in kept):
        raise ConfigError(
            f"the answers of all rows begin after max_length = {max_length} tokens", remedy="raise max_length"
        )
    return kept


def _encode(row: Row, tokenizer: Tokenizer, max_length: int, loss_on: str) -> Encoded:
    """Of a pair the loss is on both last answers, whatever `loss_on` says."""
    rejected = None
    if row.rejected:
        worse = replace(row, messages=row.rejected, rejected=())
        rejected = _encode_ids(worse, tokenizer, max_length, "last")
        loss_on = "last"
    found = _encode_ids(row, tokenizer, max_length, loss_on)
    return replace(found, rejected=rejected, is_rehearsal=row.is_rehearsal)


def _encode_ids(row: Row, tokenizer: Tokenizer, max_length: int, loss_on: str) -> Encoded:
    if row.messages:
        ids = tokenizer.chat(row.messages, answers=True)
        answers = [(0, len(ids))] if loss_on == "all" else _answers(row, tokenizer, ids)
        answers = answers[:1] if loss_on == "last" else answers
    else:
        ids = [*tokenizer.encode(row.text), tokenizer.end]
        answers = [(0, len(ids))]
    strange = next((token for token in ids if not 0 <= token < tokenizer.vocab), None)
    if strange is not None:
        raise _fault(row.number, f"expected ids below {tokenizer.vocab}, the vocabulary's size", str(strange))
    labels = np.full(len(ids), IGNORED, np.int32)
    whole = np.array(ids, np.int32)
    for start, stop in answers:
        labels[start:stop] = whole[start:stop]
    return Encoded(row.number, whole[:max_length], labels[:max_length], row.split)


def _answers(row: Row, tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where the assistant's messages stand in `ids`, the last one first."""
    last = len(row.messages) - 1
    spans = [(_start(row, tokenizer, ids, last), len(ids))]
    for index in range(last - 1, -1, -1):
        if row.messages[index]["role"] == "assistant":
            ended = tokenizer.chat(row.messages[: index + 1], answers=True)
            if _common(ended, ids) < len(ended) - MERGED_TOKENS_MOST:
                break  # the template writes it differently now
            spans.append((_start(row, tokenizer, ids, index), _common(ended, ids)))
    return spans


def _start(row: Row, tokenizer: Tokenizer, ids: Sequence[int], index: int) -> int:
    """Where the answer `row.messages[index]` begins: where the prompt ends, or before a token that is
    part of both."""
    prompt = tokenizer.chat(row.messages[:index], answers=False)
    start = _common(prompt, ids)
    if start < len(prompt) - MERGED_TOKENS_MOST:
        raise ConfigError(
            f"row {row.number}: the model's chat template does not lead from this prompt to its answer",
            remedy='use loss_on = "all", or rows with `text`',
        )
    return start


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    differ = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


# --- batches ----------------------------------------------------------------------------------------


class Batches:
    """The batch of every step, from 0: a function of the step, so that a run resumes from that number.

    Every epoch goes once through all rows in an order of its own, Philox's of (seed, epoch); its last
    batch may be smaller. `max_length` bounds the padded length too; 0: it is not bounded.
    """

    def __init__(self, encoded: Sequence[Encoded], batch_size: int, seed: int, max_length: int = 0) -> None:
        if not encoded:
            raise ConfigError("expected rows to make batches of, got none")
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
        self._encoded = encoded
        self._size = batch_size
        self._seed = seed
        self._longest = max_length
        self._lengths = np.array([len(one.ids) for one in encoded])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # of the last epoch asked for

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        return -(-len(self._encoded) // self._size)

    def indices(self, step: int) -> list[int]:
        """Which rows are in the batch of `step`."""
        epoch, place = divmod(step, self.epoch_steps)
        return self._permutation(epoch)[place * self._size : (place + 1) * self._size].tolist()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """ids, labels: (B, S) int64, padded on the right with 0 and IGNORED; S is the longest row's length,
        rounded up to a multiple of 8."""
        return self.of(self.indices(step))

    def of(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The same of any rows, say those of an evaluation."""
        length = self._padded(indices)
        ids = np.zeros((len(indices), length), np.int64)
        labels = np.full((len(indices), length), IGNORED, np.int64)
        for place, index in enumerate(indices):
            one = self._encoded[index]
            ids[place, : len(one.ids)], labels[place, : len(one.ids)] = one.ids, one.labels
        return ids, labels

    def positions(self, steps: int) -> list[int]:
        """B x S of each of the first `steps` steps."""
        chosen = map(self.indices, range(steps))
        return [len(indices) * self._padded(indices) for indices in chosen]

    def _padded(self, indices: Sequence[int]) -> int:
        longest = int(self._lengths[list(indices)].max())
        length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        return max(longest, min(length, self._longest)) if self._longest else length

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            key = np.array([self._seed & (2**64 - 1), epoch], np.uint64)
            # Raw bits are the same in every version of numpy, so on every rank; its permutations need not be.
            bits = np.random.Philox(key=key).random_raw(len(self._encoded))
            self._order = epoch, np.argsort(bits, kind="stable")
        return self._order[1]


# --- scoring ----------------------------------------------------------------------------------------


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L's F-measure, 0 to 1: the longest common subsequence of words against both lengths.

    Words as the rouge-score package makes them: lower case, divided at everything but letters and digits of
    ASCII. Natural Instructions' own script stems them too, so that its figures are a little higher. Source:
    Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.
    """
    one, other = _words(candidate), _words(reference)
    common = _subsequence(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, row by row of the usual table."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for column, against in enumerate(other):
            row.append(above[column] + 1 if word == against else max(above[column + 1], row[column]))
        above = row
    return above[-1]
