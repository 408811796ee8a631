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
QUEUE_FIELDS = ("queue", "waiting", "waiting_mean_s", "waiting_p95_s", "turnaround_mean_s")
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


def test_jobs_wait_where_the_scenario_has_a_queue(small: Path, edged: Any) -> None:
    words = SMALL.replace("arrival = 0.5", 'arrival = 1.0\nqueue = "fcfs"\nqueue_max = 4')
    small.write_text(words.replace("slots = 1,", "slots = 3,"))
    found = edged("simulate", str(small), "--json").document
    assert found["jobs_done"] + found["dropped"] + found["waiting"] == 50
    queue, waiting, middle, most, turnaround = (found[name] for name in QUEUE_FIELDS)
    assert (queue, waiting) == ("fcfs", 4)
    assert 0 < middle <= most <= 4 * 3 / 2 * 100
    assert turnaround == pytest.approx(middle + 300)


def test_nothing_waited_where_nothing_ended(small: Path, edged: Any) -> None:
    small.write_text(SMALL.replace("arrival = 0.5", "arrival = 0"))
    found = edged("simulate", str(small), "--json").document
    assert [found[name] for name in QUEUE_FIELDS] == ["drop", 0, None, None, None]


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("kind", ["batteries", "mains", "one slot"])
def test_a_run_is_drawn(kind: str, ending: str, small: Path, tmp_path: Path, edged: Any) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib, of the extra plan")
    words = {
        "batteries": SMALL.replace("slots = 50", 'slots = 50\nqueue = "skip-join"'),
        "mains": SMALL.replace("capacity_joules = 10e3\nharvest_joules = [0, 2000]\n", "failure = 0.1\n"),
        "one slot": SMALL.replace("slots = 50", "slots = 1"),
    }
    small.write_text(words[kind])
    path = tmp_path / f"plot.{ending}"
    result = edged("simulate", str(small), "--plot", str(path), "--json")
    assert result.code == 0, result.err
    drawn = path.read_bytes()
    assert drawn[:5] in (b"\x89PNG\r", b"<?xml")
    if ending == "svg":
        said = {"battery, %", "jobs", "devices, %", "time, hours", "busy"}
        said |= {"waiting"} if kind == "batteries" else {"failed"} if kind == "mains" else set()
        assert not {words for words in said if f"<!-- {words} -->" not in drawn.decode()}


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (("arrival = 0.5", "arrival = 2"), (), "arrival from 0 to 1"),
        (("count = 2", "count = 0"), (), "at least one device"),
        (("count = 2", "count = -2"), (), "count of 0 or more in scenario 'two'; -2 came"),
        (("capacity_joules = 10e3", "capacity_joules = -1"), (), "capacity_joules of 0 or more"),
        (("joules = 900", "joules = -900"), (), "joules of a job of 0 or more"),
        (("slots = 50", "slots = -50"), (), "slots from 1 to ten million"),
        (("slots = 50", "slot = 50"), (), "did you mean slots"),
        (("count = 2", "number = 2"), (), "no setting devices[1].number"),
        (("joules = 900", "joule = 900"), (), "did you mean"),
        (("slots = 50", 'slots = 50\nqueue = "lifo"'), (), "queue of drop, fcfs, mlfq, skip-join"),
        (("slots = 50", "slots = 50\nqueue_max = -1"), (), "queue_max from 0"),
        (("slots = 50", "slots = 50\nlengths = [[1, 0.8], [8, 0.1]]"), (), "lengths as pairs"),
        (("slots = 50", "slots = 50\nlengths = [[1.5, 1]]"), (), "a whole number for lengths"),
        (('policy = "uniform"', 'policy = "best"'), (), "no policy 'best'; loaded: adaptive"),
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
    message = "no scenario 'nowhere.toml'; edged brings: evening, harvest, home, phones, solar"
    assert result.document["error"]["message"] == message
