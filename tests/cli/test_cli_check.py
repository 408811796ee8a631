"""`edged check`, `edged config`, `edged bench`: what needs no daemon."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edged import identity, transport
from edged.cli import bench, check
from edged.config import Profile
from edged.identity import Home

STATUS = {"state": "online"}


@pytest.fixture
def sound(tmp_path: Path) -> Home:
    """A home with nothing wrong."""
    made = Home(tmp_path / "sound")
    text = 'version = 1\nplugins = ["echo"]\n[network]\ninterfaces = ["lo"]\n'
    identity.create(made, "laptop", text, transport.new_keys())
    return made


def failures(result: Any) -> dict[str, str]:
    return {row["name"]: row["text"] for row in result.document["checks"] if not row["ok"]}


def test_a_sound_node_passes(sound: Home, edged: Any) -> None:
    result = edged("check", "--home", sound.path, "--json")
    assert failures(result) == {}
    assert result.code == 0
    assert all(set(row) == {"name", "ok", "text", "remedy"} for row in result.document["checks"])
    person = edged("check", "--home", sound.path)
    assert person.code == 0
    assert "plugin echo" in person.out


def rewrite(text: str) -> Callable[[Home], None]:
    def damage(home: Home) -> None:
        home.profile.write_text(text)

    return damage


def chmod(name: str, mode: int) -> Callable[[Home], None]:
    def damage(home: Home) -> None:
        (home.path / name).chmod(mode)

    return damage


def swap_keys(home: Home) -> None:
    text = home.key_file.read_text()
    home.key_file.write_text(text.replace(identity.load(home).public_key.hex(), "ab" * 32))


DAMAGES: list[tuple[str, Callable[[Home], None]]] = [
    ("home", chmod(".", 0o755)),
    ("keys", chmod("node.key", 0o644)),
    ("keys", swap_keys),
    ("keys", lambda home: home.key_file.unlink()),
    ("profile", rewrite("version = 1\nplugin = 3\n")),
    ("profile", lambda home: home.profile.unlink()),
    ("plugin nosuch", rewrite('version = 1\nplugins = ["nosuch"]\n')),
    ("plugin static", rewrite('version = 1\nplugins = ["static"]\n[plugin.static]\npeers = ["x"]\n')),
    ("interfaces", rewrite('version = 1\nplugins = []\n[network]\ninterfaces = ["nosuch0"]\n')),
    ("encryption", rewrite('version = 1\nplugins = []\n[network]\nencryption = "disabled"\n')),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damage_is_found_with_its_remedy(
    name: str, damage: Callable[[Home], None], sound: Home, edged: Any
) -> None:
    damage(sound)
    result = edged("check", "--home", sound.path, "--json")
    assert result.code == 1
    assert list(failures(result)) == [name]
    assert next(row for row in result.document["checks"] if row["name"] == name)["remedy"]


def test_a_home_that_is_not_there_is_found(edged: Any, tmp_path: Path) -> None:
    result = edged("check", "--home", tmp_path / "none", "--json")
    assert result.code == 1
    assert set(failures(result)) == {"home", "keys", "profile"}


def test_a_port_that_is_taken_is_found_unless_our_daemon_has_it(sound: Home, edged: Any, daemon: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sound.profile.write_text(
            f'version = 1\nplugins = []\n[network]\ninterfaces = ["lo"]\nport = {port}\n'
        )
        assert set(failures(edged("check", "--home", sound.path, "--json"))) == {"port"}


def test_a_running_daemon_is_asked(home: Home, edged: Any, daemon: Any) -> None:
    daemon({"status": STATUS})
    rows = edged("check", "--home", home.path, "--json").document["checks"]
    assert next(row for row in rows if row["name"] == "daemon")["text"] == "a daemon answers, online"
    assert not [row for row in rows if row["name"] == "port"]


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = Profile(plugins=("shard",))
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    found = check.libraries(profile)
    assert not found.ok
    assert "edged[llama]" in found.remedy
    assert check.libraries(Profile(plugins=())).ok


def test_a_clock_that_was_never_set_is_found() -> None:
    assert not check.clock(0.0).ok
    assert check.clock(1.8e9).ok


# --- config -----------------------------------------------------------------------------------------


def test_config_says_each_value_and_where_it_came_from(home: Home, edged: Any) -> None:
    result = edged("config", "--explain", "--home", home.path, "--json")
    found = {row["key"]: row for row in result.document["settings"]}
    assert found["network.interfaces"]["value"] == ["lo"]
    assert found["network.interfaces"]["origin"] == str(home.profile)
    assert found["jobs.queue"]["origin"] == "default"
    assert "default" in edged("config", "--explain", "--home", home.path).out
    assert "default" not in edged("config", "--home", home.path).out


def test_config_names_the_mistake_in_a_profile(home: Home, edged: Any) -> None:
    home.profile.write_text("version = 1\nplugin = 3\n")
    result = edged("config", "--home", home.path, "--json")
    assert result.code == 2
    assert "plugin" in result.document["error"]["message"]


# --- bench ------------------------------------------------------------------------------------------


def test_a_benchmark_runs_from_a_checkout(
    edged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (tmp_path / "beside.py").write_text("ROWS = [{'ratio': 2.0}]\n")
    (tmp_path / "fast.py").write_text(
        "import beside\ndef main(out):\n    print('working')\n"
        "    return {'name': 'fast', 'commit': 'c', 'machine': 'm', 'rows': beside.ROWS}\n"
    )
    result = edged("bench", "fast", "--out", tmp_path / "out.json", "--json")
    assert result.document["rows"] == [{"ratio": 2.0}]
    assert result.err == "working\n"
    assert '"ratio": 2.0' in (tmp_path / "out.json").read_text()
    assert "ratio" in edged("bench", "fast").out


@pytest.mark.parametrize(("folder", "words"), [("none", "checkout"), ("", "no benchmark 'fast'")])
def test_a_benchmark_that_is_not_there_is_exit_2(
    folder: str, words: str, edged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path / folder)
    result = edged("bench", "fast", "--json")
    assert result.code == 2
    assert words in result.document["error"]["message"]
