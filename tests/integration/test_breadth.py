"""Models that the shard engine does not run, through real daemons and the command line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import GUARD_S, WORK, Document, Node, Nodes, wait_no_workers

if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf", "numpy")):
    pytest.skip("llama-cpp-python is not installed (pip install edged[llama])", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "plugins"))
import llama_cpp
import tiny_models

from edged.models import ModelStore

PROMPT = "Why is the sky blue?"
ASKED = {"model": "tiny", "prompt": PROMPT, "raw": True, "n": 16, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def node(shared_nodes: Nodes, smol: Path) -> Iterator[Node]:
    """One node with both engines; the first test adds a model that shard runs and one it does not."""
    [node] = shared_nodes.start("desk", plugins=("shard", "llama_cpp", *WORK[1:]))
    yield node
    wait_no_workers(node)


def cli(node: Node, *arguments: str) -> tuple[int, Document, str]:
    command = [sys.executable, "-m", "edged.cli", *arguments, "--json", "--home", str(node.home.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@contextmanager
def opened(path: Path) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, flash_attn=True, verbose=False)
    try:
        yield model
    finally:
        model.close()


def theirs(path: Path, prompt: str, count: int) -> list[int]:
    """llama-cpp-python's greedy tokens, through its own Llama class."""
    with opened(path) as model:
        found = model.generate(model.tokenize(prompt.encode(), special=True), temp=0.0)
        return [token for token, _ in zip(found, range(count), strict=False)]


def test_a_model_is_stored_under_the_first_engine_that_runs_it(node: Node, smol: Path) -> None:
    node.add(smol, "smol")
    node.add(tiny_models.tiny("stablelm", smol), "tiny")
    engines = {model.name: model.engine for model in ModelStore(node.home).list()}
    assert engines == {"smol": "shard", "tiny": "llama_cpp"}


def test_the_command_line_runs_an_architecture_that_shard_does_not(node: Node, smol: Path) -> None:
    asked = ("--model", "tiny", "--prompt", PROMPT, "--raw", "-n", "16", "--temperature", "0", "--ignore-eos")
    code, document, _ = cli(node, "generate", *asked)
    assert code == 0
    assert document["tokens"] == theirs(tiny_models.tiny("stablelm", smol), PROMPT, 16)
    assert document["plan"]["strategy"] == "local"


def test_jobs_at_once_share_a_worker_and_say_what_each_says_alone(node: Node) -> None:
    asked = [ASKED | {"prompt": prompt, "n": 200} for prompt in (PROMPT, "Name three birds.", "Once upon")]
    alone = [node.call("generate", one | {"n": 8})["tokens"] for one in asked]
    together = [node.job(one) for one in asked]
    for job in together:
        job.until_token()
    assert len(node.workers()) == 1
    tokens = [job.document()["tokens"] for job in together]
    assert [len(found) for found in tokens] == [200] * 3
    assert [found[:8] for found in tokens] == alone  # later, a batch's rounding may tip a random model


def test_what_the_engine_cannot_do_is_refused_before_anything_is_loaded(node: Node) -> None:
    for more, says in (
        ({"strategy": "layers", "nodes": ["desk"]}, "by layers: llama_cpp runs local or remote"),
        ({"strategy": "tensor", "nodes": ["desk"]}, "by tensor"),
        ({"numerics": "exact"}, "exact numerics: llama_cpp has fast"),
    ):
        error = node.error("generate", ASKED | more)
        assert says in str(error)
        planned = node.call("plan", ASKED | more) if more.get("numerics") else {"candidates": []}
        assert all(candidate["refused_because"] for candidate in planned["candidates"])
    assert "llama_rpc" in node.error("plan", ASKED | {"strategy": "layers", "nodes": ["desk"]}).remedy


def test_a_model_nobody_runs_is_refused_by_name_with_what_each_engine_runs(
    node: Node, smol: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new.gguf"
    tiny_models.write(path, "perceptron", smol)
    code, document, _ = cli(node, "models", "add", str(path))
    assert code == 6
    said = document["error"]["message"]
    assert "'perceptron'" in said
    assert "the shard engine runs llama" in said
    assert "falcon" in said
    assert "stablelm" in said
    assert node.call("status")["state"] == "online"


def test_another_engine_takes_the_model_when_the_stored_one_is_not_loaded(nodes: Nodes, smol: Path) -> None:
    shard = nodes.make("desk", plugins=("shard",))
    shard.start().wait_ready()
    shard.add(smol, "smol")
    asked = ASKED | {"model": "smol"}
    expected = shard.call("generate", asked)["tokens"]
    shard.stop()
    profile = shard.home.profile
    profile.write_text(profile.read_text().replace('"shard"', '"llama_cpp"'))
    shard.start().wait_ready()
    assert shard.call("generate", asked)["tokens"] == expected


def test_a_cache_type_that_heads_do_not_fit_is_refused_with_what_helps(nodes: Nodes, smol: Path) -> None:
    [desk] = nodes.start("desk", plugins=("llama_cpp",), jobs={"cache_type": "q8_0"})
    desk.add(tiny_models.tiny("stablelm", smol), "tiny")
    error = desk.error("generate", ASKED)
    assert "heads of a multiple of 32" in str(error)
    assert "jobs.cache_type" in str(error)
    wait_no_workers(desk)
