"""What a client may ask: types by field, rules by table, each refusal naming what was expected."""

from __future__ import annotations

from typing import Any

import pytest

from edged import requests
from edged.errors import ConfigError
from edged.requests import PROMPT_BYTES_MAX, TOKENS_MAX, GenerateRequest, Invite, Trust

ASK = {"model": "m", "prompt": "p"}


def checked(needs_prompt: bool = True, **fields: Any) -> GenerateRequest:
    asked = {key: value for key, value in (ASK | fields).items() if value is not ...}
    return requests.check_generate(requests.read(GenerateRequest, asked), needs_prompt=needs_prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1},
        {"n": TOKENS_MAX},
        {"temperature": 0},
        {"top_k": 0, "top_p": 1},
        {"seed": 2**63 - 1},
        {"policy": "latency"},
        {"prompt": ..., "messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "", "raw": True},
        {"prompt": "x" * PROMPT_BYTES_MAX},
        {"nodes": ["a", "b"], "shares": [2, 1.5]},
        {"deferrable_s": 21600.0},
        {"from a newer client": True},
    ],
)
def test_a_sound_request_is_taken(fields: dict[str, Any]) -> None:
    request = checked(**fields)
    for key, value in fields.items():
        if value is not ... and hasattr(request, key):
            assert getattr(request, key) == value


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": ...}, "model"),
        ({"model": 3}, "model"),
        ({"prompt": 3}, "prompt"),
        ({"n": "8"}, r"\$\.n"),
        ({"n": 1.5}, r"\$\.n"),
        ({"nodes": "a"}, "nodes"),
        ({"shares": ["2"]}, "shares"),
        ({"numerics": "slow"}, "numerics"),
        ({"messages": [{"role": 1}], "prompt": ...}, "messages"),
        ({"prompt": ...}, "either a prompt or messages"),
        ({"messages": []}, "either a prompt or messages"),
        ({"n": 0}, "-n from 1 to 1048576; 0 came"),
        ({"n": TOKENS_MAX + 1}, "-n from 1"),
        ({"temperature": -0.1}, "--temperature from 0"),
        ({"temperature": float("nan")}, "--temperature from 0"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0}, "--top-p above 0"),
        ({"top_p": 1.01}, "--top-p above 0"),
        ({"seed": -1}, "--seed from 0"),
        ({"seed": 2**63}, "--seed from 0"),
        ({"prompt": "é" * PROMPT_BYTES_MAX}, "a prompt of at most 2 MiB"),
        ({"recovery": "never"}, "--recovery fast or exact; 'never' came"),
        ({"adapter": 3}, "adapter"),
        ({"deferrable_s": "6h"}, "deferrable_s"),
        ({"deferrable_s": 0}, "--deferrable above 0 and at most 7d"),
        ({"deferrable_s": float("nan")}, "--deferrable above 0 and at most 7d"),
        ({"deferrable_s": 8 * 86400}, "--deferrable above 0 and at most 7d"),
        ({"prompt": ..., "messages": [{"role": "user", "content": ""}], "raw": True}, "--raw with a prompt"),
    ],
)
def test_a_request_that_is_not_says_what_was_expected(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"expected .*{says}") as caught:
        checked(**fields)
    assert caught.value.remedy == "mend the argument"


def test_a_plan_needs_no_prompt() -> None:
    assert checked(needs_prompt=False, prompt=...).prompt_bytes == 0


def test_a_prompt_is_counted_in_bytes_with_all_its_messages() -> None:
    assert checked(prompt="é").prompt_bytes == 2
    talk = [{"role": "user", "content": "é"}, {"role": "assistant"}, {"role": "user", "content": "abc"}]
    assert checked(prompt=..., messages=talk).prompt_bytes == 5


def test_an_invite_gives_every_right_unless_it_says_less() -> None:
    assert requests.read(Invite, {}) == Invite(600.0, ("submit", "serve", "train"), "own")
    assert requests.read(Invite, {"rights": ["serve"], "zone": "guest"}).rights == ("serve",)
    for wrong in ({"rights": ["rule"]}, {"zone": "mine"}, {"ttl_s": "10m"}):
        with pytest.raises(ConfigError):
            requests.read(Invite, wrong)


def test_trust_changes_what_is_named() -> None:
    assert requests.read(Trust, {"node": "phone"}) == Trust("phone", None, None)
    assert requests.read(Trust, {"node": "phone", "rights": []}).rights == ()


@pytest.mark.parametrize(
    ("strategy", "nodes", "may_leave"),
    [
        ("auto", None, True),
        ("cloud", None, True),
        ("local", None, False),
        ("remote", ["pi"], False),
        ("auto", ["laptop"], False),
        ("layers", None, False),
    ],
)
def test_a_job_bound_to_nodes_moves_to_nobody_outside(
    strategy: str, nodes: list[str] | None, may_leave: bool
) -> None:
    assert GenerateRequest("m", "p", strategy=strategy, nodes=nodes).may_leave == may_leave
