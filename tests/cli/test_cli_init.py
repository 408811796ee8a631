"""`edged init`: homes, profiles, and what is detected."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edged import config, identity
from edged.cli.detecting import device_class, first_party_plugins
from edged.cli.toml_text import with_value
from edged.identity import Home
from edged.transport import check_keys

BOARDS: list[tuple[dict[str, bytes], dict[str, str], str]] = [
    ({}, {}, "laptop-cpu"),
    ({"proc/device-tree/model": b"NVIDIA Jetson Orin Nano Developer Kit\0"}, {}, "jetson-orin-nano"),
    ({"etc/nv_tegra_release": b"# R36"}, {}, "jetson-orin-nano"),
    ({"proc/device-tree/model": b"Raspberry Pi 5 Model B Rev 1.0\0"}, {}, "raspberrypi-5"),
    ({"proc/device-tree/model": b"Raspberry Pi 3 Model B\0"}, {}, "laptop-cpu"),
    ({"proc/device-tree/model": b"\xff\xfe"}, {}, "laptop-cpu"),
    ({}, {"TERMUX_VERSION": "0.118"}, "phone-termux"),
    ({}, {"PREFIX": "/data/data/com.termux/files/usr"}, "phone-termux"),
    ({}, {"PREFIX": "/usr/local"}, "laptop-cpu"),
]


@pytest.mark.parametrize(("files", "environ", "expected"), BOARDS)
def test_the_device_class_is_detected(
    files: Mapping[str, bytes], environ: Mapping[str, str], expected: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    assert device_class(tmp_path, environ) == expected
    assert expected in config.shipped_names()


def test_init_makes_a_node(edged: Any, tmp_path: Path) -> None:
    path = tmp_path / "new home"
    result = edged("init", "--home", path, "--name", "laptop", "--interface", "lo", "--json")
    assert result.code == 0
    made = identity.load(Home(path))
    check_keys(made)
    profile = config.read(Home(path).profile)
    assert result.document == {
        "node_id": made.node_id,
        "name": "laptop",
        "home": str(path),
        "profile": profile.name,
        "profile_file": str(path / "profile.toml"),
    }
    assert profile.network.interfaces == ("lo",)
    assert "chosen by `edged init --interface`" in Home(path).profile.read_text()
    assert stat.S_IMODE(Home(path).key_file.stat().st_mode) == 0o600


def test_init_without_a_profile_enables_every_installed_plugin_that_loads(edged: Any, tmp_path: Path) -> None:
    assert edged("init", "--home", tmp_path / "n").code == 0
    names, troubles = first_party_plugins()
    assert config.read(tmp_path / "n" / "profile.toml").plugins == tuple(names)
    assert set(config.DEFAULT_PLUGINS) <= {*names, *troubles}


def test_init_again_changes_nothing_and_says_so(edged: Any, tmp_path: Path) -> None:
    first = edged("init", "--home", tmp_path / "n", "--name", "a", "--json")
    before = {file: file.read_bytes() for file in (tmp_path / "n").iterdir() if file.is_file()}
    again = edged("init", "--home", tmp_path / "n", "--name", "b", "--profile", "cloud-cpu", "--json")
    assert again.code == 0
    assert again.document == first.document
    assert "nothing was changed" in again.err
    assert before == {file: file.read_bytes() for file in (tmp_path / "n").iterdir() if file.is_file()}


def test_a_profile_that_was_lost_is_made_again(edged: Any, tmp_path: Path) -> None:
    first = edged("init", "--home", tmp_path / "n", "--json")
    (tmp_path / "n" / "profile.toml").unlink()
    assert edged("init", "--home", tmp_path / "n", "--json").document == first.document
    assert config.read(tmp_path / "n" / "profile.toml").name == first.document["profile"]


def test_a_profile_written_beforehand_is_kept(edged: Any, tmp_path: Path) -> None:
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "profile.toml").write_text('version = 1\nname = "mine"\n')
    assert edged("init", "--home", tmp_path / "n", "--json").document["profile"] == "mine"


@pytest.mark.parametrize("name", config.shipped_names())
def test_every_shipped_profile_makes_a_node(name: str, edged: Any, tmp_path: Path) -> None:
    result = edged("init", "--home", tmp_path / "n", "--profile", name, "--interface", "lo", "--json")
    assert result.code == 0
    assert result.document["profile"] == name


def test_a_profile_may_be_a_file(edged: Any, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('version = 1\nname = "my"  # mine\nplugins = []\n')
    result = edged("init", "--home", tmp_path / "n", "--profile", tmp_path / "my.toml", "--json")
    assert result.document["profile"] == "my"
    assert (tmp_path / "n" / "profile.toml").read_text() == (tmp_path / "my.toml").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--profile", "toaster"],
        ["--profile", "no/such/file.toml"],
        ["--profile", "broken.toml"],
        ["--name", "a\nb"],
        ["--interface", "nosuch0"],
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    options: list[str], edged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text('version = 1\nplugins = "all"\n')
    result = edged("init", "--home", tmp_path / "n", *options, "--json")
    assert result.code == 2
    assert result.document["error"]["code"] == "config"
    assert not (tmp_path / "n").exists()


def test_a_home_that_cannot_be_made_is_an_error(edged: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert edged("init", "--home", tmp_path / "file" / "n").code == 2


def test_edged_home_says_where(edged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_HOME", str(tmp_path / "other"))
    assert edged("init", "--json").document["home"] == str(tmp_path / "other")


# --- editing TOML text ------------------------------------------------------------------------------

TEXTS = [
    "",
    "[network]\n",
    "# top\n[network] # where\n# why\nport = 5  # fixed\n\n[jobs]\nqueue = 3\n",
    '[network]\ninterfaces = ["eth0"]  # old\nport = 5\n',
    '[network]\n  interfaces = [\n    "eth0",  # one\n    "wlan0",\n  ]\nport = 5\n[jobs]\nqueue = 3\n',
    '[jobs]\nqueue = 3\n[plugin.x]\ninterfaces = ["not mine"]\n',
    "[network]\nport = 5",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_set_and_everything_else_is_kept(text: str) -> None:
    edited = with_value(text, "network", "interfaces", ["lo", "eth1"], "because")
    expected = tomllib.loads(text)
    expected.setdefault("network", {})["interfaces"] = ["lo", "eth1"]
    assert tomllib.loads(edited) == expected
    assert "# because" in edited
    for comment in ("# top", "# where", "# why", "# fixed"):
        assert (comment in edited) == (comment in text)
    assert with_value(edited, "network", "interfaces", ["lo", "eth1"], "because") == edited


def test_a_value_of_the_root_stands_before_the_first_table() -> None:
    text = 'version = 1\n\n[plugin.x]\nplugins = ["y"]\n'
    assert tomllib.loads(with_value(text, "", "plugins", ["a"], "r")) == {
        "version": 1,
        "plugins": ["a"],
        "plugin": {"x": {"plugins": ["y"]}},
    }
    assert tomllib.loads(with_value("[a]\nb = 1\n", "", "version", 1, "r")) == {"version": 1, "a": {"b": 1}}
    assert tomllib.loads(with_value("[a]\nb = 1 # x\n", "a", "b", 2, "r")) == {"a": {"b": 2}}
