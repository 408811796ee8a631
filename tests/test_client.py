"""The client of the control socket against a real UNIX socket, and the rules that find it."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edged import client as client_module
from edged import identity, wire
from edged.client import Client, connect, endpoint_of, find
from edged.errors import ConfigError, NoDaemonError, PolicyViolation, ProtocolError, TrustError
from edged.identity import Home

_SPEC = importlib.util.spec_from_file_location(
    "fake_daemon", Path(__file__).parent / "cli" / "fake_daemon.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
fake_daemon: Any = sys.modules.get("fake_daemon") or importlib.util.module_from_spec(_SPEC)
if "fake_daemon" not in sys.modules:
    sys.modules["fake_daemon"] = fake_daemon
    _SPEC.loader.exec_module(fake_daemon)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGED_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setattr(client_module, "SYSTEM_SOCKET", tmp_path / "system" / "control.sock")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "node")
    identity.create(made, "laptop", "version = 1\n", (b"p" * 32, b"s" * 32))
    return made


@pytest.fixture
def listen() -> Iterator[Callable[..., Any]]:
    """Start a fake daemon at a path."""
    started: list[Any] = []

    def start(path: Path, **answers: Any) -> Any:
        started.append(fake_daemon.FakeDaemon(path, answers))
        return started[-1]

    yield start
    for fake in started:
        fake.__exit__()


def drained(stream: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    events = []
    while True:
        try:
            events.append(next(stream))
        except StopIteration as end:
            return events, end.value


# --- asking -----------------------------------------------------------------------------------------


def test_a_call_answers_with_the_document(home: Home, listen: Any) -> None:
    fake = listen(home.control_socket, status={"name": "laptop"})
    with connect(home.path) as client:
        assert client.call("status") == {"name": "laptop"}
        assert client.call("status", {"more": [1, None]}) == {"name": "laptop"}
    assert fake.requests == [("status", {}), ("status", {"more": [1, None]})]


def test_a_stream_yields_its_events_and_returns_the_document(home: Home, listen: Any) -> None:
    def count(body: Any, emit: Any) -> Any:
        for number in range(3):
            emit({"event": "token", "index": number})
        return {"done": True}

    listen(home.control_socket, generate=count)
    with connect(home.path) as client:
        events, document = drained(client.stream("generate", {}))
        assert [event["index"] for event in events] == [0, 1, 2]
        assert document == {"done": True}
        assert client.call("generate") == {"done": True}


def test_what_is_left_of_a_stream_given_up_is_not_taken_for_another_answer(home: Home, listen: Any) -> None:
    def count(body: Any, emit: Any) -> Any:
        emit({"event": "token"})
        return {"of": "generate"}

    listen(home.control_socket, generate=count, status={"of": "status"})
    with connect(home.path) as client:
        next(client.stream("generate", {}))
        assert client.call("status") == {"of": "status"}


def test_an_error_is_raised_as_the_daemon_meant_it(home: Home, listen: Any) -> None:
    def refuse(body: Any, emit: Any) -> Any:
        raise PolicyViolation("a guest may not", remedy="ask")

    listen(home.control_socket, plan=refuse)
    with connect(home.path) as client, pytest.raises(PolicyViolation, match="a guest may not") as caught:
        client.call("plan")
    assert (caught.value.code, caught.value.remedy) == ("refused", "ask")


def test_open_files_travel_with_a_large_request(home: Home, listen: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    fake = listen(home.control_socket, add={})
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with connect(home.path) as client:
            drained(client.stream("add", {"padding": "x" * 3_000_000}, [descriptor]))
    finally:
        os.close(descriptor)
    assert fake.files == [b"content"]


def test_a_request_that_is_too_long_is_refused_here(home: Home, listen: Any) -> None:
    listen(home.control_socket)
    with connect(home.path) as client, pytest.raises(ProtocolError, match="at most"):
        client.call("generate", {"prompt": "x" * (wire.HEADER_BYTES_MAX + 1)})


def test_text_that_is_no_utf8_is_refused_here(home: Home, listen: Any) -> None:
    listen(home.control_socket)
    with connect(home.path) as client, pytest.raises(ConfigError, match="UTF-8"):
        client.call("generate", {"prompt": os.fsdecode(b"\xff")})


# --- a daemon that fails ----------------------------------------------------------------------------


def test_a_daemon_that_dies_before_its_answer_is_named(home: Home, listen: Any) -> None:
    def die(body: Any, emit: Any) -> Any:
        raise fake_daemon.HangUp

    listen(home.control_socket, status=die)
    with connect(home.path) as client, pytest.raises(NoDaemonError, match="it ended before") as caught:
        client.call("status")
    assert caught.value.code == "daemon-gone"
    assert f"edged run --home {home.path}" in caught.value.remedy


def test_a_daemon_that_stays_silent_is_given_up(home: Home, listen: Any) -> None:
    stop = fake_daemon.threading.Event()

    def hang(body: Any, emit: Any) -> Any:
        stop.wait(60)
        return {}

    listen(home.control_socket, status=hang)
    with connect(home.path) as client, pytest.raises(NoDaemonError, match="nothing came") as caught:
        client.call("status", silence_s=0.05)
    stop.set()
    assert caught.value.code == "no-answer"


NOISE = [
    struct.pack(">I", wire.HEADER_BYTES_MAX + 1),
    struct.pack(">I", 0),
    struct.pack(">I", 3) + b"abc",
    struct.pack(">I", 1) + b"\xc0",
]


@pytest.mark.parametrize("noise", NOISE)
def test_what_is_not_our_protocol_is_a_protocol_error(noise: bytes, home: Home, listen: Any) -> None:
    fake = listen(home.control_socket)

    def shout(body: Any, emit: Any) -> Any:
        fake._connections[0].sendall(noise)
        return {}

    fake.answers["status"] = shout
    with connect(home.path) as client, pytest.raises(ProtocolError):
        client.call("status")


def test_a_refusal_of_the_connection_itself_is_raised(home: Home, listen: Any) -> None:
    fake = listen(home.control_socket)

    def refuse(body: Any, emit: Any) -> Any:
        packed = wire.pack_error(ProtocolError("expected fewer files"), answers=0)
        fake._connections[0].sendall(struct.pack(">I", len(packed)) + packed)
        return {}

    fake.answers["status"] = refuse
    with connect(home.path) as client, pytest.raises(ProtocolError, match="fewer files"):
        client.call("status")


# --- finding ----------------------------------------------------------------------------------------


def own(tmp_path: Path) -> Home:
    """The user's own node, as `find` knows it."""
    made = Home(tmp_path / "data" / "edged")
    identity.create(made, "own", "version = 1\n", (b"p" * 32, b"s" * 32))
    return made


def test_a_chosen_home_is_taken_running_or_not(home: Home, listen: Any, tmp_path: Path) -> None:
    listen(own(tmp_path).control_socket)
    assert find(home.path) == endpoint_of(home)


def test_edged_home_comes_before_a_running_node(
    home: Home, listen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(own(tmp_path).control_socket)
    monkeypatch.setenv("EDGED_HOME", str(home.path))
    assert find(None).path == home.control_socket
    assert find(tmp_path / "other").path == Home(tmp_path / "other").control_socket


def test_the_users_own_node_comes_before_the_system_service(listen: Any, tmp_path: Path) -> None:
    listen(client_module.SYSTEM_SOCKET)
    listen(own(tmp_path).control_socket)
    assert find(None).path == own(tmp_path).control_socket


def test_the_system_service_is_taken_where_no_own_node_runs(listen: Any, tmp_path: Path) -> None:
    listen(client_module.SYSTEM_SOCKET)
    own(tmp_path)
    found = find(None)
    assert found.path == client_module.SYSTEM_SOCKET
    assert "systemctl start edged" in found.start


def test_a_dead_system_socket_is_not_taken(listen: Any, tmp_path: Path) -> None:
    listen(client_module.SYSTEM_SOCKET).__exit__()
    assert find(None).path == Home(tmp_path / "data" / "edged").control_socket


@pytest.mark.parametrize(("has_own", "takes_system"), [(False, True), (True, False)])
def test_a_system_service_that_is_closed_to_us_says_so_unless_there_is_an_own_node(
    has_own: bool, takes_system: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_own:
        own(tmp_path)

    def refuse(path: Path) -> Any:
        if path == client_module.SYSTEM_SOCKET:
            raise PermissionError(13, "Permission denied")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(client_module, "_open", refuse)
    monkeypatch.setattr(client_module, "_check_owner", lambda path: None)
    found = find(None)
    assert (found.path == client_module.SYSTEM_SOCKET) == takes_system
    with pytest.raises(TrustError if takes_system else NoDaemonError, match="expected"):
        Client(found)


def test_with_nothing_running_the_error_names_the_users_own_node(tmp_path: Path) -> None:
    with pytest.raises(NoDaemonError) as caught:
        connect(None)
    path = tmp_path / "data" / "edged"
    assert caught.value.remedy == f"start one: edged init --home {path} && edged run --home {path}"


def test_the_command_that_starts_a_daemon_can_be_pasted(tmp_path: Path) -> None:
    made = Home(tmp_path / "my node's home")
    identity.create(made, "a", "version = 1\n", (b"p" * 32, b"s" * 32))
    quoted = "'" + str(made.path).replace("'", "'\"'\"'") + "'"
    assert endpoint_of(made).start == f"edged run --home {quoted}"


def test_an_address_file_leads_to_the_socket(home: Home, listen: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "run" / "control.sock"
    (home.path / "control.addr").write_text(f"{elsewhere}\n")
    listen(elsewhere, status={"at": "elsewhere"})
    with connect(home.path) as client:
        assert client.call("status") == {"at": "elsewhere"}


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xff"])
def test_an_address_file_that_says_nothing_is_no_harm(content: bytes, home: Home) -> None:
    (home.path / "control.addr").write_bytes(content)
    assert endpoint_of(home).path == home.control_socket


def test_a_home_with_a_long_path_is_reached(listen: Any, tmp_path: Path) -> None:
    long = Home(tmp_path / ("n" * 90) / ("m" * 90))
    identity.create(long, "far", "version = 1\n", (b"p" * 32, b"s" * 32))
    assert not long.control_socket.is_relative_to(long.path)
    listen(long.control_socket, status={"name": "far"})
    with connect(long.path) as client:
        assert client.call("status") == {"name": "far"}


def test_an_address_that_no_socket_can_have_is_no_daemon(home: Home) -> None:
    (home.path / "control.addr").write_text("/" + "x" * 300)
    with pytest.raises(NoDaemonError):
        connect(home.path)


def test_a_socket_of_a_stranger_is_not_trusted(
    home: Home, listen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(home.control_socket)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 12345)
    if os.getuid() == 0:  # root's socket is everybody's to trust
        os.chown(home.control_socket, 54321, -1)
    with pytest.raises(TrustError, match="of this user"):
        connect(home.path)
