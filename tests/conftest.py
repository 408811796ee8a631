"""Guards around every test, and nodes for those that want real ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from guards import loopback_only, no_leaks
from support import Node, Nodes

from edged.client import Client

__all__ = ["loopback_only", "no_leaks"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the logs of the nodes that run; those that a test ended before stay in its folder."""
    report = yield
    if report.failed:
        for node in support.running:
            report.sections.append((f"log of {node.name}", node.log_tail()))
    return report


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first node found out about this processor's engines, for all that follow."""
    return tmp_path_factory.mktemp("engine-cache")


@pytest.fixture
def nodes(tmp_path: Path, engine_cache: Path) -> Iterator[Nodes]:
    """Nodes of one test; ended with it."""
    made = Nodes(tmp_path, engine_cache)
    with made.ended():
        yield made


@pytest.fixture(scope="module")
def shared_nodes(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Iterator[Nodes]:
    """Nodes of one module, for tests that leave them as they found them."""
    made = Nodes(tmp_path_factory.mktemp("nodes"), engine_cache)
    with made.ended():
        yield made


@pytest.fixture
def make_home(nodes: Nodes) -> Callable[..., Node]:
    """make_home(name, plugins=..., budget=..., network=..., jobs=...): a node that is not started."""
    return nodes.make


@pytest.fixture
def start_node(nodes: Nodes) -> Callable[..., Node]:
    """start_node(name, ...): the same, started and ready."""
    return lambda name, **profile: nodes.start(name, **profile)[0]


@pytest.fixture
def start_nodes(nodes: Nodes) -> Callable[..., list[Node]]:
    """start_nodes(name, ..., plugins=...): several, ready, paired and online to each other."""
    return nodes.group


@pytest.fixture
def client() -> Callable[[Node], Client]:
    """client(node): a blocking control client; close it, or use it in a `with`."""
    return Node.client


@pytest.fixture(scope="session")
def smol() -> Path:
    """The real SmolLM2 GGUF."""
    return support.smol_or_skip()


def pytest_configure(config: pytest.Config) -> None:
    """Nothing of the person who runs the tests: no EDGED_HOME, no debug output."""
    for variable in ("EDGED_HOME", "EDGED_DEBUG", "EDGED_LOG", "RUNTIME_DIRECTORY"):
        config.add_cleanup(_unset(variable))


def _unset(variable: str) -> Callable[[], Any]:
    patch = pytest.MonkeyPatch()
    patch.delenv(variable, raising=False)
    return patch.undo
