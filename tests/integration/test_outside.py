"""The strategy `cloud` by real nodes: an endpoint that runs the same model, and a guest."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import endpoint as endpoints
import pytest
from endpoint import KEY, Answer, Endpoint, key_file, saying, serving
from support import WORK, Node, Nodes, pair, wait_until

if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf", "numpy")):
    pytest.skip("llama-cpp-python is not installed (pip install edged[llama])", allow_module_level=True)

import llama_cpp

ASKED = {"model": "smol", "prompt": "Why is the sky blue?", "temperature": 0.0, "n": 24}
CLOUD = ASKED | {"strategy": "cloud"}


@pytest.fixture(scope="module")
def generating(smol: Path) -> Iterator[Endpoint]:
    """An endpoint that really computes, with libllama as the engines here set it up."""
    model = llama_cpp.Llama(str(smol), n_ctx=512, n_threads=1, flash_attn=True, verbose=False)
    one_at_a_time = threading.Lock()

    def script(answer: Answer) -> None:
        answer.head()
        asked = {name: answer.body[name] for name in ("prompt", "max_tokens", "temperature", "stream")}
        with one_at_a_time:
            for event in model.create_completion(**asked, repeat_penalty=1.0):
                answer.text(event["choices"][0]["text"], event["choices"][0]["finish_reason"])
        answer.done()

    with serving(script) as endpoint:
        yield endpoint
    model.close()


@pytest.fixture(scope="module")
def laptop(
    shared_nodes: Nodes, generating: Endpoint, smol: Path, tmp_path_factory: pytest.TempPathFactory
) -> Node:
    key = key_file(tmp_path_factory.mktemp("key"))
    chosen = endpoints.settings(generating.address, key)
    [node] = shared_nodes.start("laptop", plugins=(*WORK, "echo", "cloud"), plugin={"cloud": chosen})
    node.add(smol, "smol")
    return node


def test_an_endpoint_with_the_same_model_gives_the_tokens_of_this_node(
    laptop: Node, generating: Endpoint
) -> None:
    local, cloud = (laptop.call("generate", ASKED | {"strategy": name}) for name in ("local", "cloud"))
    assert (cloud["text"], cloud["tokens"]) == (local["text"], local["tokens"])
    assert cloud["finish_reason"] == local["finish_reason"]
    assert cloud["plan"]["strategy"] == "cloud"
    assert [role["layers"] for role in cloud["plan"]["roles"]] == [[0, 0]]
    assert cloud["measured"]["bytes_sent"] > len(generating.bodies[-1]["prompt"])
    assert generating.requests[-1][1]["Authorization"] == f"Bearer {KEY}"


def test_a_plan_shows_what_an_endpoint_costs_and_where_it_is_refused(laptop: Node) -> None:
    def row(**asked: Any) -> dict[str, Any]:
        document = laptop.call("plan", {**ASKED, "strategy": "auto", **asked})
        [found] = [each for each in document["candidates"] if each["strategy"] == "cloud"]
        return found | {"is_chosen": document["candidates"].index(found) == document["chosen"]}

    open_, private = row(), row(private=True)
    assert open_["refused_because"] is None
    assert open_["predicted"]["ttft_ms"] == 50.0
    assert list(open_["memory_bytes"].values()) == [96 << 20]
    assert "private" in private["refused_because"]
    assert not private["is_chosen"]


def test_what_may_not_leave_is_refused_before_anything_is_sent(laptop: Node, generating: Endpoint) -> None:
    before = len(generating.requests)
    assert "private" in str(laptop.error("generate", CLOUD | {"private": True}))
    assert "exact numerics" in str(laptop.error("generate", CLOUD | {"numerics": "exact"}))
    assert len(generating.requests) == before


def test_an_endpoint_that_breaks_ends_the_job_and_nothing_else(laptop: Node, generating: Endpoint) -> None:
    working = generating.script

    def breaks(answer: Answer) -> None:
        answer.head()
        answer.text(f"The answer to {KEY} is")

    try:
        generating.script = breaks
        error = laptop.error("generate", CLOUD)
        assert "hung up before the answer was over" in str(error)
        generating.script = saying("The end.")
        assert laptop.call("generate", CLOUD)["text"] == "The end."
    finally:
        generating.script = working
    assert laptop.call("status")["state"] == "online"


def test_a_stalled_job_can_be_cancelled_at_once(laptop: Node, generating: Endpoint) -> None:
    working, asked = generating.script, threading.Event()

    def stalls(answer: Answer) -> None:
        asked.set()
        answer.head()
        while not answer.over.wait(0.05):
            answer.raw(b": not yet\n\n")  # until it hangs up

    try:
        generating.script = stalls
        job = laptop.job(CLOUD)
        assert asked.wait(30)
        assert laptop.call("cancel", {"job": job.job_id})["state"] == "cancelled"
        assert job.document()["finish_reason"] == "cancelled"
    finally:
        generating.script = working


def test_the_key_is_in_no_file_of_the_node(laptop: Node) -> None:
    """Nor in its log, which says all that its workers say."""
    files = [file for file in laptop.home.path.rglob("*") if file.is_file() and file.stat().st_size < 1 << 24]
    assert len(files) > 3
    assert not [file for file in [*files, laptop.log] if KEY.encode() in file.read_bytes()]


def test_a_guest_runs_what_is_allowed_to_leave(laptop: Node, nodes: Nodes, tmp_path: Path) -> None:
    source = tmp_path / "echo"
    source.write_text("edged-echo 1\n")
    laptop.add(source, "echo")
    asked = {"model": "echo", "prompt": "hello", "n": 5, "strategy": "cloud"}
    assert "needs an online guest" in str(laptop.error("generate", asked))
    [phone] = nodes.start("phone", plugins=("echo",))
    pair(laptop, phone, zone="guest")
    wait_until("the phone to be online", lambda: laptop.sees_online(phone))
    assert "it is a guest" in str(laptop.error("generate", asked))
    assert "private" in str(laptop.error("generate", asked | {"allow_guest": True, "private": True}))
    document = laptop.call("generate", asked | {"allow_guest": True})
    assert (document["text"], document["plan"]["roles"][0]["name"]) == ("hello", "phone")
    assert "needs another online node" in str(laptop.error("generate", asked | {"strategy": "remote"}))
    laptop.call("forget", {"node": "phone"})
