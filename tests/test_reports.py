"""Reports that a coordinator missed are told again; those of a trajectory that is given up are not."""

from __future__ import annotations

from pathlib import Path

from edged.reports import FILE, Reports


def test_what_was_told_before_a_step_is_kept_and_the_rest_forgotten(tmp_path: Path) -> None:
    folder = str(tmp_path / "rank-0")
    assert Reports(folder).begin(5) == []
    for step in range(4):
        Reports(folder).add("step", step, {"loss": step / 2})
    Reports(folder).add("eval", 4, {"loss": 9.0})
    kept = [("step", step, {"loss": step / 2}) for step in range(3)]
    assert Reports(folder).begin(3) == kept
    assert Reports(folder).begin(5) == kept


def test_a_line_that_is_half_there_costs_that_line(tmp_path: Path) -> None:
    reports = Reports(str(tmp_path))
    reports.add("step", 0, {"loss": 1.0})
    with (tmp_path / FILE).open("a") as file:
        file.write('["step", 1, {"lo')
    assert reports.begin(9) == [("step", 0, {"loss": 1.0})]


def test_a_folder_that_cannot_be_written_costs_the_repetition_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reports = Reports(str(tmp_path / "file"))
    reports.add("step", 0, {"loss": 1.0})
    assert reports.begin(9) == []
