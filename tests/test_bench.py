"""The benchmarks' own code: what a cut-off run leaves, and that each runs through with tiny settings."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import smol_or_skip

BENCH = Path(__file__).parent / "bench"
NAMES = sorted(file.stem for file in BENCH.glob("*.py") if not file.stem.startswith("_"))
NEED_ROOT = ("codecs", "scaling", "split")  # network namespaces
RUN_S = 900.0  # a hang: the longest takes 90 s alone, and other tests run beside it


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    found = importlib.import_module("_record")
    monkeypatch.setattr(found, "_commit", lambda: "abc1234")  # whatever this tree has changed
    return found


def rows(out: Path) -> dict[str, Any]:
    return {row["row"]: row for row in json.loads(out.read_text())["rows"]}


def test_a_cut_off_run_goes_on_with_the_rows_it_lacks(record: Any, tmp_path: Path) -> None:
    out = tmp_path / "some.json"
    first = record.Record("some", out)
    first.put("whole", ratio=1.5)
    first.put("begun", is_partial=True, ratio=2.0)
    assert set(rows(out)) == {"whole", "begun"}  # what was measured is there for a reader
    again = record.Record("some", out)
    assert again.has("whole")
    assert again.get("whole") == {"row": "whole", "ratio": 1.5}
    assert not again.has("begun")
    assert not again.has("whole", "begun")
    again.put("begun", ratio=2.5)
    document = again.done()
    assert document["complete"]
    assert [row["row"] for row in document["rows"]] == ["whole", "begun"]
    assert json.loads(out.read_text()) == document


@pytest.mark.parametrize("change", ["finished", "name", "commit", "quick", "dirty"])
def test_rows_of_another_run_are_not_taken_over(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "some.json"
    if change == "dirty":
        monkeypatch.setattr(record, "_commit", lambda: "abc1234-dirty")
    first = record.Record("some", out, is_quick=False)
    first.put("whole", ratio=1.5)
    if change == "finished":
        first.done()
    if change == "commit":
        monkeypatch.setattr(record, "_commit", lambda: "another")
    name = "other" if change == "name" else "some"
    assert not record.Record(name, out, is_quick=change == "quick").has("whole")


def test_without_a_file_nothing_is_kept(record: Any) -> None:
    made = record.Record("some", None)
    made.put("row", ratio=1.0)
    assert made.done()["rows"] == [{"row": "row", "ratio": 1.0}]
    assert not record.Record("some", None).has("row")


def test_a_ratio_is_taken_round_by_round(record: Any) -> None:
    assert record.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.network) if name in NEED_ROOT else name for name in NAMES]
)
def test_a_benchmark_runs_through_with_tiny_settings(name: str, tmp_path: Path) -> None:
    smol_or_skip()
    if name in NEED_ROOT:
        skip_without_namespaces()
    document = run(name, tmp_path / "out.json")
    assert document["complete"]
    assert document["rows"]
    again = run(name, tmp_path / "out.json", is_complete=False)  # a second run of all rows measures none
    assert again["rows"] == document["rows"]


@pytest.mark.network
def test_the_relay_holds_every_frame_back_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_namespaces()
    monkeypatch.syspath_prepend(str(BENCH))
    with importlib.import_module("_network").network(2, has_relay=True) as link:
        for delay_ms in (0.0, 5.0, 10.0):
            link.delay(delay_ms)
            assert link.rtt_ms() >= 2 * delay_ms
        link.delay(0.0, mbit=1)  # a datagram of one byte is a frame of 43 bytes: 0.344 ms each way
        assert link.rtt_ms() >= 2 * 0.344
        assert link.relay_seconds() > 0


def skip_without_namespaces() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        pytest.skip("needs root, iproute2 and /dev/net/tun: network namespaces")


def run(name: str, out: Path, is_complete: bool = True) -> Any:
    if not is_complete:
        out.write_text(json.dumps(json.loads(out.read_text()) | {"complete": False}))
    command = [sys.executable, "-m", "edged.cli", "bench", name, "--out", str(out), "--json"]
    environment = os.environ | {"EDGED_BENCH_QUICK": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(out.read_text())
    return json.loads(done.stdout)
