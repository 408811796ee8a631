"""Predictions that learn: by plan, bounded, and never from what they corrected themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.correcting import ERRORS_MAX, FACTOR_MAX, PLANS_MAX, Corrections
from edged.types import Candidate, Predicted, Role


def candidate(
    tpot_ms: float | None, *nodes: str, strategy: str = "tensor", joules: float | None = None
) -> Candidate:
    roles = tuple(Role(i, n, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0) for i, n in enumerate(nodes))
    return Candidate(strategy, roles, Predicted(tpot_ms=tpot_ms, joules_per_token=joules))


def test_the_first_job_corrects_the_next_prediction_of_its_plan_alone() -> None:
    known = Corrections()
    plan, other = candidate(10.0, "a", "b", joules=2.0), candidate(10.0, "b", "a")
    assert known.learn("m", plan, 20.0) == 2.0
    corrected, untouched = known.corrected("m", [plan, other])
    assert (corrected.predicted.tpot_ms, corrected.predicted.joules_per_token) == (20.0, 4.0)
    assert corrected.predicted.correction == 2.0
    assert untouched == other
    assert known.corrected("n", [plan]) == [plan]


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=30))
def test_a_steady_error_is_learnt_and_corrected_predictions_are_not_learnt_from(noise: list[float]) -> None:
    """Each job takes three times what was predicted, but for noise."""
    known, plan = Corrections(), candidate(10.0, "a")
    for each in noise:
        (used,) = known.corrected("m", [plan])
        known.learn("m", used, 30.0 * each)
    (factor,) = known.factors.values()
    assert 3 * min(noise) * (1 - 1e-9) <= factor <= 3 * max(noise) * (1 + 1e-9)


@pytest.mark.parametrize(("predicted", "measured"), [(None, 5.0), (5.0, None), (0.0, 5.0)])
def test_what_is_unknown_teaches_nothing(predicted: float | None, measured: float | None) -> None:
    known = Corrections()
    assert known.learn("m", candidate(predicted, "a"), measured) is None
    assert not known.factors


def test_of_a_node_whose_rate_moved_only_others_plans_stay_corrected() -> None:
    known = Corrections()
    for plan in (candidate(10.0, "a", "b"), candidate(10.0, "b"), candidate(10.0, "c")):
        known.learn("b", plan, 20.0)
    known.forget("b")
    assert [key[2:] for key in known.factors] == [("c",)]


def test_factors_and_their_number_are_bounded() -> None:
    known = Corrections()
    known.learn("m", candidate(1.0, "a"), 1e9)
    assert list(known.factors.values()) == [FACTOR_MAX]
    for number in range(PLANS_MAX + 5):
        known.learn("m", candidate(1.0, str(number)), 2.0)
    assert len(known.factors) == PLANS_MAX
    assert known.corrected("m", [candidate(1.0, "a")])[0].predicted.correction == 1.0


def test_the_error_is_the_median_of_the_newest_predictions_as_they_were_made() -> None:
    known = Corrections()
    assert (known.error, known.jobs) == (None, 0)
    for measured in (10.0, 20.0, 40.0):
        known.learn("m", candidate(10.0, "a"), measured)
    assert known.error == pytest.approx(0.5)
    [corrected] = known.corrected("m", [candidate(10.0, "a")])
    for _ in range(ERRORS_MAX):
        known.learn("m", corrected, corrected.predicted.tpot_ms)
    assert (known.error, known.jobs) == (0.0, ERRORS_MAX + 3)
