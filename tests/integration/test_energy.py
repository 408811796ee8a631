"""A node whose battery runs down gives its work away, without a token lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import WORK, Node, Nodes, install_plugin, pair_all, wait_until

ASKED = {
    "model": "smol",
    "prompt": "Why is the sky blue?",
    "n": 550,
    "temperature": 0.0,
    "ignore_eos": True,
    "numerics": "exact",
}
BATTERY = """
import os
from pathlib import Path
from edged import DeviceState, SensorEntry, hookimpl
from edged_plugins.monitor import _battery

@hookimpl
def edged_sensors(settings):
    root = Path(os.environ["TREE"])
    return [SensorEntry("recorded", lambda: DeviceState(battery=_battery.battery(root)))]
"""


class Recorded:
    """A laptop's power_supply tree, which a plugin `recorded` reads with the monitor's own reader."""

    def __init__(self, root: Path) -> None:
        self.root = root
        supply = root / "sys/class/power_supply"
        for name, files in {"BAT0": {"type": "Battery"}, "AC": {"type": "Mains"}}.items():
            (supply / name).mkdir(parents=True)
            for file, text in files.items():
                (supply / name / file).write_text(text)
        self.says(80)

    def says(self, percent: int, *, is_plugged: bool = False) -> None:
        supply = self.root / "sys/class/power_supply"
        (supply / "AC/online").write_text(str(int(is_plugged)))
        (supply / "BAT0/status").write_text("Charging" if is_plugged else "Discharging")
        (supply / "BAT0/capacity").write_text(str(percent))


@pytest.fixture
def battery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    install_plugin(tmp_path / "plugin", monkeypatch, "recorded", BATTERY)
    monkeypatch.setenv("TREE", str(tmp_path / "tree"))
    return Recorded(tmp_path / "tree")


def is_saving(node: Node) -> bool:
    return "saving" in [row["code"] for row in node.call("status")["conditions"]]


@pytest.mark.slow
def test_a_draining_battery_moves_a_running_generation_and_no_token_changes(
    nodes: Nodes, smol: Path, battery: Recorded
) -> None:
    laptop = nodes.start("laptop", plugins=WORK)[0]
    phone = nodes.start("phone", plugins=(*WORK, "recorded"))[0]
    pair_all([laptop, phone])
    laptop.add(smol, "smol")
    undisturbed = laptop.call("generate", ASKED | {"strategy": "local"})
    job = laptop.job(ASKED | {"strategy": "layers", "nodes": ["laptop", "phone"]}).until_token()
    battery.says(12)
    document = job.document()
    assert document["tokens"] == undisturbed["tokens"]
    assert document["text"] == undisturbed["text"]
    (move,) = document["measured"]["recoveries"]
    assert move["lost"] == phone.call("status")["node_id"]
    assert "battery" in move["reason"]
    assert 0 < move["at_token"] < ASKED["n"]
    assert document["plan"]["epoch"] == 2
    assert [role["name"] for role in document["plan"]["roles"]] == ["laptop"]
    wait_until("the phone to have no worker", lambda: not phone.workers())
    refused = laptop.error("generate", ASKED | {"strategy": "layers", "nodes": ["laptop", "phone"]})
    assert "battery is below its reserve" in str(refused)
    battery.says(13, is_plugged=True)
    wait_until("the phone to work again", lambda: not is_saving(phone))
    again = laptop.call("generate", ASKED | {"n": 8, "strategy": "layers", "nodes": ["laptop", "phone"]})
    assert again["tokens"] == undisturbed["tokens"][:8]


@pytest.mark.slow
def test_a_strict_job_stays_where_it_was_put(nodes: Nodes, smol: Path, battery: Recorded) -> None:
    laptop = nodes.start("laptop", plugins=WORK)[0]
    phone = nodes.start("phone", plugins=(*WORK, "recorded"))[0]
    pair_all([laptop, phone])
    laptop.add(smol, "smol")
    asked = ASKED | {"strategy": "remote", "nodes": ["phone"], "strict": True, "numerics": "fast", "n": 1200}
    job = laptop.job(asked).until_token()
    battery.says(12)
    wait_until("the phone to save", lambda: is_saving(phone))
    document = job.document()
    assert document["measured"]["recoveries"] == []
    assert len(document["tokens"]) == 1200
