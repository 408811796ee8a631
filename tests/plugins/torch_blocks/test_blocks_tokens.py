"""Conversations to tokens: what is trained on is what is asked for at generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blocks_rig import EOS, VOCAB, write_tokenizer
from edged_plugins._tokenizer import Tokenizer as Served
from edged_plugins.torch_blocks._engine import open_blocks
from edged_plugins.torch_blocks._packing import pack
from edged_plugins.torch_blocks._tokens import Tokenizer

from edged import EngineError

QUESTION = [{"role": "user", "content": "w2 w3"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "w4"}]
TEMPLATE = (
    "{%- for m in messages %}{% if m.role == 'user' %}w10 {% else %}w11 {% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}w11{% endif %}"
)
Tiny = Callable[[str], tuple[Any, Path]]


@pytest.fixture
def packed(tiny: Tiny, tmp_path: Path) -> Callable[..., Tokenizer]:
    """The tokenizer of the tiny llama, packed with another template, or none."""

    def make(template: str = "") -> Tokenizer:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((tiny("llama")[1].with_suffix("") / name).read_bytes())
        write_tokenizer(tmp_path, template)
        return open_blocks(str(pack(tmp_path, tmp_path / "packed"))).tokenizer

    return make


def test_a_question_is_what_the_engine_that_generates_makes_of_it(smol: Path) -> None:
    ours, served = open_blocks(str(smol)).tokenizer, Served(str(smol))
    try:
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        assert ours.chat(messages, answers=False) == served.encode(messages, raw=False)
        assert ours.encode("Why?") == served.encode("Why?", raw=True)
    finally:
        served.close()


def test_an_answer_follows_its_question_and_ends_as_the_template_ends_it(smol: Path) -> None:
    tokenizer = open_blocks(str(smol)).tokenizer
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    asked = tokenizer.chat(messages[:1], answers=False)
    whole = tokenizer.chat(messages, answers=True)
    assert whole[: len(asked)] == asked
    answer = whole[len(asked) :]
    assert tokenizer.decode(answer) == "Because.\n"
    assert tokenizer.end in answer
    assert sum(1 for token in whole if token == tokenizer.end) == 3  # system, user, assistant
    assert tokenizer.vocab == 49152


def test_a_packed_models_template_is_rendered_for_questions_and_answers(
    packed: Callable[..., Tokenizer],
) -> None:
    tokenizer = packed(TEMPLATE)
    assert tokenizer.chat(QUESTION, answers=False) == [10, 2, 3, 1, 11]
    assert tokenizer.chat(ANSWERED, answers=True) == [10, 2, 3, 1, 11, 4, 1]
    assert (tokenizer.end, tokenizer.vocab) == (1, VOCAB)
    assert tokenizer.decode([2, 3, 1]) == "w2w3"


def test_without_a_template_messages_are_joined_and_answers_end_with_the_end(
    packed: Callable[..., Tokenizer],
) -> None:
    tokenizer = packed()
    assert tokenizer.chat(QUESTION, answers=False) == [2, 3]
    assert tokenizer.chat(ANSWERED, answers=True) == [2, 3, 4, 1]


def test_a_gguf_without_a_template_joins_them_likewise(smol: Path, tmp_path: Path) -> None:
    path, key = tmp_path / "words.gguf", b"tokenizer.chat_template"
    path.write_bytes(smol.read_bytes().replace(key, b"tokenizer.none" + key[14:], 1))  # as long
    plain, whole = open_blocks(str(path)).tokenizer, open_blocks(str(smol)).tokenizer
    asked = plain.chat([{"role": "user", "content": "Why?"}], answers=False)
    assert asked == plain.encode("Why?")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    answered = plain.chat(messages, answers=True)
    assert answered[: len(asked)] == asked
    assert answered[-1] == plain.end
    assert plain.decode(answered) == "Why?\nBecause."
    assert plain.sha256 != whole.sha256  # the template is part of it


def test_the_hash_is_of_vocabulary_and_template(packed: Callable[..., Tokenizer], smol: Path) -> None:
    assert packed(TEMPLATE).sha256 == packed(TEMPLATE).sha256
    assert packed(TEMPLATE).sha256 != packed().sha256
    assert open_blocks(str(smol)).tokenizer.sha256 == open_blocks(str(smol)).tokenizer.sha256


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system') }}", "refuses these messages: no system"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),  # the sandbox
        ("{% if %}", "expected a chat template that Jinja reads"),
    ],
)
def test_a_template_that_refuses_or_is_none_costs_an_error(
    packed: Callable[..., Tokenizer], template: str, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        packed(template).chat(QUESTION, answers=False)


def test_a_template_may_be_one_of_several_named_ones(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny("llama")[1].with_suffix("") / name).read_bytes())
    write_tokenizer(tmp_path)
    named = [{"name": "tools", "template": "w9"}, {"name": "default", "template": TEMPLATE}]
    settings = {"eos_token": EOS, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_blocks(str(pack(tmp_path, tmp_path / "packed"))).tokenizer
    assert tokenizer.chat(QUESTION, answers=False) == [10, 2, 3, 1, 11]
