"""What a job costs, by a recorded power sensor: measured where every node has one, else estimated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import Document, Node, Nodes, install_plugin, pair_all

TOKEN_S, TOKENS = 0.06, 52  # longer than the shortest job that is measured
IDLE, LOAD, DRAWN = 4.0, 20.0, 12.0  # watts
RAIL = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
PLUGIN = """
import os, time
from pathlib import Path
from edged import DeviceState, EngineEntry, SensorEntry, hookimpl
from edged_plugins._echo_engine import EchoEngine
from edged_plugins.monitor import _power

@hookimpl
def edged_sensors(settings):
    root = Path(os.environ["TREE"])
    def read():
        watts = _power.jetson_watts(root)
        return DeviceState(power_watts=watts, power_source=None if watts is None else "ina3221")
    return [SensorEntry("recorded", read)]

@hookimpl
def edged_engines(settings):
    functions = [f"edged_plugins._echo_engine:{name}" for name in ("describe", "measure", "check")]
    return [EngineEntry("slow", "recorded_plugin:Slow", *functions)]

class Slow(EchoEngine):
    def finish(self):
        time.sleep(TOKEN_S)
        return super().finish()

    def follow(self, timeout_s):
        if self._channel.poll(0, timeout_s):
            super().follow(timeout_s)
""".replace("TOKEN_S", str(TOKEN_S))


def record(root: Path, watts: float) -> None:
    """A Jetson's input rail at 5 V."""
    rail = root / RAIL
    rail.mkdir(parents=True)
    files = {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": f"{watts * 200:.0f}"}
    for name, text in files.items():
        (rail / name).write_text(text)


@pytest.fixture
def pair(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    install_plugin(tmp_path / "plugin", monkeypatch, "recorded", PLUGIN)
    started = []
    for name in ("laptop", "jetson"):
        monkeypatch.setenv("TREE", str(tmp_path / name))
        record(tmp_path / name, DRAWN)
        watts = {"idle_watts": IDLE, "load_watts": LOAD}
        started += nodes.start(name, plugins=("recorded", "layer_parallel"), device=watts)
    pair_all(started)
    return started


def seconds_of(document: Document) -> tuple[float, float]:
    """From its first token to its last, and from its acceptance."""
    measured = document["measured"]
    decoding_s = (len(document["tokens"]) - 1) / measured["tokens_per_s"]
    return decoding_s, decoding_s + measured["ttft_ms"] / 1000


def test_a_job_is_measured_where_every_node_has_a_sensor_and_else_estimated(
    pair: list[Node], tmp_path: Path
) -> None:
    laptop = pair[0]
    (tmp_path / "model").write_text("edged-echo 1\n")
    laptop.add(tmp_path / "model", "m")
    plan = {"model": "m", "strategy": "layers", "nodes": ["laptop", "jetson"], "n": TOKENS}
    asked = plan | {"prompt": "Why is the sky blue?", "raw": True, "ignore_eos": True}
    (candidate,) = laptop.call("plan", plan)["candidates"]
    assert candidate["predicted"]["joules_source"] == "estimated"

    document = laptop.call("generate", asked)
    least_s, most_s = seconds_of(document)
    assert document["measured"]["joules_source"] == "measured"
    assert least_s < document["measured"]["joules"] / (2 * (DRAWN - IDLE)) < most_s + 1

    shutil.rmtree(tmp_path / "jetson")
    document = laptop.call("generate", asked)
    predicted, measured = document["plan"]["predicted"], document["measured"]
    assert measured["joules_source"] == "estimated"
    each = predicted["joules_per_token"] * measured["tpot_ms"] / predicted["tpot_ms"]
    assert measured["joules"] == pytest.approx(TOKENS * each)
