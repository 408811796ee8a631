"""The invite token: what `encode` made comes back, and nothing else is one."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.errors import TrustError
from edged.token import ADDRESSES_MAX, CHARS_MAX, PREFIX, Token, decode

settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")

KEY = st.binary(min_size=32, max_size=32)
ADDRESSES = st.lists(st.text(max_size=8), min_size=1, max_size=ADDRESSES_MAX).map(tuple)
TOKENS = st.builds(
    Token,
    ADDRESSES,
    st.integers(1, 65535),
    KEY,
    KEY,
    st.integers(0, 2**40),
    st.sampled_from(["own", "guest"]),
)
GOOD = Token(("192.0.2.1",), 47000, b"p" * 32, b"s" * 32, 1_800_000_000)


@given(TOKENS)
def test_a_token_comes_back_as_it_went(token: Token) -> None:
    assert decode(token.encode()) == token
    assert decode(f"  {token.encode()}\n") == token


def test_a_token_is_one_word_that_survives_a_chat_message() -> None:
    text = GOOD.encode()
    assert text == text.lower()
    assert text.isascii()
    assert text.replace("-", "").isalnum()
    assert (
        len(Token(("2001:db8::" + "f" * 29,) * ADDRESSES_MAX, 1, b"p" * 32, b"s" * 32, 2**40).encode())
        <= CHARS_MAX
    )


def test_more_addresses_than_a_token_holds_are_left_out() -> None:
    many = Token(tuple(f"192.0.2.{n}" for n in range(20)), 1, b"p" * 32, b"s" * 32, 1)
    assert decode(many.encode()).addresses == many.addresses[:ADDRESSES_MAX]


def test_a_token_is_never_shown_by_accident() -> None:
    assert repr(GOOD) == str(GOOD) == "Token(...)"


def packed(*fields: Any) -> str:
    return PREFIX + base64.b32encode(msgpack.packb(fields)).decode().rstrip("=").lower()


SOUND = [47000, b"p" * 32, b"s" * 32, 1_800_000_000, "own", "192.0.2.1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        PREFIX,
        "edged2-" + GOOD.encode().removeprefix(PREFIX),
        GOOD.encode()[:-3],
        GOOD.encode() + "a",
        GOOD.encode() + "é",
        GOOD.encode() + "=" * 9,
        PREFIX + "a" * CHARS_MAX,
        PREFIX + base64.b32encode(b"\x05").decode(),
        packed(),
        packed(*SOUND[:5]),
        *(
            packed(*SOUND[:place], wrong, *SOUND[place + 1 :])
            for place, wrongs in enumerate(
                [
                    (0, 65536, "1", None, True, 1.0),
                    (b"p" * 31, "p" * 32, None),
                    (b"s" * 33, "s" * 32, 1),
                    ("soon", None, 1.5),
                    ("mine", None, 1, []),
                    (b"192.0.2.1", None, "x" * 65, []),
                ]
            )
            for wrong in wrongs
        ),
        packed(*SOUND, *["192.0.2.1"] * ADDRESSES_MAX),
    ],
)
def test_what_is_no_token_is_refused_without_its_content(text: str) -> None:
    with pytest.raises(TrustError, match="expected a token like edged1-") as caught:
        decode(text)
    assert not text.removeprefix(PREFIX) or text not in str(caught.value)


@given(st.text(max_size=60) | st.binary(max_size=100).map(lambda b: PREFIX + base64.b32encode(b).decode()))
def test_any_text_is_a_token_or_a_trust_error(text: str) -> None:
    with contextlib.suppress(TrustError):
        assert isinstance(decode(text), Token)
