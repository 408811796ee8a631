"""Wrong command lines, help, and the ways a command may end."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from edged import cli
from edged.cli import node, options
from edged.errors import ConfigError

USAGE = [
    (["statsu"], "no such command 'statsu'"),
    (["status", "--jsn"], "no such option: --jsn"),
    (["status", "more"], "unexpected extra argument"),
    (["join"], "missing argument"),
    (["generate", "--model", "m"], "missing option '--prompt'"),
    (["generate", "--prompt", "p"], "missing option '--model'"),
    (["generate", "--model", "m", "--prompt", "p", "-n", "many"], "invalid value"),
    (["models", "lst"], "no such command 'lst'"),
]


@pytest.mark.parametrize(("line", "words"), USAGE, ids=[" ".join(line) for line, _ in USAGE])
def test_a_wrong_command_line_is_one_line_and_exit_2(line: list[str], words: str, edged: Any) -> None:
    result = edged(*line)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("edged: ")
    assert words in result.err.lower()
    assert result.err.count("\n") == 1
    assert "--help`" in result.err


@pytest.mark.parametrize(("line", "words"), USAGE, ids=[" ".join(line) for line, _ in USAGE])
def test_a_wrong_command_line_is_a_document_with_json(line: list[str], words: str, edged: Any) -> None:
    result = edged(*line, "--json")
    assert result.code == 2
    error = result.document["error"]
    assert set(error) == {"code", "message", "remedy"}
    assert error["code"] == "usage"
    assert words in error["message"].lower()


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_and_takes_home_and_json(name: str, edged: Any) -> None:
    words = [name, "ls"] if name in ("models", "data", "adapters") else [name]
    result = edged(*words, "--help")
    assert result.code == 0
    assert "--home" in result.out
    assert "--json" in result.out


def test_the_contracts_commands_are_all_there(edged: Any) -> None:
    named = (
        "init run status peers invite join trust forget drain plugins profile models data plan recommend "
        "generate chat jobs cancel finetune adapters simulate bench config check demo"
    )
    assert sorted(cli.COMMANDS) == sorted(named.split())
    result = edged()
    assert result.code == 0
    for name in named.split():
        assert f"\n  {name} " in result.out


def test_help_loads_neither_the_daemon_nor_any_heavy_library() -> None:
    code = "import sys; from edged import cli; cli.main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    for name in ("zmq", "asyncio", "rich", "msgpack", "edged.daemon", "edged.wire", "zeroconf", "numpy"):
        assert f"'{name}'" not in loaded


def test_version_is_printed(edged: Any) -> None:
    assert edged("--version").out == "edged 0.1.0\n"


def test_common_options_may_stand_before_the_command(home: Any, daemon: Any, edged: Any) -> None:
    daemon({"models.ls": {"models": []}})
    assert edged("--home", home.path, "--json", "models", "ls").document == {"models": []}


ARGUMENTS = [
    ["invite", "--ttl", "ten"],
    ["invite", "--ttl", "0s"],
    ["invite", "--rights", "fly"],
    ["invite", "--zone", "mine"],
    ["trust", "phone", "--rights", "submit,"],
    ["join", " "],
    ["jobs", "--follow"],
    ["jobs", "rm"],
    ["jobs", "a", "--jsonl"],
    ["jobs", "a", "--follow", "--jsonl"],
    ["jobs", "a", "b"],
    ["generate", "--model", "m", "--prompt", ""],
    ["generate", "--model", "m", "--prompt", "p", "-n", "0"],
    ["generate", "--model", "m", "--prompt", "p", "--temperature", "nan"],
    ["generate", "--model", "m", "--prompt", "p", "--temperature", "-1"],
    ["generate", "--model", "m", "--prompt", "p", "--top-k", "-1"],
    ["generate", "--model", "m", "--prompt", "p", "--top-p", "0"],
    ["generate", "--model", "m", "--prompt", "p", "--seed", "-1"],
    ["generate", "--model", "m", "--prompt", "p", "--numerics", "slow"],
    ["generate", "--model", "m", "--prompt", "p", "--recovery", "never"],
    ["generate", "--model", "m", "--prompt", "p", "--nodes", "a,,b"],
    ["generate", "--model", "m", "--prompt", "p", "--shares", "2:x"],
    ["generate", "--model", "m", "--prompt", "p", "--jsonl"],
    ["chat", "-n", "0"],
    ["demo", "--nodes", "1"],
    ["demo", "--nodes", "99"],
]


@pytest.mark.parametrize("line", ARGUMENTS, ids=[" ".join(line) for line in ARGUMENTS])
def test_a_bad_value_is_refused_before_a_daemon_is_asked(line: list[str], edged: Any) -> None:
    result = edged(*line, "--json")
    assert result.code == 2
    assert result.document["error"]["code"] == "config"
    assert result.document["error"]["remedy"]
    assert result.err.startswith("edged: expected ")


def test_nodes_and_shares_are_read() -> None:
    assert options.nodes("laptop, phone") == ["laptop", "phone"]
    assert options.nodes(None) is None
    assert options.shares("2:1", ["a", "b"]) == [2.0, 1.0]
    assert options.shares("0.5:1:1", None) == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2:1", ["a"]),
        ("2", ["a", "b"]),
        ("0:1", None),
        ("-1:1", None),
        ("inf:1", None),
        ("", None),
        ("1:", None),
    ],
)
def test_shares_that_cannot_be_are_refused(text: str, names: list[str] | None) -> None:
    with pytest.raises(ConfigError, match="--shares"):
        options.shares(text, names)


@pytest.mark.parametrize("text", ["", ",", "a,a", "a,"])
def test_nodes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--nodes"):
        options.nodes(text)


def test_the_unexpected_is_one_line_and_exit_1(
    edged: Any, monkeypatch: pytest.MonkeyPatch, home: Any
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr(node, "ask", broken)
    result = edged("status", "--json")
    assert result.code == 1
    assert result.document["error"]["code"] == "error"
    assert result.err.count("\n") == 1
    assert "EDGED_DEBUG=1" in result.err
    monkeypatch.setenv("EDGED_DEBUG", "1")
    assert "Traceback" in edged("status").err


def test_a_reader_that_left_is_no_error_of_ours(home: Any, daemon: Any) -> None:
    daemon({"jobs": {"jobs": []}})
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "edged.cli", "jobs", "--home", str(home.path), "--json"]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b""
