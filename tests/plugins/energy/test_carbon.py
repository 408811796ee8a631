"""Grams of CO2: the file, the hour to start in, the plan of the fewest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edged_plugins import energy
from edged_plugins.energy import _carbon
from edged_plugins.energy._carbon import HOUR_S, Intensities
from hypothesis import given
from hypothesis import strategies as st

from edged import Candidate, ConfigError, NodeView, PlanRequest, Policy, Predicted, Role, Situation

START = 1_800_000_000.0  # 2027-01-15T08:00:00Z
HEADER = "time,g_per_kwh\n"
NIGHT = HEADER + "2027-01-15T08:00:00Z,300\n2027-01-15T09:00:00Z,100\n2027-01-15T10:00:00Z,200\n"


def test_a_tenth_of_a_watt_hour_on_a_dirty_grid() -> None:
    assert _carbon.grams(360, 400) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("hourly", "duration_h", "deadline_h", "start_h"),
    [
        ((300, 100, 200), 1, 3, 1),
        ((300, 100, 200), 1, 1.5, 0.5),  # it can wait no longer
        ((300, 100, 200), 1, 1, 0),
        ((300, 100, 200), 2, 3, 1),
        ((300, 200, 100), 1.5, 3, 1.5),
        ((300, 100, 200), 0, 3, 1),
        ((100, 100, 100), 1, 3, 0),  # a tie goes to the earliest
        ((100, 99.95, 100), 1, 3, 0),  # not worth waiting for
        ((300, 100), 1, 9, 1),  # what the file does not know is not hoped for
        ((300, 100), 3, 9, 0),
    ],
)
def test_a_job_starts_where_its_run_is_cleanest(hourly, duration_h, deadline_h, start_h) -> None:
    known = Intensities(START, tuple(map(float, hourly)))
    start = known.cleanest(START, duration_h * HOUR_S, START + deadline_h * HOUR_S)
    assert (start - START) / HOUR_S == pytest.approx(start_h)


@given(
    st.lists(st.floats(0, 900), min_size=3, max_size=8),
    st.floats(0, 2),
    st.floats(0.05, 1.5),
    st.floats(0, 5),
)
def test_no_start_is_cleaner_than_the_one_that_is_chosen(hourly, at_h, duration_h, wait_h) -> None:
    known, now = Intensities(START, tuple(hourly)), START + at_h * HOUR_S
    duration_s, latest = duration_h * HOUR_S, now + wait_h * HOUR_S
    start = known.cleanest(now, duration_s, latest + duration_s)
    assert now <= start <= latest + 1e-3
    if known.covers(now, duration_s):
        tried = [now + part * wait_h * HOUR_S / 40 for part in range(41)]
        means = [known.mean(t, duration_s) for t in tried if known.covers(t, duration_s)]
        assert known.mean(start, duration_s) * (1 - 2 * _carbon.GAIN) <= min(means) + 1e-6


@pytest.mark.parametrize("now_h", [-1, 3, 99])
def test_a_file_that_does_not_know_this_hour_makes_no_job_wait(now_h: float) -> None:
    known, now = Intensities(START, (300.0, 100.0, 200.0)), START + now_h * HOUR_S
    assert known.cleanest(now, HOUR_S, now + 6 * HOUR_S) == now


def test_a_file_is_read_hour_by_hour() -> None:
    assert _carbon.parse(NIGHT, "f") == Intensities(START, (300, 100, 200))
    assert _carbon.parse(NIGHT.replace("\n", "\r\n") + "\n", "f") == Intensities(START, (300, 100, 200))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the header 'time,g_per_kwh' in line 1 of f; an empty file came"),
        ("2027-01-15T08:00:00Z,300\n", "the header 'time,g_per_kwh' in line 1"),
        (HEADER, "1 to 17568 hours in line 1"),
        (HEADER + "today,300\n", "a time like .* in UTC in line 2 of f; 'today' came"),
        (HEADER + "2027-01-15T08:00:00,300\n", "in UTC in line 2"),
        (HEADER + "2027-01-15T08:00:00+01:00,300\n", "in UTC in line 2"),
        (HEADER + "2027-02-30T08:00:00Z,300\n", "in UTC in line 2"),
        (HEADER + "2027-01-15T08:00:00Z\n", "grams for a kWh from 0 to 5000 in line 2 of f; '' came"),
        (NIGHT.replace("100", "-1"), "grams for a kWh from 0 to 5000 in line 3 of f; '-1' came"),
        (NIGHT.replace("100", "nan"), "in line 3 of f; 'nan' came"),
        (NIGHT.replace("100", "1e9"), "in line 3 of f; '1e9' came"),
        (NIGHT.replace("100", "1,5"), "in line 3 of f; '1,5' came"),
        (NIGHT.replace("T09", "T08"), "2027-01-15T09:00:00Z, .* in line 3 of f; an earlier or repeated"),
        (NIGHT.replace("T09", "T07"), "in line 3 of f; an earlier or repeated hour came"),
        (NIGHT.replace("T10", "T11"), "2027-01-15T10:00:00Z, .* in line 4 of f; a gap came"),
    ],
)
def test_a_file_that_makes_no_sense_names_its_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"energy: expected .*{says}") as caught:
        _carbon.parse(text, "f")
    assert caught.value.remedy


# --- the policy -----------------------------------------------------------------------------------


def carbon(path: Path, text: str = NIGHT) -> Policy:
    path.write_text(text)
    return next(p for p in energy.edged_policies({"carbon_file": str(path)}) if p.name == "carbon")


def candidate(name: str, joules: float | None, tpot_ms: float | None = 10.0) -> Candidate:
    role = Role(0, name, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0)
    return Candidate("local", (role,), Predicted(100.0, tpot_ms, joules))


def situation(*candidates: Candidate, wait_h: float | None = None, at_h: float = 0.0) -> Situation:
    nodes = {c.roles[0].node_id: NodeView(c.roles[0].node_id, c.roles[0].node_id) for c in candidates}
    now = START + at_h * HOUR_S
    start_by = None if wait_h is None else now + wait_h * HOUR_S
    return Situation(candidates, nodes, PlanRequest(), 0.0, now, start_by, 1000)


@pytest.mark.parametrize(
    ("candidates", "index"),
    [
        ([candidate("15 W", 26e3, 300), candidate("30 W", 22e3, 200), candidate("60 W", 23e3, 100)], 1),
        ([candidate("slow", 5.0, 30), candidate("fast", 5.0, 10), candidate("hungry", 6.0, 1)], 1),
        ([candidate("unknown", None, 1), candidate("known", 5.0, 10)], 1),
        ([candidate("slow", None, 30), candidate("fast", None, 10)], 1),
        ([candidate("unmeasured", 5.0, None), candidate("hungry", 6.0, 1)], 0),
        ([], None),
    ],
)
@pytest.mark.parametrize("at_h", [0, 99], ids=["known hour", "unknown hour"])
def test_the_plan_of_the_fewest_grams_is_taken(candidates, index, at_h: float, tmp_path: Path) -> None:
    assert carbon(tmp_path / "f").choose(situation(*candidates, at_h=at_h)) == index


def test_a_long_job_is_weighed_over_all_its_hours(tmp_path: Path) -> None:
    """Half of the slow one's hours are clean: more joules, fewer grams."""
    slow, fast = candidate("slow", 1.1, 7100.0), candidate("fast", 1.0, 600.0)
    assert carbon(tmp_path / "f").choose(situation(slow, fast)) == 0
    even = NIGHT.replace(",100", ",300")
    assert carbon(tmp_path / "f", even).choose(situation(slow, fast)) == 1


@pytest.mark.parametrize(
    ("wait_h", "at_h", "start_h"), [(None, 0, None), (3, 0, 1), (3, 0.5, 1), (3, 1, None), (3, 99, None)]
)
def test_a_job_that_may_wait_does_for_a_clean_hour(wait_h, at_h, start_h, tmp_path: Path) -> None:
    policy, asked = carbon(tmp_path / "f"), situation(candidate("a", 1.0), wait_h=wait_h, at_h=at_h)
    assert policy.defer is not None
    deferral = policy.defer(asked)
    if start_h is None:
        assert deferral is None
        assert policy.choose(asked) == 0
    else:
        assert deferral is not None
        assert deferral.until == START + start_h * HOUR_S
        assert deferral.reason == "100 g CO2 a kWh instead of 300"
        assert policy.choose(asked) is None


def test_what_is_weighed_is_told(tmp_path: Path) -> None:
    note = carbon(tmp_path / "f").note
    assert note is not None
    assert note(situation(candidate("a", 3.6))) == "0.3 g CO2 for 1000 tokens, at 300 g a kWh."
    assert "does not cover this hour: no job waits" in note(situation(candidate("a", 3.6), at_h=99))
    assert "No plan's joules are known" in note(situation(candidate("a", None)))


def test_a_file_that_grows_is_read_again_and_one_that_breaks_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    policy, asked = carbon(path), situation(candidate("a", 3.6))
    assert policy.note is not None
    path.write_text(NIGHT.replace(",300", ",400"))
    os.utime(path, (1, 1))
    assert "at 400 g" in policy.note(asked)
    path.write_text("broken")
    assert "An earlier reading" in policy.note(asked)
    assert "at 400 g" in policy.note(asked)
    path.unlink()
    assert "at 400 g" in policy.note(asked)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "hourly intensities at .*; .*No such file"),
        (b"\xff", "hourly intensities"),
        (b"x\n", "the header"),
        (NIGHT.encode()[:-2], "whole lines"),  # half of 200 grams would be the cleanest hour there is
        (NIGHT.encode() + b"\n" * (1 << 20), "at most 1048576 bytes"),
    ],
)
def test_a_node_does_not_start_with_a_file_that_it_cannot_read(content, says: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        energy.edged_policies({"carbon_file": str(path)})


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="an absolute path"):
        energy.edged_policies({"carbon_file": "carbon.csv"})
