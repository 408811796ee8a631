"""systemd's protocol, against a real datagram socket."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

import pytest

from edged import sdnotify


@pytest.mark.parametrize("is_abstract", [False, True], ids=["path", "abstract"])
def test_lines_arrive_in_one_datagram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool
) -> None:
    name = f"@edged-{uuid.uuid4()}" if is_abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if is_abstract else name)
        assert sdnotify.notify("READY=1", "STATUS=online")
        assert manager.recv(1000) == b"READY=1\nSTATUS=online"


def test_nothing_happens_where_no_manager_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sdnotify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not sdnotify.notify("READY=1")


@pytest.mark.parametrize(
    ("microseconds", "pid", "pause"),
    [
        (None, None, None),
        ("30000000", None, 15.0),
        ("30000000", "mine", 15.0),
        ("30000000", "1", None),
        ("", None, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_bites(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, pid: str | None, pause: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(os.getpid()) if value == "mine" else value)
    assert sdnotify.watchdog_s() == pause
