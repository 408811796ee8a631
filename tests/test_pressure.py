"""Short of memory or not, without flicker."""

from __future__ import annotations

import pytest

from edged.pressure import Pressure


@pytest.mark.parametrize(
    ("readings", "verdicts"),
    [
        ([(0.5, 0.0), (0.06, 0.0), (0.04, 0.0)], [False, False, True]),
        ([(0.04, None), (0.07, None), (0.11, None), (0.07, None)], [True, True, False, False]),
        ([(0.5, 11.0), (0.5, 5.0), (0.5, 1.0), (0.5, 5.0)], [True, True, False, False]),
        ([(0.04, 0.0), (0.5, 5.0), (0.5, 1.0)], [True, True, False]),
        ([(None, None)], [False]),
        ([(None, 50.0), (None, None)], [True, False]),
    ],
)
def test_memory_is_short_from_the_first_bound_until_the_second(
    readings: list[tuple[float | None, float | None]], verdicts: list[bool]
) -> None:
    pressure = Pressure()
    assert [pressure.update(free, wait) for free, wait in readings] == verdicts
