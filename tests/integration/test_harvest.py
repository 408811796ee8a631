"""Jobs by what batteries bear: nodes that say what they harvest, real daemons and recorded batteries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import Node, Nodes, install_plugin, pair_all
from test_energy import BATTERY, Recorded

ASKED = {"model": "echo", "prompt": "hello", "n": 4, "temperature": 0.0, "policy": "adaptive"}
WATTS = {"idle_watts": 0.0, "load_watts": 230.0}
LEVELS = {"reserve": 0.1, "resume": 0.2}
PLANS = 8


class Field:
    """Starts nodes with batteries of 100 kJ, as a plugin `recorded` reads them."""

    def __init__(self, nodes: Nodes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._nodes, self._folder, self._monkeypatch = nodes, folder, monkeypatch
        install_plugin(folder / "plugin", monkeypatch, "recorded", BATTERY)

    def start(self, name: str, **energy: Any) -> tuple[Node, Recorded]:
        tree = Recorded(self._folder / f"{name}-tree")
        (tree.root / "sys/class/power_supply/BAT0/energy_full").write_text(str(round(100e3 / 3600 * 1e6)))
        self._monkeypatch.setenv("TREE", str(tree.root))
        plugins = ("echo", "energy", "recorded")
        (node,) = self._nodes.start(name, plugins=plugins, device=WATTS, energy=LEVELS | energy)
        return node, tree


@pytest.fixture
def field(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Field:
    return Field(nodes, tmp_path, monkeypatch)


def add_echo(node: Node, folder: Path) -> None:
    file = folder / "echo.txt"
    file.write_text("edged-echo 1\n")
    node.add(file, "echo")


def drawn(plan: dict[str, Any]) -> str:
    return str(plan["candidates"][plan["chosen"]]["roles"][0]["name"])


def said(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate / sum(rates.values()):.1%}" for name, rate in rates.items())


def weights(plan: dict[str, Any]) -> str:
    return next(line for line in plan["explanation"] if line.startswith("Drawn by"))


def test_adaptive_draws_nodes_by_what_their_batteries_bear(
    field: Field, nodes: Nodes, tmp_path: Path
) -> None:
    (laptop,) = nodes.start("laptop", plugins=("echo", "energy"), energy={"policy": "adaptive"})
    sunny, light = field.start("sunny", harvest_watts=[0.0, 200.0])
    shaded, shade = field.start("shaded", harvest_watts=[0.0, 0.0])
    pair_all([laptop, sunny, shaded])
    add_echo(laptop, tmp_path)
    plans = [laptop.call("plan", {"model": "echo"}) for _ in range(PLANS)]
    bears = 0.332  # jobs a slot, the source's setting at 60 W; on mains 1, and 0 where nothing fills it
    assert said({"laptop": 1, "sunny": bears, "shaded": 0}) in weights(plans[-1])
    assert {drawn(plan) for plan in plans} <= {"laptop", "sunny"}
    light.says(39)  # its weakest mode: it keeps a third
    plan = laptop.call("plan", {"model": "echo"})
    assert said({"laptop": 1, "sunny": bears / 3, "shaded": 0}) in weights(plan)
    shade.says(39, is_plugged=True)  # a charger makes it a node on mains
    plan = laptop.call("plan", {"model": "echo", "policy": "long-term"})
    assert said({"laptop": 1, "sunny": bears, "shaded": 1}) in weights(plan)
    document = laptop.call("generate", ASKED)
    assert document["text"] == "hell"
    assert len(document["plan"]["roles"]) == 1


def test_a_node_that_cannot_say_what_its_battery_bears_is_left_out_with_the_reason(
    field: Field, nodes: Nodes, tmp_path: Path
) -> None:
    folder = tmp_path / "plugin"
    (folder / "numpy.py").write_text("raise ImportError('No module named numpy')\n")
    phone, _ = field.start("phone", harvest_watts=[0.0, 5.0])
    tablet, charger = field.start("tablet")
    add_echo(tablet, tmp_path)
    refused = tablet.error("generate", ASKED)
    assert (refused.code, refused.exit_code) == ("no-harvest", 6)
    assert "tablet: its profile says no harvest" in str(refused)
    assert "energy.harvest_watts" in refused.remedy
    charger.says(50, is_plugged=True)
    pair_all([tablet, phone])
    plan = tablet.call("plan", ASKED)
    assert drawn(plan) == "tablet"
    (reason,) = [c["refused_because"] for c in plan["candidates"] if c["refused_because"]]
    assert reason.startswith("phone: what its battery bears cannot be computed there")
    assert "No module named numpy" in reason
