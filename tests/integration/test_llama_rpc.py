"""A model of libllama's over two and three real nodes, by llama.cpp's RPC inside the plan's channel."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Node, Nodes, pair_all, wait_no_workers, wait_until

if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf", "numpy")):
    pytest.skip("llama-cpp-python is not installed (pip install edged[llama])", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "plugins"))
import llama_cpp
import tiny_models

from edged.errors import EdgedError

PLUGINS = ("llama_cpp", "llama_rpc", "layer_parallel")
ALLOWED = {"llama_rpc": {"allow": True}}
ASKED = {
    **{"model": "tiny", "prompt": "Why is the sky blue?", "raw": True, "n": 16},
    **{"temperature": 0.0, "ignore_eos": True},
}
NEAR = 0.05  # between logits; tokens of another sequence are some whole ones away
TWO = ASKED | {"strategy": "layers", "nodes": ["laptop", "jetson"]}
THREE = ASKED | {"strategy": "layers", "nodes": ["laptop", "jetson", "phone"]}


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, smol: Path) -> list[Node]:
    nodes = shared_nodes.group("laptop", "jetson", "phone", plugins=PLUGINS, plugin=ALLOWED)
    nodes[0].add(tiny_models.tiny("stablelm", smol), "tiny")
    nodes[0].add(smol, "smol")
    return nodes


@pytest.fixture
def laptop(trio: list[Node]) -> Iterator[Node]:
    yield trio[0]
    for job in trio[0].call("jobs")["jobs"]:
        if job["state"] in ("queued", "running"):
            with contextlib.suppress(EdgedError):
                trio[0].call("cancel", {"job": job["job_id"]})


@pytest.mark.parametrize("model", ["tiny", "smol"])
@pytest.mark.parametrize("asked", [TWO, THREE], ids=["two", "three"])
def test_spread_over_nodes_a_model_says_what_it_says_on_one(
    laptop: Node, asked: dict[str, object], model: str
) -> None:
    alone = laptop.call("generate", ASKED | {"model": model, "strategy": "local"})
    document = laptop.call("generate", asked | {"model": model})
    assert document["tokens"] == alone["tokens"]
    assert document["measured"]["bytes_sent"] > 0
    assert [role["name"] for role in document["plan"]["roles"]] == asked["nodes"]


def test_a_follower_needs_the_head_of_the_file_alone(trio: list[Node], laptop: Node) -> None:
    laptop.call("generate", TWO)
    [row] = [row for row in trio[1].call("models.ls")["models"] if row["name"] == "tiny"]
    assert not row["complete"]


def test_two_jobs_at_once_share_the_group(laptop: Node) -> None:
    asked = [TWO | {"prompt": prompt, "n": 100} for prompt in ("One", "Name three birds.")]
    alone = [laptop.call("generate", one | {"n": 8})["tokens"] for one in asked]
    jobs = [laptop.job(one).until_token() for one in asked]
    assert laptop.call("status")["jobs_running"] == 2
    assert [job.document()["tokens"][:8] for job in jobs] == alone


def regret(path: Path, prompt: str, tokens: list[int]) -> float:
    """The most by which the model, in libllama itself and alone, prefers another token to one of these."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    try:
        asked = model.tokenize(prompt.encode(), special=True)
        model.eval(asked + tokens[:-1])
        logits = model.scores[len(asked) - 1 : len(asked) - 1 + len(tokens)]
        return max(float(row.max() - row[token]) for row, token in zip(logits, tokens, strict=True))
    finally:
        model.close()


@pytest.mark.parametrize("plan", ["local", "layers"])
def test_jobs_beyond_the_cache_wait_and_say_what_the_model_would(nodes: Nodes, smol: Path, plan: str) -> None:
    """A cache of 256 tokens has room for about three; libllama's context grows under them. A batch's rounding
    may tip a random model between two tokens that it likes alike: who read another's cache is far off."""
    names = ["laptop", "jetson"][: 1 if plan == "local" else 2]
    jobs = {"context": 256, "sequences": 1}
    made = nodes.group(*names, plugins=PLUGINS, plugin=ALLOWED, jobs=jobs)
    path = tiny_models.tiny("stablelm", smol)
    made[0].add(path, "tiny")
    prompts = ("One", "Two birds", "Three ships at sea", "Four", "Five hills", "Six")
    asked = [ASKED | {"prompt": p, "n": 60, "strategy": plan, "nodes": names} for p in prompts]
    together = [made[0].job(one) for one in asked]
    said = [job.document()["tokens"] for job in together]
    assert max(regret(path, prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)) < NEAR
    assert regret(path, prompts[0], said[1]) > 10 * NEAR
    assert [len(node.workers()) for node in made] == [1] * len(names)


def test_engines_that_describe_alike_refuse_once(laptop: Node, smol: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    tiny_models.write(path, "perceptron", smol)
    with pytest.raises(EdgedError, match="'perceptron'") as caught:
        laptop.add(path, "new")
    assert str(caught.value).count("perceptron") == 1


@pytest.fixture
def duo(nodes: Nodes, smol: Path) -> list[Node]:
    """Two members with no worker but those of one job, which has given a token."""
    duo = nodes.group("laptop", "jetson", plugins=PLUGINS, plugin=ALLOWED)
    duo[0].add(tiny_models.tiny("stablelm", smol), "tiny")
    return duo


@pytest.mark.parametrize("victim", [0, 1], ids=["rank 0", "a follower"])
def test_killing_a_worker_ends_the_job_and_nothing_else(duo: list[Node], victim: int) -> None:
    job = duo[0].job(TWO | {"n": 900, "strict": True}).until_token()
    [worker] = duo[victim].workers()
    worker.kill()
    assert duo[victim].name in str(job.error())
    wait_no_workers(*duo)
    assert [node.call("status")["state"] for node in duo] == ["online", "online"]
    assert len(duo[0].call("generate", TWO)["tokens"]) == TWO["n"]


def test_without_the_profiles_word_nothing_is_offered(nodes: Nodes, smol: Path) -> None:
    pair = nodes.start("desk", "shelf", plugins=PLUGINS)
    pair_all(pair)
    pair[0].add(tiny_models.tiny("stablelm", smol), "tiny")
    wait_until("the shelf to be online", lambda: pair[0].sees_online(pair[1]))
    asked = ASKED | {"strategy": "layers", "nodes": ["desk", "shelf"]}
    error = pair[0].error("generate", asked)
    assert "by layers: llama_cpp runs local or remote" in str(error)
    assert "[plugin.llama_rpc] allow = true" in (error.remedy or "")
    assert not pair[0].workers()
