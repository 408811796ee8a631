"""Advice on models: it fits, it is fast enough, and nothing finer would be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import advising
from edged.advising import BITS, MEASURED_AS, READING_TOKENS_S, WORKER_BYTES, advise, weights_for

SPEEDS = st.dictionaries(st.sampled_from(list(MEASURED_AS.values())), st.floats(1e7, 1e12))


@given(st.floats(1e8, 1e11), st.floats(1e7, 1e12), SPEEDS)
def test_the_weights_named_are_the_finest_that_will_do(
    parameters: float, room: float, speeds: dict[str, float]
) -> None:
    def will_do(name: str) -> bool:
        size, speed = parameters * BITS[name] / 8, speeds.get(MEASURED_AS[name])
        return size <= room and (speed is None or speed >= READING_TOKENS_S * size)

    able = [name for name in BITS if will_do(name)]
    assert weights_for(parameters, room, speeds) == (able[0] if able else None)


@pytest.mark.parametrize(
    ("gib", "speed", "size"),
    [(16, 1e11, "14B"), (16, 10e9, "3B"), (6, 1e12, "8B"), (0.5, 1e12, "0.5B"), (0.13, 1e12, "none alone")],
)
def test_a_size_is_bound_by_memory_or_by_speed(gib: float, speed: float, size: str) -> None:
    found = advise(int(gib * 2**30), dict.fromkeys(MEASURED_AS.values(), speed))
    assert found[0].choice == size


@pytest.mark.parametrize(
    ("gib", "method"),
    [
        (16, "LoRA here"),
        (2.5, "forward passes only (fedkseed, mezo, fwdllm)"),
        (1, "split learning, or a smaller model"),
    ],
)
def test_tuning_follows_memory(gib: float, method: str) -> None:
    (advice,) = [a for a in advise(int(gib * 2**30), {}, 1.1e9) if a.what == "tuning"]
    assert advice.choice == method


PI = advising.KNOWN[0]


def test_a_device_that_was_not_measured_is_judged_as_the_likest_one_and_the_advice_says_so() -> None:
    """Half of 17 GB/s reads 3B in Q4_0 five times a second; memory alone would hold 14B."""
    found = advise(16 << 30, {}, like=PI)
    assert [advice.choice for advice in found[:2]] == ["3B", "Q4_0"]
    assert advise(16 << 30, {})[0].choice == "14B"
    for advice in found:
        assert ("not measured here" in advice.reason) == (advice.what != "tuning")
        assert (PI.source in advice.source) == (advice.what != "tuning")
    measured = dict.fromkeys(MEASURED_AS.values(), 1e11)
    assert advise(16 << 30, measured, like=PI) == advise(16 << 30, measured)


def test_where_no_type_is_quick_enough_the_quickest_that_fits_is_named() -> None:
    speeds = {"Q8_0": 3e9, "Q6_K": 1e9, "Q4_K": 1e9, "Q4_0": 1e9}
    assert advise(4 << 30, speeds, 3e9)[0].choice == "Q8_0"


def test_a_model_that_fits_nowhere_is_divided_and_a_slow_one_says_so() -> None:
    huge, slow = (
        advise(4 << 30, {}, 70e9)[0],
        advise(4 << 30, dict.fromkeys(MEASURED_AS.values(), 1e9), 3e9)[0],
    )
    assert huge.choice == "Q4_0, divided"
    assert "slower than a person" in slow.reason


@given(st.integers(WORKER_BYTES, 10**12))
def test_every_advice_has_a_reason_and_a_source(room: int) -> None:
    for row in advising.rows(advise(room, {})):
        assert all(row[key] for key in ("what", "choice", "reason", "source"))
