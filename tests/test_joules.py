"""Where a job's joules are from: measured by every node in every epoch, else estimated, else unknown."""

from __future__ import annotations

import pytest

from edged.accounting import Spent, joules_of

MEASURED, OTHER, UNKNOWN = Spent(10, 0, 50.0), Spent(30, 0, 70.0), Spent(30, 0, None)


@pytest.mark.parametrize(
    ("epochs", "estimated", "joules", "source"),
    [
        ([MEASURED], 2.0, 50.0, "measured"),
        ([MEASURED], None, 50.0, "measured"),
        ([MEASURED, OTHER], 2.0, 120.0, "measured"),
        ([MEASURED, UNKNOWN], 2.0, 80.0, "estimated"),
        ([UNKNOWN], 2.0, 60.0, "estimated"),
        ([MEASURED, UNKNOWN], None, None, None),
    ],
)
def test_joules_are_measured_only_where_all_of_them_are(
    epochs: list[Spent], estimated: float | None, joules: float | None, source: str | None
) -> None:
    assert joules_of(epochs, estimated) == (joules, source)
