"""What no test may leave behind, and where no test may reach: checked around every test.

A test fails that leaves a child process, a thread, a socket or an asyncio task, or that binds or
connects beyond this machine's loopback. What a fixture of a wider scope started before the test is
that fixture's own; its nodes may start and end workers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import support
import zmq

GRACE_S = 10.0  # a process, a thread or libzmq may take a moment to end; checked at once first
POLL_S = 0.02

# Threads of libraries that live as long as the process, by the name of their class.
LASTING_THREADS = {
    "GarbageCollectorThread": "pyzmq frees the buffers of zero-copy sends in it",
}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Set up before and torn down after every other fixture of the test."""
    nodes = list(support.running)
    before = {what: set(found()) for what, found in _KINDS.items()}
    yield
    left = _left(before, nodes)
    deadline = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline:
        gc.collect()  # what only waits for the collector is not left behind
        time.sleep(POLL_S)
        left = _left(before, nodes)
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def loopback_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("bind", "connect", "connect_ex"):
            patch.setattr(socket.socket, name, _checked(getattr(socket.socket, name), _check_address))
        for name in ("bind", "connect"):
            patch.setattr(zmq.Socket, name, _checked(getattr(zmq.Socket, name), _check_endpoint))
        yield


# --- what may be left -----------------------------------------------------------------------------


def _processes() -> dict[Any, str]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process] = f"process {process.pid} ({' '.join(process.cmdline())[:120]})"
    return found


def _threads() -> dict[Any, str]:
    return {
        thread: f"thread {thread.name}"
        for thread in threading.enumerate()
        if type(thread).__name__ not in LASTING_THREADS
    }


def _sockets() -> dict[Any, str]:
    found = {}
    for file in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            target = os.readlink(file)
            if target.startswith("socket:"):
                found[target] = f"{target} (descriptor {file.name})"
    return found


def _tasks() -> dict[Any, str]:
    # 3.12 renamed it; `asyncio.all_tasks` knows the tasks of one running loop alone
    tasks = getattr(asyncio.tasks, "_scheduled_tasks", None) or getattr(asyncio.tasks, "_all_tasks", ())
    return {task: f"task {task.get_name()} ({task.get_coro()})" for task in list(tasks) if not task.done()}


_KINDS: dict[str, Callable[[], dict[Any, str]]] = {
    "processes": _processes,
    "threads": _threads,
    "sockets": _sockets,
    "tasks": _tasks,
}


def _left(before: dict[str, set[Any]], nodes: list[support.Node]) -> list[str]:
    known = set(before["processes"]) | _of_nodes(nodes)
    found = {what: found() for what, found in _KINDS.items()}
    return [
        text
        for what, items in found.items()
        for item, text in items.items()
        if item not in (known if what == "processes" else before[what])
    ]


def _of_nodes(nodes: list[support.Node]) -> set[psutil.Process]:
    """Processes of nodes that were there before the test."""
    found = set()
    for node in nodes:
        if node.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon = psutil.Process(node.process.pid)
                found |= {daemon, *daemon.children(recursive=True)}
    return found


# --- where it may reach ---------------------------------------------------------------------------


def _checked(original: Callable[..., Any], check: Callable[[Any, Any], None]) -> Callable[..., Any]:
    def guarded(self: Any, address: Any, *rest: Any, **named: Any) -> Any:
        check(self, address)
        return original(self, address, *rest, **named)

    return guarded


def _check_address(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _check_host(str(address[0]), is_datagram=sock.type == socket.SOCK_DGRAM)


def _check_endpoint(sock: zmq.Socket[Any], endpoint: Any) -> None:
    text = endpoint.decode() if isinstance(endpoint, bytes) else str(endpoint)
    if text.startswith("tcp://"):
        _check_host(text.removeprefix("tcp://").rpartition(":")[0].strip("[]"), is_datagram=False)


def _check_host(host: str, *, is_datagram: bool) -> None:
    """Multicast needs a datagram socket on every address; what it joins is loopback's."""
    if host in ("localhost", "lo"):
        return
    try:
        address = ipaddress.ip_address(host.partition("%")[0] or "0.0.0.0")
    except ValueError:
        address = None
    is_fine = address is not None and (
        address.is_loopback or (is_datagram and (address.is_multicast or address.is_unspecified))
    )
    if not is_fine:
        pytest.fail(f"a test reaches loopback only; {host!r} came")
