"""What a row of a data set may be: JSON Lines, checked row by row and without keeping any.

A row is a JSON object on a line of its own, of one of three forms; of several the first of this list
counts, other keys are left alone, and empty lines are skipped:

    {"messages": [{"role": "user", "content": "..."}, ...]}     the last one the assistant's
    {"instruction": "...", "output": "...", "input": "..."}     `input` may be absent or empty
    {"text": "..."}

A pair of preferences is a row as well, for trainings that read such alone; each of the three may be a list
of messages, and without `prompt` the other two begin with it:

    {"prompt": "...", "chosen": "...", "rejected": "..."}

A row may say `"rehearsal": true` (a training that rehearses mixes it into its batches)
and may say `"split": "train"` (what it is without one) or `"test"`. What is taken here, every training
takes; a training may ask for more (a row to train on).
"""

from __future__ import annotations

import msgspec

from .errors import ConfigError

LINE_BYTES_MAX = 4 << 20  # with its break; far above what a context holds; bounds the memory of a check
ROLES = ("system", "user", "assistant")
SPLITS = ("train", "test")
SHOWN_CHARS = 40  # of a wrong word in a message
FORMS = "`messages`, `instruction` and `output`, or `text` (or `chosen` and `rejected`, a pair)"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Absent = msgspec.UnsetType


class _Message(msgspec.Struct):
    role: str
    content: str


class _Row(msgspec.Struct):
    instruction: str | Absent = msgspec.UNSET
    input: str | Absent = msgspec.UNSET
    output: str | Absent = msgspec.UNSET
    messages: list[_Message] | Absent = msgspec.UNSET
    text: str | Absent = msgspec.UNSET
    prompt: str | list[_Message] | Absent = msgspec.UNSET
    chosen: str | list[_Message] | Absent = msgspec.UNSET
    rejected: str | list[_Message] | Absent = msgspec.UNSET
    rehearsal: bool | Absent = msgspec.UNSET
    split: str | Absent = msgspec.UNSET


_decoder = msgspec.json.Decoder(_Row)


class RowCheck:
    """Takes a file piece by piece, holds at most one unfinished line; ConfigError names the row by its line,
    from 1. `rows` counts what is no empty line."""

    def __init__(self) -> None:
        self.rows = self.test_rows = 0
        self._line = 1
        self._rest = bytearray()

    def feed(self, piece: bytes | memoryview) -> None:
        """The next bytes of the file, cut anywhere."""
        self._rest += piece
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._rest) >= LINE_BYTES_MAX:
            raise self._too_long()

    def end(self) -> None:
        """The file ends here, with or without a last line break. ConfigError when it held no row."""
        if self._rest:
            self._take(self._rest)
            self._rest = bytearray()
        if not self.rows:
            raise ConfigError("expected at least one row; the file has none", remedy="add rows to the file")

    def _take(self, line: bytearray) -> None:
        if len(line) >= LINE_BYTES_MAX:
            raise self._too_long()
        if self._line == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)  # as some editors write
        if line.strip():
            try:
                row = read_row(bytes(line))
            except ConfigError as error:
                raise self._fault(str(error)) from error
            self.rows += 1
            self.test_rows += row.split == "test"
        self._line += 1

    def _too_long(self) -> ConfigError:
        return self._fault(f"expected at most {LINE_BYTES_MAX} bytes in a line; this one is longer")

    def _fault(self, text: str) -> ConfigError:
        remedy = "mend that line of the file, then add it again"
        return ConfigError(f"row {self._line}: {text}", remedy=remedy, code="bad-row")


def read_row(line: bytes) -> _Row:
    """One line as a row, its form checked; ConfigError says what is wrong, never what stands in it."""
    try:
        line.decode()  # all of it: the decoder looks only at the keys that it knows
        row = _decoder.decode(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8; byte {error.start + 1} of the line is none") from error
    except RecursionError as error:
        raise ConfigError("expected a JSON object; it is nested too deep") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"expected {FORMS}; {str(error)[:1].lower()}{str(error)[1:]}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"expected a JSON object; {error}") from error
    _check_form(row)
    return row


def _check_form(row: _Row) -> None:
    if not isinstance(row.messages, Absent):
        _check_messages(row.messages)
    elif not (isinstance(row.instruction, Absent) and isinstance(row.output, Absent)):
        for name in ("instruction", "output"):
            _check_text(name, getattr(row, name))
    elif not isinstance(row.text, Absent):
        _check_text("text", row.text)
    elif not (isinstance(row.chosen, Absent) and isinstance(row.rejected, Absent)):
        _check_pair(row)
    else:
        raise ConfigError(f"expected one of {FORMS}; none of them came")
    if row.split is not msgspec.UNSET and row.split not in SPLITS:
        raise ConfigError(f"expected `split` to be train or test; {str(row.split)[:SHOWN_CHARS]!r} came")


def _check_pair(row: _Row) -> None:
    prompt = [] if isinstance(row.prompt, Absent) else _said("prompt", row.prompt, "user")
    chosen = [*prompt, *_said("chosen", row.chosen, "assistant")]
    rejected = [*prompt, *_said("rejected", row.rejected, "assistant")]
    _check_messages(chosen)
    _check_messages(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise ConfigError("expected `chosen` and `rejected` to answer the same prompt; they do not")


def _said(name: str, value: str | list[_Message] | Absent, role: str) -> list[_Message]:
    """Messages as they stand there, or a text as one of them."""
    if isinstance(value, list):
        return value
    _check_text(name, value)
    return [_Message(role, str(value))]


def _check_text(name: str, text: str | Absent) -> None:
    if not text:
        what = "is absent" if isinstance(text, Absent) else "is empty"
        raise ConfigError(f"expected words in `{name}`; it {what}")


def _check_messages(messages: list[_Message]) -> None:
    roles = [message.role for message in messages]
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f"expected a role of {', '.join(ROLES)}; {role[:SHOWN_CHARS]!r} came")
    if len(roles) < 2 or roles[-1] != "assistant":
        raise ConfigError("expected a question and, as the last message, the assistant's answer")
