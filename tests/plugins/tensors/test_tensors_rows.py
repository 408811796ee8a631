"""Rows: what a file may hold, what is in the loss, and batches that depend on the step alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from edged_plugins._tensors.rows import (
    IGNORED,
    ROW_BYTES_MOST,
    Batches,
    Encoded,
    Row,
    encode,
    read_rows,
    rouge_l,
)
from hypothesis import given
from hypothesis import strategies as st

from edged import ConfigError

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell"},
]


class Characters:
    """One id a character, and a chat template of marked turns: `<u>Hi</u><a>Hello</a>`.

    `merges`: ":x" is one token, so that an answer can swallow the end of its prompt. `rewrites`: an answer
    is written with a thought before it, until another message follows.
    """

    end = 0
    vocab = 130

    def __init__(self, merges: bool = False, rewrites: bool = False) -> None:
        self.merges, self.rewrites = merges, rewrites

    def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
        text = ""
        for index, message in enumerate(messages):
            mark, content = message["role"][0], message["content"]
            if self.rewrites and mark == "a" and index == len(messages) - 1:
                content = f"(no thoughts){content}"
            text += f"<{mark}:{content}</{mark}>"
        return self.encode(text if answers else f"{text}<a:")

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in (text.replace(":x", "\x81") if self.merges else text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids)).replace("\x81", ":x")


def written(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def in_loss(one: Encoded) -> str:
    """The text that is in the loss, its parts between bars."""
    marks = [chr(i) if label != IGNORED else "|" for i, label in zip(one.ids, one.labels, strict=True)]
    return "|".join(part for part in "".join(marks).split("|") if part)


def chat_row(**more: object) -> Row:
    return Row(1, ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}), **more)


# --- reading ----------------------------------------------------------------------------------------


def test_all_three_forms_are_read_with_their_line_and_split(tmp_path: Path) -> None:
    file = written(tmp_path, ALPACA, {"messages": CHAT, "split": "test"}, {"text": "Once.", "id": 7})
    file.write_text(file.read_text().replace("\n", "\n\n", 1))
    alpaca, chat, text = read_rows(file)
    assert [message["content"] for message in alpaca.messages] == ["Add.\n\n1 2", "3"]
    assert (alpaca.number, chat.number, text.number) == (1, 3, 4)
    assert (alpaca.split, chat.split, text.split) == ("train", "test", "train")
    assert chat.messages == tuple(CHAT)
    assert (chat.answer, len(chat.prompt), text.text) == ("Farewell", 4, "Once.")


@pytest.mark.parametrize("row", [{**ALPACA, "input": ""}, {"instruction": "Add.", "output": "3"}], ids=str)
def test_an_instruction_without_input_stands_alone(tmp_path: Path, row: object) -> None:
    assert read_rows(written(tmp_path, row))[0].messages[0]["content"] == "Add."


def test_a_byte_order_mark_and_a_last_line_without_an_end_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xc3\xa9"}')
    assert [row.text for row in read_rows(file)] == ["a", "é"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{'text': 1}", "JSON"),
        (b'{"text": "a"', "JSON"),
        (b"[" * 200_000, "JSON"),
        (b"9" * 5000, "JSON"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'["text"]', "JSON object, found a list"),
        (b"null", "JSON object, found null"),
        (b"{}", "messages, or instruction and output, or text"),
        (b'{"text": 5}', '"text": expected text, found a number'),
        (b'{"text": ""}', "an empty text"),
        (b'{"instruction": "a"}', '"output": expected text, found nothing'),
        (b'{"output": "a"}', '"instruction": expected text, found nothing'),
        (b'{"instruction": "a", "output": "b", "input": null}', '"input": expected text, found null'),
        (b'{"text": "a", "split": "dev"}', '"split"'),
        (b'{"text": "a", "split": ["test"]}', '"split"'),
        (b'{"messages": []}', "an empty list"),
        (b'{"messages": "a"}', "list of messages, found text"),
        (b'{"messages": [1, 2]}', "objects, found a number"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "system, user, assistant"),
        (b'{"messages": [{"role": "user"}]}', '"content": expected text'),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "a question and, last, the answer"),
        (b'{"messages": [{"role": "user", "content": "secret"}]}', "a question and, last, the answer"),
        (b'{"text": "' + b"a" * ROW_BYTES_MOST, "4 MiB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_row_that_is_none_is_named_without_its_text(tmp_path: Path, line: bytes, expected: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=r"^row 2: ") as caught:
        read_rows(file)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="has no rows"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_file_of_test_rows_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all 2 rows"):
        read_rows(written(tmp_path, *2 * [{"text": "a", "split": "test"}]))


# --- encoding ---------------------------------------------------------------------------------------


def test_the_loss_is_on_every_answer_of_the_assistant() -> None:
    (one,) = encode([Row(1, tuple(CHAT))], Characters(), 200)
    text = Characters().decode(one.ids)
    assert text == "<s:Be brief.</s><u:Hi</u><a:Hello</a><u:Bye</u><a:Farewell</a>"
    assert in_loss(one) == "Hello</a>|Farewell</a>"
    assert one.predicted == len("Hello</a>Farewell</a>")
    assert one.ids.dtype == one.labels.dtype == np.int32
    assert (one.labels[one.labels != IGNORED] == one.ids[one.labels != IGNORED]).all()  # not shifted


def test_the_loss_on_all_is_on_every_id() -> None:
    (one,) = encode([chat_row()], Characters(), 200, loss_on="all")
    assert in_loss(one) == "<u:Hi</u><a:Hello</a>"
    assert one.predicted == len(one.ids) - 1


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_a_text_is_ended_and_all_in_the_loss(loss_on: str) -> None:
    (one,) = encode([Row(1, text="Once.", split="train")], Characters(), 200, loss_on=loss_on)
    assert one.ids.tolist() == one.labels.tolist() == [*map(ord, "Once."), Characters.end]


def test_a_token_that_is_part_of_prompt_and_answer_is_in_the_loss() -> None:
    row = Row(1, ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "xyz"}))
    (one,) = encode([row], Characters(merges=True), 200)
    assert in_loss(one) == "\x81yz</a>"


def test_an_answer_that_the_template_rewrites_later_is_not_in_the_loss() -> None:
    (one,) = encode([Row(1, tuple(CHAT))], Characters(rewrites=True), 200)
    assert in_loss(one) == "(no thoughts)Farewell</a>"


def test_a_template_that_moves_the_system_prompt_leaves_the_last_answer() -> None:
    """Mistral's puts it before the last message of the user, so that no earlier prompt is part of the row."""

    class Moving(Characters):
        def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
            system, *others = messages
            last = max(i for i, message in enumerate(others) if message["role"] == "user")
            return super().chat([*others[:last], system, *others[last:]], answers=answers)

    (one,) = encode([Row(1, tuple(CHAT))], Moving(), 200)
    assert in_loss(one) == "Farewell</a>"


def test_a_template_whose_prompt_leads_elsewhere_is_named_with_the_row() -> None:
    class Elsewhere(Characters):
        def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
            return super().chat(messages, answers=answers)[:: 1 if answers else -1]

    with pytest.raises(ConfigError, match="row 1: the model's chat template"):
        encode([chat_row()], Elsewhere(), 200)


def test_a_long_row_is_cut_and_one_without_its_answer_left_out() -> None:
    prompt = len("<u:Hi</u><a:")
    rows = [chat_row(), Row(2, text="ab")]
    whole, _ = encode(rows, Characters(), prompt + 2)
    assert len(whole.ids) == prompt + 2
    assert in_loss(whole) == "He"
    assert [one.number for one in encode(rows, Characters(), prompt)] == [2]
    with pytest.raises(ConfigError, match=f"max_length = {prompt}"):
        encode(rows[:1], Characters(), prompt)


def test_test_rows_alone_are_not_enough() -> None:
    with pytest.raises(ConfigError, match="begin after max_length"):
        encode([Row(1, text="a" * 9, split="test")], Characters(), 8)


def test_an_id_outside_the_vocabulary_names_its_row() -> None:
    with pytest.raises(ConfigError, match=r"row 2: .*130.*233"):
        encode([Row(1, text="a"), Row(2, text="é")], Characters(), 8)


@pytest.mark.parametrize(
    ("settings", "name"), [({"max_length": 1}, "max_length"), ({"max_length": 8, "loss_on": "x"}, "loss_on")]
)
def test_a_wrong_setting_of_the_encoding_is_named(settings: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        encode([chat_row()], Characters(), **settings)


# --- batches ----------------------------------------------------------------------------------------


def of_lengths(*lengths: int) -> list[Encoded]:
    made = [np.arange(1, n + 1, dtype=np.int32) + 100 * i for i, n in enumerate(lengths)]
    return [Encoded(i + 1, ids, np.where(ids % 2, ids, IGNORED)) for i, ids in enumerate(made)]


@given(
    rows=st.integers(1, 30), size=st.integers(1, 12), seed=st.integers(-5, 2**64), epoch=st.integers(0, 1000)
)
def test_every_epoch_has_every_row_once(rows: int, size: int, seed: int, epoch: int) -> None:
    batches = Batches(of_lengths(*[3] * rows), size, seed)
    first = epoch * batches.epoch_steps
    chosen = [batches.indices(first + step) for step in range(batches.epoch_steps)]
    assert sorted(itertools.chain(*chosen)) == list(range(rows))
    assert {len(indices) for indices in chosen[:-1]} <= {size}
    assert 1 <= len(chosen[-1]) <= size


def test_a_batch_depends_on_its_step_alone() -> None:
    encoded = of_lengths(*range(1, 24))
    one, other = Batches(encoded, 4, 7), Batches(encoded, 4, 7)
    steps = [17, 0, 5, 29, 5]
    forwards = [one.indices(step) for step in range(30)]
    assert [other.indices(step) for step in steps] == [forwards[step] for step in steps]
    assert forwards[:6] != forwards[6:12]  # an order of its own for each epoch
    assert forwards[:6] != [Batches(encoded, 4, 8).indices(step) for step in range(6)]


def philox(seed: int, epoch: int, count: int) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    word = 2**64 - 1
    bits: list[int] = []
    for block in range(1, count // 4 + 2):
        x, key = [block, 0, 0, 0], [seed, epoch]
        for _ in range(10):
            one, other = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(other >> 64) ^ x[1] ^ key[0], other & word, (one >> 64) ^ x[3] ^ key[1], one & word]
            key = [(key[0] + 0x9E3779B97F4A7C15) & word, (key[1] + 0xBB67AE8584CAA73B) & word]
        bits += x
    return bits[:count]


def test_the_order_is_that_of_the_published_generator() -> None:
    """Nodes with other versions of numpy, and a run begun before an update, must agree."""
    batches = Batches(of_lengths(*[1] * 11), 11, 3)
    for epoch in range(5):
        bits = philox(3, epoch, 11)
        assert batches.indices(epoch) == sorted(range(11), key=bits.__getitem__)


def test_rows_are_padded_on_the_right_to_a_multiple_of_eight() -> None:
    encoded = of_lengths(3, 9, 5)
    ids, labels = Batches(encoded, 3, 0).of([0, 1, 2])
    assert ids.shape == labels.shape == (3, 16)
    assert ids.dtype == labels.dtype == np.int64
    for place, one in enumerate(encoded):
        assert ids[place].tolist() == [*one.ids, *[0] * (16 - len(one.ids))]
        assert labels[place].tolist() == [*one.labels, *[IGNORED] * (16 - len(one.ids))]


@pytest.mark.parametrize(("length", "padded"), [(8, 8), (9, 12), (12, 12)])
def test_the_padded_length_stays_below_the_longest_allowed(length: int, padded: int) -> None:
    assert Batches(of_lengths(length), 1, 0, max_length=12).batch(0)[0].shape == (1, padded)


def test_fewer_rows_than_the_batch_make_a_smaller_batch() -> None:
    assert Batches(of_lengths(4, 4), 8, 0).batch(3)[0].shape == (2, 8)


def test_positions_are_known_without_building_a_batch() -> None:
    batches = Batches(of_lengths(*range(1, 40)), 4, 1, max_length=37)
    assert batches.positions(25) == [batches.batch(step)[0].size for step in range(25)]


def test_no_rows_and_no_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows"):
        Batches([], 1, 0)
    with pytest.raises(ConfigError, match="batch_size"):
        Batches(of_lengths(1), 0, 0)


# --- scoring ----------------------------------------------------------------------------------------


def subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The recursive definition."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + subsequence(one[1:], other[1:])
    return max(subsequence(one[1:], other), subsequence(one, other[1:]))


@given(*[st.lists(st.sampled_from("abc"), min_size=1, max_size=6)] * 2)
def test_rouge_l_is_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    common = subsequence(one, other)
    precision, recall = common / len(one), common / len(other)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        # Lin 2004, section 3.1: recall 3/4 and 2/4 with as many words on both sides
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("Yes, it's 5!", "yes it s 5", 1.0),
        ("", "a", 0.0),
        ("...", "!", 0.0),
    ],
)
def test_rouge_l_of_published_examples_and_punctuation(
    candidate: str, reference: str, expected: float
) -> None:
    assert rouge_l(candidate, reference) == expected
