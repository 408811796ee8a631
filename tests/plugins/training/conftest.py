"""Tiny models, and the processes that ranks run in, once a session."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "torch_blocks"))  # its rig makes the models

NEEDED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "gguf")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

POOLS: list[Any] = []

# The tests and their rig import what is missing here, so they are not collected without it.
collect_ignore_glob = ["test_*.py"] if MISSING else []
if MISSING:

    def pytest_report_header() -> str:
        return f"tests of trainings are skipped: {', '.join(MISSING)} not installed (edged[train])"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """By a family's name: transformers' model of four blocks, and the same packed into one file."""
    from blocks_rig import make

    made: dict[str, tuple[Any, Path]] = {}

    def find(family: str) -> tuple[Any, Path]:
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return find


@pytest.fixture(scope="session")
def processes() -> Iterator[Any]:
    """Those that ranks run in, started once; `pytest_runtest_teardown` ends them."""
    from rig import Processes

    pool = Processes(7)
    POOLS.append(pool)
    yield pool
    _end_pools()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last test of this folder, and not at the session's end: they hold half a gigabyte."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # it comes back to a folder that it left
        return
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _end_pools()


def _end_pools() -> None:
    while POOLS:
        POOLS.pop().close()
