"""The guards themselves: each kind of leak fails the test that leaks, and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

CONFTEST = """
import guards
from guards import loopback_only, no_leaks
guards.GRACE_S = 0.2
"""

LEAKS = """
import asyncio, socket, subprocess, sys, threading
kept = []

def test_process(): kept.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
def test_thread(): threading.Thread(target=threading.Event().wait, daemon=True).start()
def test_socket(): kept.append(socket.socket())

def test_task():
    loop = asyncio.new_event_loop()
    kept.append((loop, loop.create_task(asyncio.sleep(60))))

def test_clean(): pass

def test_reaches_out():
    with socket.socket() as sock:
        sock.connect(("192.0.2.1", 9))

def test_listens_everywhere():
    with socket.socket() as sock:
        sock.bind(("", 0))

def test_stays_at_home():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))

def teardown_module():
    kept[0].stdin.close(); kept[0].wait()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of a module that leaks."""
    folder = tmp_path_factory.mktemp("leaks")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_leaks.py").write_text(LEAKS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        folder,
        folder,
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(HERE), "COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.stdout


@pytest.mark.parametrize("kind", ["process", "thread", "socket", "task"])
def test_what_a_test_leaves_behind_fails_it(outcome: str, kind: str) -> None:
    error = f"ERROR test_leaks.py::test_{kind} - Failed: the test left behind: "
    line = next(line for line in outcome.splitlines() if line.startswith(error))
    assert f" {kind}" in line.removeprefix(error.rstrip())


@pytest.mark.parametrize("name", ["reaches_out", "listens_everywhere"])
def test_a_test_that_leaves_loopback_fails(outcome: str, name: str) -> None:
    assert f"FAILED test_leaks.py::test_{name} - Failed: a test reaches loopback only" in outcome


@pytest.mark.parametrize("name", ["clean", "stays_at_home"])
def test_a_test_that_leaves_nothing_passes(outcome: str, name: str) -> None:
    assert f"PASSED test_leaks.py::test_{name}" in outcome
    assert f"ERROR test_leaks.py::test_{name}" not in outcome
