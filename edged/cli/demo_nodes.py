"""The demo's nodes: homes in a temporary folder, one daemon process each, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..client import Client, endpoint_of
from ..errors import EdgedError, NoDaemonError
from ..identity import Home
from .init import make, profile_text, with_interfaces
from .output import Document, note
from .toml_text import with_value

WAIT_S = 90.0  # for a step that takes seconds; a slow board under load is slow
POLL_S = 0.2
STOP_S = 5.0  # after each of SIGTERM, the second SIGTERM and SIGKILL
LOG_LINES = 15
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the demo."""

    name: str
    node_id: str
    home: Home
    log: Path
    process: subprocess.Popen[bytes]

    def client(self) -> Client:
        return Client(endpoint_of(self.home))

    def ask(self, kind: str, body: Document | None = None) -> Document:
        with self.client() as client:
            return client.call(kind, body)


@contextlib.contextmanager
def running(names: Sequence[str], threads: int | None = None) -> Iterator[list[Node]]:
    """Nodes of these names, started; stopped at the end. Their homes stay where something failed.

    `threads` of each worker; by default the processor's are shared out.
    """
    profile = _profile(len(names), threads)
    folder = Path(tempfile.mkdtemp(prefix="edged-demo-"))
    nodes: list[Node] = []
    try:
        for name in names:
            nodes.append(_start(folder, name, profile))
        yield nodes
    except EdgedError as error:
        ended = [node for node in nodes if node.process.returncode is not None]
        _stop(nodes)
        for culprit in (ended or nodes)[:1]:
            _show_log(culprit)
            read = f"read {culprit.log}; the homes are kept in {folder}"
            error.remedy = f"{error.remedy}; {read}" if error.remedy else read
        raise
    except BaseException:
        _stop(nodes)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        _stop(nodes)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(what: str, nodes: Sequence[Node], holds: Callable[[Node], bool]) -> None:
    """Wait until `holds` for every node. EdgedError names the node whose turn it was."""
    deadline = time.monotonic() + WAIT_S
    for node in nodes:
        while not _holds(holds, node):
            _check_alive(nodes)
            if time.monotonic() > deadline:
                raise EdgedError(f"expected {node.name} {what} within {WAIT_S:g} s; it did not", code="demo")
            time.sleep(POLL_S)


def answers(node: Node) -> bool:
    return node.ask("status").get("state") == "online"


def _holds(holds: Callable[[Node], bool], node: Node) -> bool:
    try:
        return holds(node)
    except NoDaemonError:  # not yet; if it has ended, its process says so
        return False


def _profile(count: int, threads: int | None) -> str:
    """This device's profile, on loopback, its processor shared between the nodes."""
    text = with_interfaces(profile_text(None), ["lo"])
    threads = threads or max(1, (os.cpu_count() or 1) // count)
    return with_value(text, "budget", "threads", threads, f"one of {count} nodes of `edged demo`")


def _start(folder: Path, name: str, profile: str) -> Node:
    home, log = Home(folder / name), folder / f"{name}.log"
    document = make(home, name, profile)
    command = [sys.executable, "-m", "edged.cli", "run", "--home", str(home.path)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the demo, which then stops them in order
            preexec_fn=_end_with_parent(),
        )
    return Node(name, document["node_id"], home, log, process)


def _end_with_parent() -> Callable[[], None]:
    """A demo that is killed takes its nodes along. No thread runs here yet, so preexec_fn is safe."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _check_alive(nodes: Sequence[Node]) -> None:
    for node in nodes:
        code = node.process.poll()
        if code is not None:
            raise EdgedError(f"expected {node.name} to run; it ended with {code}", code="demo")


def _stop(nodes: Sequence[Node]) -> None:
    """SIGTERM drains, a second one stops, SIGKILL ends; each by process id."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # this is bounded; leave nothing behind
    try:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            left = [node for node in nodes if node.process.poll() is None]
            for node in left:
                node.process.send_signal(number)
            deadline = time.monotonic() + STOP_S
            for node in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        signal.signal(signal.SIGINT, before)


def _show_log(node: Node) -> None:
    with contextlib.suppress(OSError):
        lines = node.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        note("\n".join((f"--- the last lines of {node.log}", *lines, "---")))
