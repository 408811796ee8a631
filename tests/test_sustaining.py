"""What a device sustains: a simulated one that throttles, hiccups, rests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from edged.sustaining import DRIFT, LEAST, PAUSE_S, REST_S, WINDOW_S, WINDOWS, Sustained

TOKEN_S = 0.1  # by the benchmark
STEADY_S = int(WINDOW_S * WINDOWS)


def work(kept: Sustained, seconds: Iterable[int], rate: Callable[[int], float]) -> list[int]:
    """Work without pause at `rate` of the benchmark; the seconds at which there was news."""
    return [s for s in seconds if kept.hear(s, 1.0, 1.0, rate(s) * 10 * TOKEN_S)]


def test_a_device_that_throttles_after_a_minute_is_told_once_and_the_ratio_follows() -> None:
    kept = Sustained()
    (news,) = work(kept, range(200), lambda s: 1.0 if s < 60 else 0.5)
    assert 60 + STEADY_S - WINDOW_S <= news <= 60 + STEADY_S + WINDOW_S
    assert kept.kept == pytest.approx(0.5, rel=0.05)


def test_at_its_peak_again_it_is_told_once_more() -> None:
    kept = Sustained()
    assert len(work(kept, range(300), lambda s: 0.5 if 60 <= s < 150 else 1.0)) == 2
    assert kept.kept == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    "rate",
    [
        lambda s: 0.1 if 60 <= s < 72 else 1.0,
        lambda s: 0.3 if s % 30 < 10 else 1.0,
        lambda s: 1 - DRIFT + 0.01,
        lambda s: 1.9,
    ],
    ids=["a hiccup", "hiccups", "a usual error", "faster than its benchmark"],
)
def test_nothing_changes_for(rate: Callable[[int], float]) -> None:
    kept = Sustained()
    assert work(kept, range(300), rate) == []
    assert kept.kept == 1.0


def test_short_jobs_with_pauses_are_no_steady_work() -> None:
    kept = Sustained()
    for job in range(20):
        begin = job * (STEADY_S + int(PAUSE_S) + 2)
        assert work(kept, range(begin, begin + STEADY_S - 2), lambda s: 0.4) == []
    assert kept.kept == 1.0


def test_a_ratio_is_never_nought_whatever_was_measured() -> None:
    kept = Sustained()
    work(kept, range(100), lambda s: 0.0)
    assert kept.kept == pytest.approx(LEAST)
    assert not any(kept.hear(s, 10.0, 0.0, 1.0) for s in range(100, 150))  # computing, but no token timed
    assert kept.kept == pytest.approx(LEAST)


@pytest.mark.parametrize(
    ("idle_s", "is_hot", "ratio"),
    [(REST_S - 1, False, 0.5), (REST_S, True, 0.5), (REST_S, False, 1.0)],
)
def test_a_rest_makes_a_cool_device_whole(idle_s: float, is_hot: bool, ratio: float) -> None:
    kept = Sustained()
    work(kept, range(60), lambda s: 0.5)
    assert kept.rest(idle_s, is_hot) == (ratio == 1.0)
    assert kept.kept == pytest.approx(ratio, rel=0.05)
