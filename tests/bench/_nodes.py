"""Real daemons for the benchmarks: where each runs, what it may use, and one generation on them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edged.cli.demo import pair, wait_online
from edged.cli.demo_nodes import Node, answers, wait_until
from edged.cli.generating import REQUEST
from edged.cli.init import make
from edged.identity import Home

PR_SET_PDEATHSIG = 1  # prctl(2)
STOP_S = 10.0
SILENCE_S = 600.0  # a fetch of a model between two nodes, or a prompt under a small quota
WORDS = (" sea", " sun", " dog", " man", " day", " way", " war", " oil", " law", " art")
_PAIRS = itertools.cycle(itertools.permutations(WORDS, 2))


@dataclass(frozen=True)
class Place:
    """Where a node runs: `prefix` enters a namespace, `tasks` is the file that takes its cgroup's
    members, `memory` is its budget and `settings` are more lines of its profile."""

    name: str
    prefix: tuple[str, ...] = ()
    interface: str = "lo"
    tasks: Path | None = None
    memory: str = ""
    settings: str = ""
    plugins: tuple[str, ...] = ("monitor", "shard", "layer_parallel", "tensor_parallel")
    threads: int = 1

    @property
    def profile(self) -> str:
        memory = f'memory = "{self.memory}"\n' if self.memory else ""
        return (
            f"version = 1\nplugins = {json.dumps(self.plugins)}\n"
            f"[budget]\nthreads = {self.threads}\n{memory}"
            f'[network]\ninterfaces = ["{self.interface}"]\n{self.settings}\n'
        )


@contextlib.contextmanager
def running(places: Sequence[Place]) -> Iterator[list[Node]]:
    """A started node in each place, all members of one group; ended and removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="edged-bench-"))
    nodes: list[Node] = []
    try:
        for place in places:
            nodes.append(start(folder, place))
        wait_until("to answer", nodes, answers)
        for newcomer in nodes[1:]:
            pair(nodes[0], newcomer)
        wait_online(nodes)
        yield nodes
    finally:
        for node in nodes:
            stop(node)
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, place: Place) -> Node:
    """A node's daemon; its home is made where there is none yet."""
    home, log = Home(folder / place.name), folder / f"{place.name}.log"
    document = make(home, place.name, place.profile)
    command = [*place.prefix, sys.executable, "-m", "edged.cli", "run", "--home", str(home.path)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_entering(place.tasks),
        )
    return Node(place.name, document["node_id"], home, log, process)


def _entering(tasks: Path | None) -> Callable[[], None]:
    """Run in the child before exec: end with this process, and join the cgroup. No thread runs here."""
    prctl = ctypes.CDLL(None).prctl

    def enter() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if tasks is not None:
            tasks.write_text(str(os.getpid()))

    return enter


def stop(node: Node) -> None:
    """SIGTERM drains, a second one stops, SIGKILL ends; by process id."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if node.process.poll() is None:
            node.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.process.wait(STOP_S)


def prompt(tokens: int) -> str:
    """A prompt of about so many tokens that no earlier one began with, so that no prefix is reused."""
    return "".join(next(_PAIRS)) * (tokens // 2)


def generate(
    node: Node,
    model: str,
    strategy: str,
    nodes: Sequence[Node],
    tokens: int,
    prompt_tokens: int = 128,
    shares: Sequence[float] | None = None,
    text: str | None = None,
) -> dict[str, Any]:
    """One greedy generation of exactly `tokens`, after `text` or a new prompt; its document."""
    asked = request(model, strategy, nodes, tokens, prompt_tokens, shares)
    if text is not None:
        asked["prompt"] = text
    with node.client() as client:
        document: dict[str, Any] = client.call("generate", asked, silence_s=SILENCE_S)
    return document


def request(
    model: str,
    strategy: str,
    nodes: Sequence[Node],
    tokens: int,
    prompt_tokens: int = 128,
    shares: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The body of `generate`."""
    return REQUEST | {
        "model": model,
        "prompt": prompt(prompt_tokens),
        "raw": True,
        "n": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "strategy": strategy,
        "nodes": [each.name for each in nodes] if strategy not in ("local", "auto") else None,
        "shares": None if shares is None else list(shares),
    }


def mean_tpot_ms(document: dict[str, Any]) -> float:
    """Mean time per token after the first. The median that edged reports hides the tokens during
    which the kernel had stopped a rank for its quota."""
    return float(1000 / document["measured"]["tokens_per_s"])


def cpu_seconds(process: psutil.Process) -> dict[str, float]:
    """Processor time so far of a daemon and of its workers together, by kind."""
    spent = {"daemon": 0.0, "workers": 0.0}
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            kind = "daemon" if each.pid == process.pid else "workers"
            spent[kind] += times.user + times.system
    return spent
