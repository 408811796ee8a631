"""What a row of a data set may be: JSON Lines, checked row by row and without keeping any.

A row is a JSON object on a line of its own, of one of three forms:

    {"instruction": "...", "output": "...", "input": "..."}     `input` may be absent
    {"messages": [{"role": "user", "content": "..."}, ...]}     at least one of the assistant's
    {"text": "..."}

and may say `"split": "train"` (what it is without one) or `"test"`. Other keys are left alone.
"""

from __future__ import annotations

import msgspec

from .errors import ConfigError

LINE_BYTES_MAX = 4 << 20  # far above what a context holds; bounds the memory of a check
ROLES = ("system", "user", "assistant", "tool")
SPLITS = ("train", "test")
SHOWN_CHARS = 40  # of a wrong word in a message
FORMS = "`instruction` and `output`, `messages`, or `text`"
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
    split: str | Absent = msgspec.UNSET


_decoder = msgspec.json.Decoder(_Row)


class RowCheck:
    """Takes a file piece by piece, holds at most one unfinished line; ConfigError names the row.

    Rows are counted from 1, and row n is line n: an empty line is an error, not a row less.
    """

    def __init__(self) -> None:
        self.rows = self.test_rows = 0
        self._rest = bytearray()

    def feed(self, piece: bytes | memoryview) -> None:
        """The next bytes of the file, cut anywhere."""
        self._rest += piece
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._rest) > LINE_BYTES_MAX:
            raise self._too_long()

    def end(self) -> None:
        """The file ends here, with or without a last line break. ConfigError when it held no row."""
        if self._rest:
            self._take(self._rest)
            self._rest = bytearray()
        if not self.rows:
            raise ConfigError("expected at least one row; the file has none", remedy="add rows to the file")

    def _take(self, line: bytearray) -> None:
        if len(line) > LINE_BYTES_MAX:
            raise self._too_long()
        try:
            row = read_row(bytes(line))
        except ConfigError as error:
            raise self._fault(str(error)) from error
        self.rows += 1
        self.test_rows += row.split == "test"

    def _too_long(self) -> ConfigError:
        return self._fault(f"expected at most {LINE_BYTES_MAX} bytes in a line; this one is longer")

    def _fault(self, text: str) -> ConfigError:
        remedy = "mend that row of the file, then add it again"
        return ConfigError(f"row {self.rows + 1}: {text}", remedy=remedy, code="bad-row")


def read_row(line: bytes) -> _Row:
    """One line as a row, its form checked; ConfigError says what is wrong, never what stands in it."""
    if line.startswith(BYTE_ORDER_MARK):
        raise ConfigError("expected JSON; a byte order mark came: save the file as UTF-8 without one")
    if not line.strip():
        raise ConfigError("expected a JSON object; an empty line came")
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
    # `input` belongs to an instruction; alone it is of no form
    keys = {
        "instruction": (row.instruction, row.input, row.output),
        "messages": (row.messages,),
        "text": (row.text,),
    }
    forms = [form for form, values in keys.items() if any(value is not msgspec.UNSET for value in values)]
    if len(forms) != 1:
        came = " and ".join(f"`{form}`" for form in forms) or "none of them"
        raise ConfigError(f"expected one of {FORMS}; {came} came")
    if forms == ["instruction"]:
        for name in ("instruction", "output"):
            if getattr(row, name) is msgspec.UNSET:
                raise ConfigError(f"expected `instruction` and `output`; `{name}` is absent")
    elif row.text == "":
        raise ConfigError("expected words in `text`; it is empty")
    elif not isinstance(row.messages, Absent):
        _check_messages(row.messages)
    if row.split is not msgspec.UNSET and row.split not in SPLITS:
        raise ConfigError(f"expected `split` to be train or test; {str(row.split)[:SHOWN_CHARS]!r} came")


def _check_messages(messages: list[_Message]) -> None:
    roles = [message.role for message in messages]
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f"expected a role of {', '.join(ROLES)}; {role[:SHOWN_CHARS]!r} came")
    if "assistant" not in roles:
        raise ConfigError("expected a message of the assistant to learn from; there is none")
