"""`edged simulate`: the shipped scenarios, a person's own file, and wrong ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = sorted(
    file.stem for file in (Path(__file__).parents[2] / "profiles" / "scenarios").glob("*.toml")
)
FIELDS = {"policy", "jobs_done", "dropped", "downtime", "mean_battery", "joules", "first_dead_s", "seed"}
SMALL = """
name = "two"
arrival = 0.5
slots = 50
policy = "uniform"

[[devices]]
name = "pair"
count = 2
capacity_joules = 10e3
harvest_joules = [0, 2000]
modes = [{ slots = 1, joules = 900 }]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_shipped_scenario_runs(name: str, edged: Any) -> None:
    result = edged("simulate", name, "--json")
    assert result.code == 0, result.err
    assert result.document.keys() >= FIELDS
    assert result.document["jobs_done"] > 0


def test_a_seed_gives_the_same_again(small: Path, edged: Any) -> None:
    first, again, other = (edged("simulate", str(small), "--seed", s, "--json").document for s in "113")
    assert first == again
    assert first["joules"] != other["joules"]


def test_a_policy_named_by_hand_takes_the_place_of_the_scenario_s(small: Path, edged: Any) -> None:
    assert edged("simulate", str(small), "--policy", "latency", "--json").document["policy"] == "latency"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_run_is_drawn(small: Path, tmp_path: Path, ending: str, edged: Any) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib, of the extra plan")
    path = tmp_path / f"plot.{ending}"
    assert edged("simulate", str(small), "--plot", str(path), "--json").code == 0
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (("arrival = 0.5", "arrival = 2"), (), "arrival from 0 to 1"),
        (("count = 2", "count = 0"), (), "at least one device"),
        (("slots = 50", "slot = 50"), (), "did you mean slots"),
        (("arrival = 0.5", ""), (), "arrival"),
        (("[[devices]]", "[[devices"), (), "TOML"),
        (("[0, 2000]", "[0]"), (), "harvest_joules"),
        (("", ""), ("--policy", "best"), "no policy 'best'; loaded: adaptive"),
        (("", ""), ("--policy", "carbon"), "'carbon' cannot be simulated: no plugin.energy.carbon_file"),
        (("", ""), ("--plot", "x.gif"), "ends in .png or .svg"),
    ],
)
def test_a_wrong_scenario_says_what_is_wrong(
    change: tuple[str, str], words: tuple[str, ...], said: str, tmp_path: Path, edged: Any
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(*change) if change[0] else SMALL)
    result = edged("simulate", str(path), *words, "--json")
    assert result.code == 2
    assert said in result.document["error"]["message"]


def test_a_scenario_that_is_not_there_is_named(edged: Any) -> None:
    result = edged("simulate", "nowhere.toml", "--json")
    assert result.code == 2
    assert "nowhere.toml" in result.document["error"]["message"]
