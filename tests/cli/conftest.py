"""Every test here has its own environment: no EDGED_HOME, no system service, homes in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_daemon import FakeDaemon

from edged import cli, client, identity
from edged.identity import Home

PROFILE = """version = 1
name = "test"  # kept
plugins = ["echo"]

[network]
# why here
interfaces = ["lo"]
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGED_HOME", raising=False)
    monkeypatch.delenv("EDGED_DEBUG", raising=False)
    for variable in ("HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        folder = tmp_path / variable[:5].lower().rstrip("_")
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.setattr(client, "SYSTEM_SOCKET", tmp_path / "system" / "control.sock")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An initialised home."""
    made = Home(tmp_path / "node")
    identity.create(made, "laptop", PROFILE, (b"p" * 32, b"s" * 32))
    return made


@pytest.fixture
def edged(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run one command line in this process."""

    def run(*arguments: object) -> Result:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def daemon(home: Home) -> Iterator[Callable[[Mapping[str, Any]], FakeDaemon]]:
    """Start the fake daemon of `home` with a table of answers."""
    started: list[FakeDaemon] = []

    def start(answers: Mapping[str, Any]) -> FakeDaemon:
        started.append(FakeDaemon(home.control_socket, answers))
        return started[-1]

    yield start
    for fake in started:
        fake.__exit__()
