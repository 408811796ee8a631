"""Jobs that wait for a clean hour: they say so, start when it comes, and end as other unfinished jobs do."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support import Node, Nodes, drain, wait_until

from edged.daemon import DRAIN_S

ASKED = {"model": "echo", "prompt": "hello", "n": 4, "temperature": 0.0, "policy": "carbon"}
AHEAD_S = 1.0
HOUR = timedelta(hours=1)


def write_hours(path: Path, first: datetime, *intensities: float) -> None:
    rows = [f"{(first + i * HOUR).isoformat()},{value}" for i, value in enumerate(intensities)]
    path.write_text("\n".join(["time,g_per_kwh", *rows]) + "\n")


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A clean hour begins in half an hour."""
    path = tmp_path / "hours.csv"
    write_hours(path, now() - HOUR / 2, 300, 100, 300)
    return path


@pytest.fixture
def laptop(nodes: Nodes, file: Path, tmp_path: Path) -> Node:
    settings = {"energy": {"carbon_file": str(file)}}
    (node,) = nodes.start("laptop", plugins=("echo", "energy"), plugin=settings)
    model = tmp_path / "echo.txt"
    model.write_text("edged-echo 1\n")
    node.add(model, "echo")
    return node


def row(node: Node, job_id: str) -> dict[str, Any]:
    return next(job for job in node.call("jobs")["jobs"] if job["job_id"] == job_id)


def test_a_job_waits_for_a_clean_hour_and_runs_then(laptop: Node, file: Path) -> None:
    laptop.call("generate", ASKED)  # the worker stands, so that waiting is what takes the time
    clean = now() + timedelta(seconds=AHEAD_S)
    write_hours(file, clean - HOUR, 300, 100)
    with laptop.client() as client:
        events = client.stream("generate", ASKED | {"deferrable_s": 1800.0}, silence_s=60)
        accepted, waiting = next(events), next(events)
        assert waiting["event"] == "waiting"
        assert waiting["because"] == "100 g CO2 a kWh instead of 300"
        assert abs(datetime.fromisoformat(waiting["until"]) - clean) < timedelta(seconds=0.01)
        job = row(laptop, accepted["job_id"])
        assert (job["state"], job["waits"]) == ("queued", {k: waiting[k] for k in ("until", "because")})
        document = drain(events)
    after_s = (now() - clean).total_seconds()
    assert document["text"] == "hell"
    assert 0 < document["measured"]["ttft_ms"] / 1000 <= after_s  # its wait is no part of it
    assert row(laptop, accepted["job_id"])["waits"] is None


def test_a_waiting_job_is_cancelled_and_waits_on_after_its_daemon_s_end(laptop: Node) -> None:
    asked = ASKED | {"deferrable_s": 7200.0, "detach": True}
    first, second = (laptop.call("generate", asked)["job_id"] for _ in range(2))
    wait_until("both to wait", lambda: all(row(laptop, job)["waits"] for job in (first, second)))
    assert laptop.call("cancel", {"job": first})["state"] == "cancelled"
    assert laptop.process is not None
    laptop.signal(signal.SIGTERM)
    laptop.process.wait(DRAIN_S / 2)  # a drain does not wait for it
    laptop.stop()
    laptop.start().wait_ready()
    wait_until("it to wait again", lambda: row(laptop, second)["waits"])
    assert row(laptop, second)["state"] == "queued"
    assert laptop.call("cancel", {"job": second})["state"] == "cancelled"


def test_a_job_starts_at_once_where_there_is_nothing_to_wait_for(laptop: Node, file: Path) -> None:
    write_hours(file, now() - 9 * HOUR, 300, 100)
    assert laptop.call("generate", ASKED | {"deferrable_s": 7200.0})["text"] == "hell"
    explained = laptop.call("plan", {"model": "echo", "policy": "carbon"})["explanation"]
    assert any("does not cover this hour: no job waits" in line for line in explained)
    refused = laptop.error("generate", ASKED | {"deferrable_s": 60.0, "policy": "latency"})
    assert refused.exit_code == 2
    assert "latency starts a job at once" in str(refused)
    assert refused.remedy == "add --policy carbon"
    assert len(laptop.call("jobs")["jobs"]) == 1  # it was not accepted


def test_carbon_is_refused_without_a_file(nodes: Nodes, tmp_path: Path) -> None:
    (node,) = nodes.start("laptop", plugins=("echo", "energy"))
    model = tmp_path / "echo.txt"
    model.write_text("edged-echo 1\n")
    node.add(model, "echo")
    refused = node.error("generate", ASKED)
    assert refused.exit_code == 2
    assert "policy 'carbon' is refused here: no plugin.energy.carbon_file" in str(refused)
