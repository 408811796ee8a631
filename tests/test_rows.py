"""What a row of a data set may be."""

from __future__ import annotations

import contextlib
import json
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.errors import ConfigError
from edged.rows import LINE_BYTES_MAX, RowCheck

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
GOOD = [
    b'{"instruction": "add", "output": "3"}',
    b'{"instruction": "add", "input": "1 2", "output": "3", "split": "test"}',
    b'{"text": "once", "split": "train", "source": {"page": [1, 2]}}',
    json.dumps({"messages": TALK}).encode(),
    '{"text": "día 日 \\ud83d\\ude00"}'.encode(),
    b'  {"text": "indented"}  \r',
    b'{"instruction": "add", "output": "3", "input": "", "text": "add: 3"}',
]
BAD = [
    (b"nonsense", "expected a JSON object; JSON is malformed"),
    (b'{"text": "cut', "expected a JSON object; Input data was truncated"),
    (b'{"text": "a"} {"text": "b"}', "trailing characters"),
    (b'["text"]', "expected `object`, got `array`"),
    (b"\xef\xbb\xbf" + GOOD[0], "expected a JSON object; JSON is malformed"),
    (b'{"text": "\xe4"}', "expected UTF-8; byte 11 of the line is none"),
    (b'{"text": "a", "note": "\xff"}', "expected UTF-8; byte 24 of the line"),
    (b'{"text": "\\ud800"}', "expected a JSON object"),
    (b'{"text": "a", "note": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deep"),
    (b'{"title": "a"}', "none of them came"),
    (b'{"input": "a"}', "none of them came"),
    (b'{"instruction": "a"}', "words in `output`; it is absent"),
    (b'{"input": "a", "output": "b", "text": "c"}', "words in `instruction`; it is absent"),
    (b'{"instruction": "a", "output": ""}', "words in `output`; it is empty"),
    (b'{"instruction": 5, "output": "b"}', "expected `str`, got `int` - at `$.instruction`"),
    (b'{"text": null}', "expected `str`, got `null` - at `$.text`"),
    (b'{"text": ""}', "words in `text`; it is empty"),
    (b'{"text": "a", "split": "dev"}', "train or test; 'dev' came"),
    (b'{"text": "a", "messages": []}', "as the last message, the assistant's answer"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "expected a question and"),
    (json.dumps({"messages": TALK[::-1]}).encode(), "as the last message, the assistant's"),
    (b'{"messages": [{"role": "gpt", "content": "a"}]}', "expected a role of system, user, assistant; 'gpt'"),
    (b'{"messages": [{"role": "user"}]}', "missing required field `content`"),
    (b'{"messages": "hi"}', "expected `array`, got `str`"),
]


def checked(content: bytes, piece: int = 1 << 20) -> RowCheck:
    check = RowCheck()
    for start in range(0, len(content), piece):
        check.feed(content[start : start + piece])
    check.end()
    return check


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_rows_of_every_form_are_counted(ending: bytes) -> None:
    check = checked(b"\n".join(GOOD) + ending)
    assert (check.rows, check.test_rows) == (len(GOOD), 1)


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words for _, words in BAD])
def test_a_wrong_row_is_named_by_its_number(line: bytes, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(b"\n".join([*GOOD, line, GOOD[0]]))
    text = str(caught.value)
    assert text.startswith(f"row {len(GOOD) + 1}: expected ")
    assert words in text
    assert len(text) < 250
    assert caught.value.code == "bad-row"


@given(st.lists(st.sampled_from(range(len(GOOD))), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_where_a_file_is_cut_into_pieces_changes_nothing(rows: list[int], piece: int) -> None:
    check = checked(b"\n".join(GOOD[row] for row in rows), piece)
    assert (check.rows, check.test_rows) == (len(rows), rows.count(1))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_rows_or_a_named_fault(content: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert checked(content).rows > 0


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="expected at least one row"):
        checked(content)


def test_empty_lines_are_no_rows_and_count_as_lines() -> None:
    content = b"\xef\xbb\xbf" + GOOD[0] + b"\n\n \r\n" + GOOD[1] + b"\n\n"
    assert (checked(content).rows, checked(content).test_rows) == (2, 1)
    with pytest.raises(ConfigError, match="row 6: expected a JSON object"):
        checked(content + b"nonsense")


WORDS = st.sampled_from(["", "a", "ä", 5, None])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["system", "user", "assistant", "gpt"]), "content": WORDS}
    ),
    max_size=3,
)
TEXTS = dict.fromkeys(("instruction", "output", "input", "text", "note"), WORDS)
OPTIONAL = {**TEXTS, "messages": MESSAGES, "split": st.sampled_from(["train", "test", "dev"])}


@given(st.lists(st.fixed_dictionaries({}, optional=OPTIONAL), min_size=1, max_size=2))
@settings(max_examples=300, deadline=None)
def test_a_training_reads_every_file_that_the_store_takes(rows: list[dict]) -> None:
    reader = pytest.importorskip("edged_plugins._tensors.rows", reason="needs numpy: make install")
    content = "\n".join(map(json.dumps, [*rows, {"text": "to train on"}])).encode()
    try:
        count = checked(content).rows
    except ConfigError:
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert len(reader.read_rows(file.name)) == count


def test_a_line_that_never_ends_is_refused_before_it_is_kept() -> None:
    check, piece = RowCheck(), b"x" * (1 << 20)
    for _ in range(LINE_BYTES_MAX // len(piece) - 1):
        check.feed(piece)
    with pytest.raises(ConfigError, match=rf"row 1: expected at most {LINE_BYTES_MAX} bytes"):
        check.feed(piece)
    assert len(check._rest) <= LINE_BYTES_MAX + len(piece)


def test_a_line_of_the_longest_length_is_a_row_and_one_byte_more_is_none() -> None:
    frame = b'{"text": ""}'
    longest = frame[:-2] + b"x" * (LINE_BYTES_MAX - 1 - len(frame)) + frame[-2:]
    assert checked(longest + b"\n").rows == 1
    with pytest.raises(ConfigError, match="row 1: expected at most"):
        checked(b" " + longest + b"\n" + GOOD[0])
