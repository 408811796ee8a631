"""Conditions: worst first, logged once when they begin and once when they end."""

from __future__ import annotations

import logging

import pytest

from edged.health import CONDITIONS_MAX, Health
from edged.types import Condition, Severity


def condition(code: str, severity: Severity = "warning", text: str = "hot") -> Condition:
    return Condition(code, severity, text, "wait")


def test_the_worst_come_first_and_equals_by_name() -> None:
    health = Health()
    for code, severity in (("b", "info"), ("d", "error"), ("c", "warning"), ("a", "warning")):
        health.set(condition(code, severity))  # type: ignore[arg-type]
    assert [c.code for c in health.conditions] == ["d", "a", "c", "b"]


def test_a_condition_is_logged_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    health = Health()
    with caplog.at_level(logging.INFO, "edged.health"):
        health.clear("heat")
        health.set(condition("heat"))
        health.set(condition("heat", text="hotter"))
        health.clear("heat")
        health.clear("heat")
    assert [record.getMessage() for record in caplog.records] == ["condition began", "condition ended"]
    assert not health.conditions


def test_a_condition_is_told_by_its_last_text() -> None:
    health = Health()
    health.set(condition("heat"))
    health.set(condition("heat", text="hotter"))
    assert [c.text for c in health.conditions] == ["hotter"]


def test_conditions_are_bounded_and_known_ones_still_change() -> None:
    health = Health()
    for number in range(CONDITIONS_MAX + 1):
        health.set(condition(str(number)))
    health.set(condition("0", text="changed"))
    assert len(health.conditions) == CONDITIONS_MAX
    assert "changed" in [c.text for c in health.conditions]
