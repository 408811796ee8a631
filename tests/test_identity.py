"""A node's home: its key, who may read it, one daemon at a time, files whole or not at all."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged import identity
from edged.errors import ConfigError, InstanceError, TrustError
from edged.identity import SOCKET_PATH_BYTES_MAX, Home, Identity

settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")

KEYS = (b"p" * 32, b"s" * 32)
ID = identity.node_id_of(KEYS[0])


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    identity.create(made, "laptop", "version = 1\n", KEYS)
    return made


# --- ids ------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_a_node_id_stands_for_one_key(key: bytes) -> None:
    node_id = identity.node_id_of(key)
    assert identity.key_of(node_id) == key
    assert re.fullmatch("[a-z2-7]{52}", node_id)
    assert re.fullmatch("[a-z2-7]{32}", identity.fingerprint_of(node_id))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ID[:-1],
        ID + "a",
        ID.upper(),
        ID[:-1] + "b",
        "1" * 52,
        "ä" * 52,
        "ß" * 52,
        "ı" * 52,
        " " * 52,
        "=" * 52,
    ],
)
def test_what_is_no_node_id_is_refused(text: str) -> None:
    """Also a second spelling of the same key: a revoked one must not come back under another name."""
    with pytest.raises(TrustError, match="node id"):
        identity.key_of(text)


@given(
    st.text(min_size=52, max_size=52) | st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52)
)
def test_any_text_is_the_id_of_one_key_or_of_none(text: str) -> None:
    try:
        key = identity.key_of(text)
    except TrustError:
        return
    assert identity.node_id_of(key) == text


def test_an_identity_shows_no_key() -> None:
    mine = Identity("laptop", *KEYS)
    assert repr(mine) == f"Identity('laptop', {ID[:8]})"


# --- making and reading a home --------------------------------------------------------------------


def test_a_home_is_for_its_owner_alone(home: Home) -> None:
    for folder in (home.path, home.models, home.data, home.adapters, home.cache, home.plugin_state):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in (home.key_file, home.profile):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_existing_home_keeps_its_key_and_profile(home: Home) -> None:
    before = home.profile.read_text()
    again = identity.create(home, "other", "version = 2\n", (b"x" * 32, b"y" * 32))
    assert (again.name, again.public_key) == ("laptop", KEYS[0])
    assert home.profile.read_text() == before


def test_a_home_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a folder that can be made"):
        identity.create(Home(tmp_path / "file" / "home"), "laptop", "", KEYS)


@pytest.mark.parametrize("name", ["", " a", ".a", "a" * 64, "a/b", "a\nb", "a\0b"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a node name"):
        identity.check_name(name)


@pytest.mark.parametrize("name", ["a", "a" * 63, "Anna's"[:4], "living room", "küche", "pi-4.local"])
def test_a_name_is_what_a_person_calls_a_device(name: str) -> None:
    assert identity.check_name(name) == name


def test_a_home_without_a_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no node\.key") as caught:
        identity.load(Home(tmp_path))
    assert caught.value.remedy == f"edged init --home {tmp_path}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o666, 0o610])
def test_a_key_that_others_may_read_is_refused(home: Home, mode: int) -> None:
    home.key_file.chmod(mode)
    with pytest.raises(TrustError, match=f"expected mode 0600 on .*; it has 0{mode:o}") as caught:
        identity.load(home)
    assert caught.value.remedy == f"chmod 600 {home.key_file}"


RECORD = {"name": "laptop", "public": KEYS[0].hex(), "secret": KEYS[1].hex()}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00 no text",
        b"not json",
        b"[]",
        b"null",
        json.dumps({**RECORD, "public": "zz"}).encode(),
        json.dumps({**RECORD, "public": None}).encode(),
        json.dumps({**RECORD, "public": RECORD["public"][:-2]}).encode(),
        json.dumps({"name": "laptop", "public": RECORD["public"]}).encode(),
        json.dumps(RECORD).encode()[:-10],
    ],
)
def test_a_corrupted_key_is_refused_and_not_shown(home: Home, content: bytes) -> None:
    home.key_file.write_bytes(content)
    with pytest.raises(TrustError) as caught:
        identity.load(home)
    assert RECORD["secret"] not in f"{caught.value} {caught.value.remedy}"


def test_the_user_s_home_is_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("EDGED_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert identity.default_home().path == tmp_path / ".local" / "share" / "edged"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert identity.default_home().path == tmp_path / "data" / "edged"
    monkeypatch.setenv("EDGED_HOME", str(tmp_path / "mine"))
    assert identity.default_home().path == tmp_path / "mine"


# --- the socket's path ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10, SOCKET_PATH_BYTES_MAX - 13, SOCKET_PATH_BYTES_MAX, 400])
def test_a_home_of_any_depth_has_a_socket_that_can_be_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    root = Path("/") / "h" / Path(*["x" * 40] * (length // 41), "y" * max(1, length % 41 - 4))
    path = Home(root).control_socket
    assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX
    if len(os.fsencode(root / "control.sock")) <= SOCKET_PATH_BYTES_MAX:
        assert path == root / "control.sock"
    else:
        assert path.parent.parent == Path("/run/user/1000")
        assert path == Home(root).control_socket  # always the same
        assert path != Home(root / "other").control_socket


def test_a_relative_home_and_its_absolute_path_have_one_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("home", "x" * 120):
        assert Home(Path(name)).control_socket == Home(tmp_path / name).control_socket


def test_the_bound_of_a_socket_s_path_is_the_kernel_s(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        folder = tmp_path / "s"
        folder.mkdir()
        name = folder / ("x" * max(1, SOCKET_PATH_BYTES_MAX - len(os.fsencode(folder)) - 1))
        sock.bind(os.fspath(name))


# --- the lock -------------------------------------------------------------------------------------

HOLDS = """
import sys
from pathlib import Path
from edged import identity
identity.lock(identity.Home(Path(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_home_is_held_by_one_daemon_and_freed_by_its_death(home: Home) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin
    assert holder.stdout
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InstanceError, match=rf"a daemon runs there \(process {holder.pid}\)"):
            identity.lock(home)
    finally:
        holder.kill()
        holder.communicate()
    os.close(identity.lock(home))
    assert stat.S_IMODE((home.path / "lock").stat().st_mode) == 0o600


# --- membership and atomic writes -----------------------------------------------------------------


def test_a_membership_comes_back_and_a_new_home_has_none(home: Home) -> None:
    assert identity.read_membership(home) == {}
    identity.write_membership(home, {"version": 3})
    assert identity.read_membership(home) == {"version": 3}
    assert stat.S_IMODE(home.membership_file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"3", b'{"a": '])
def test_a_membership_that_is_none_is_refused(home: Home, content: bytes) -> None:
    """Not taken for empty: that would forget whom its owner revoked."""
    home.membership_file.write_bytes(content)
    with pytest.raises(TrustError):
        identity.read_membership(home)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    identity.write_atomically(path, b"old")

    def fails(descriptor: int) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        identity.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


WRITES_FOREVER = """
import sys
from pathlib import Path
from edged import identity
path = Path(sys.argv[1])
for number in range(10**9):
    identity.write_atomically(path, bytes([number % 256]) * 50_000)
    print(flush=True)
"""


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer = subprocess.Popen([sys.executable, "-c", WRITES_FOREVER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout
    try:
        for _ in range(40):
            assert writer.stdout.readline() == b"\n"
            content = path.read_bytes()
            assert len(content) == 50_000
            assert len(set(content)) == 1
    finally:
        writer.kill()
        writer.communicate()
    content = path.read_bytes()  # after a kill at any moment too
    assert (len(content), len(set(content))) == (50_000, 1)
