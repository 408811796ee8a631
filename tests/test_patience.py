"""How long a silent rank is waited for."""

from __future__ import annotations

import itertools

import pytest

from edged.patience import FIRST_S, LEAST_S, Patience


def after(silences: list[float]) -> tuple[Patience, float]:
    patience, now = Patience(100.0), 100.0
    for now in itertools.accumulate(silences, initial=100.0):
        if now > 100.0:
            patience.heard(now)
    return patience, now


@pytest.mark.parametrize(
    ("silences", "limit_s"),
    [
        ([], FIRST_S),
        ([0.1, 0.1], FIRST_S),  # of the first evaluation nothing is known yet
        ([0.1] * 3, LEAST_S),
        ([4.0] + [0.1] * 50, LEAST_S),
        ([30.0] * 9, 90.0),
        ([1.0, 5.0, 40.0, 5.0], 120.0),
        ([10.0, 20.0, 30.0], 20.0 + 10 * 10.0),
    ],
    ids=str,
)
def test_the_limit_is_far_above_what_was_seen_and_short_where_steps_are(
    silences: list[float], limit_s: float
) -> None:
    patience, now = after(silences)
    assert patience.limit_s == pytest.approx(limit_s)
    assert not patience.is_over(now + limit_s - 0.01)
    assert patience.is_over(now + limit_s + 0.01)


def test_a_clock_that_stood_still_ends_nothing() -> None:
    patience, _ = after([0.1, 0.2])
    patience.heard(50.0)
    assert patience.limit_s == LEAST_S
