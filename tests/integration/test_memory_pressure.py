"""A node whose memory runs short gives back what no job uses, and no job notices."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import WORK, Node, Nodes, install_plugin, pair_all, wait_no_workers, wait_until

ASKED = {"model": "smol", "prompt": "Why is the sky blue?", "n": 6, "temperature": 0.0, "ignore_eos": True}
GAUGE = """
import os
from edged import DeviceState, SensorEntry, hookimpl

@hookimpl
def edged_sensors(settings):
    def read():
        free = int(open(os.environ["GAUGE"]).read())
        return DeviceState(memory_total=8 << 30, memory_free=free)
    return [SensorEntry("gauge", read)]
"""


@pytest.fixture
def gauge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that says how much memory is free, read by a plugin `gauge`."""
    install_plugin(tmp_path / "plugin", monkeypatch, "gauge", GAUGE)
    file = tmp_path / "free"
    file.write_text(str(4 << 30))
    monkeypatch.setenv("GAUGE", str(file))
    return file


def conditions(node: Node) -> list[str]:
    return [row["code"] for row in node.call("status")["conditions"]]


def test_idle_workers_end_when_memory_runs_short_and_the_next_job_loads_anew(
    nodes: Nodes, smol: Path, gauge: Path
) -> None:
    laptop = nodes.start("laptop", plugins=WORK)[0]
    phone = nodes.start("phone", plugins=(*WORK, "gauge"))[0]
    pair_all([laptop, phone])
    laptop.add(smol, "smol")
    asked = ASKED | {"strategy": "layers", "nodes": ["laptop", "phone"]}
    tokens = laptop.call("generate", asked)["tokens"]
    assert phone.workers()

    busy = laptop.job(asked | {"n": 1500}).until_token()
    gauge.write_text(str(100 << 20))
    wait_until("the phone to say that memory is short", lambda: "memory-short" in conditions(phone))
    assert phone.workers()  # a job uses them
    laptop.call("cancel", {"job": busy.job_id})
    busy.document()
    wait_no_workers(phone, laptop)

    gauge.write_text(str(4 << 30))
    wait_until("the phone to have memory again", lambda: "memory-short" not in conditions(phone))
    again = laptop.call("generate", asked)
    assert again["tokens"] == tokens
    assert again["measured"]["load_ms"] > 0
