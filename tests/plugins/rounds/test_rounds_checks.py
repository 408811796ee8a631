"""What an update must be before it is added: each thing that may be wrong with it, by its code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from edged_plugins._rounds.checks import Expected, Extra, check

from edged import EdgedError, Member, PolicyViolation, ProtocolError, Update

MEMBERS = {0: Member(0, 4, 2.0), 1: Member(1, 2, 2.0)}
SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (3, 8)}
BASE = "ab" * 32
EXPECTED = Expected(round=5, base=BASE, members=MEMBERS, shapes=SHAPES, weight_most=100.0)


def factors(r: int) -> dict[str, Any]:
    rng = np.random.default_rng(r)
    return {
        module: (rng.standard_normal((r, in_)).astype("f4"), rng.standard_normal((out, r)).astype("f4"))
        for module, (out, in_) in SHAPES.items()
    }


def update(rank: int = 1, **changes: Any) -> Update:
    member = MEMBERS[rank]
    return dataclasses.replace(Update(member, 5, 10.0, factors(member.r)), **changes)


def with_factor(at: int, change: Callable[[np.ndarray], Any]) -> Update:
    """The update, with A (0) or B (1) of its second module changed."""
    pairs = factors(2)
    pair = list(pairs["layers.0.v_proj"])
    pair[at] = change(pair[at])
    return update(factors={**pairs, "layers.0.v_proj": tuple(pair)})


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[-1, -1] = value
        return array

    return change


WRONG = [
    pytest.param(update(round=4), "update-stale", id="an earlier round"),
    pytest.param(update(round=-1), "update-stale", id="a round before the first"),
    pytest.param(update(round=6), "update-future", id="a round that has not begun"),
    pytest.param(update(member=Member(2, 2, 2.0)), "update-member", id="a stranger"),
    pytest.param(
        update(member=Member(1, 4, 2.0), factors=factors(4)), "update-member", id="another rank than agreed"
    ),
    pytest.param(update(member=Member(1, 2, 20.0)), "update-member", id="another scale than agreed"),
    pytest.param(update(weight=0.0), "update-weight", id="no weight"),
    pytest.param(update(weight=-1.0), "update-weight", id="a negative weight"),
    pytest.param(update(weight=100.5), "update-weight", id="a weight above the owner's bound"),
    pytest.param(update(weight=float("nan")), "update-weight", id="a weight of NaN"),
    pytest.param(update(weight=float("inf")), "update-weight", id="an endless weight"),
    pytest.param(update(factors={}), "update-shape", id="no modules"),
    pytest.param(
        update(factors={**factors(2), "more": factors(2)["layers.0.q_proj"]}),
        "update-shape",
        id="more modules",
    ),
    pytest.param(update(factors=factors(4)), "update-shape", id="factors of another rank"),
    pytest.param(with_factor(0, lambda a: a.T), "update-shape", id="A transposed"),
    pytest.param(with_factor(1, lambda b: b[:, :1]), "update-shape", id="a column of B missing"),
    pytest.param(with_factor(0, lambda a: a.astype("f8")), "update-shape", id="F64"),
    pytest.param(with_factor(0, lambda a: a.tolist()), "update-shape", id="lists"),
    pytest.param(with_factor(0, lambda a: None), "update-shape", id="no A"),
    pytest.param(
        update(factors={module: (a,) for module, (a, _) in factors(2).items()}),
        "update-shape",
        id="one factor",
    ),
    pytest.param(with_factor(0, with_value(np.nan)), "update-nan", id="NaN in A"),
    pytest.param(with_factor(1, with_value(-np.inf)), "update-nan", id="infinity in B"),
    pytest.param(update(extras={"mask": np.zeros(3, "f4")}), "update-shape", id="an extra nobody asked for"),
]


@pytest.mark.parametrize(("wrong", "code"), WRONG)
def test_an_update_that_must_not_be_added_is_refused_by_its_code(wrong: Update, code: str) -> None:
    with pytest.raises(EdgedError) as refused:
        check(wrong, BASE, EXPECTED)
    assert refused.value.code == code
    assert isinstance(refused.value, PolicyViolation if code == "update-weight" else ProtocolError)
    assert f"rank {wrong.member.rank}" in str(refused.value)


@pytest.mark.parametrize("rank", MEMBERS)
def test_a_right_update_passes_once(rank: int) -> None:
    check(update(rank), BASE, EXPECTED, heard=())
    check(update(rank, weight=100.0), BASE, EXPECTED, heard={1 - rank})
    with pytest.raises(ProtocolError, match="got a second") as refused:
        check(update(rank), BASE, EXPECTED, heard={0, 1})
    assert refused.value.code == "update-replay"


def test_an_update_of_another_base_is_refused() -> None:
    with pytest.raises(ProtocolError, match="abababababab, got cdcdcdcdcdcd") as refused:
        check(update(), "cd" * 32, EXPECTED)
    assert refused.value.code == "update-base"


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_the_frozen_factor_may_be_missing_and_the_other_may_not(frozen: str) -> None:
    expected = dataclasses.replace(EXPECTED, frozen=frozen)
    at = "AB".index(frozen)
    check(with_factor(at, lambda factor: None), BASE, expected)
    check(update(), BASE, expected)
    with pytest.raises(ProtocolError, match=r"of layers\.0\.v_proj"):
        check(with_factor(1 - at, lambda factor: None), BASE, expected)
    with pytest.raises(ProtocolError, match="NaN"):
        check(with_factor(at, with_value(np.nan)), BASE, expected)


@pytest.mark.parametrize(
    ("extras", "code"),
    [
        ({"c": np.zeros(3, "f4"), "at": np.zeros((2, 7), "u4")}, None),
        ({"c": np.zeros(3, "f4")}, "update-shape"),
        ({"c": np.zeros(4, "f4"), "at": np.zeros((2, 7), "u4")}, "update-shape"),
        ({"c": np.zeros(3, "f4"), "at": np.zeros((3, 7), "u4")}, "update-shape"),
        ({"c": np.zeros(3, "f4"), "at": np.zeros((2, 7), "i4")}, "update-shape"),
        ({"c": np.full(3, np.nan, "f4"), "at": np.zeros((2, 7), "u4")}, "update-nan"),
    ],
)
def test_extras_are_what_was_asked_for(extras: dict[str, Any], code: str | None) -> None:
    expected = dataclasses.replace(EXPECTED, extras={"c": Extra((3,)), "at": Extra((2, None), "uint32")})
    if code is None:
        check(update(extras=extras), BASE, expected)
        return
    with pytest.raises(ProtocolError) as refused:
        check(update(extras=extras), BASE, expected)
    assert refused.value.code == code
