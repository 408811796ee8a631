"""One job over one, two and three real nodes with the real model, and all that can be asked of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import GUARD_S, WORK, Document, Node, Nodes, drain, pair_all, wait_no_workers, wait_until

from edged.errors import EdgedError

NAMES = ("laptop", "jetson", "phone")
ASKED = {"model": "smol", "prompt": "Why is the sky blue?", "n": 12, "temperature": 0.0, "ignore_eos": True}
LONG = ASKED | {"n": 1500}


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, smol: Path) -> list[Node]:
    """Three members; the first has the model, the others fetch it with their first role."""
    nodes = shared_nodes.group(*NAMES, plugins=WORK)
    nodes[0].add(smol, "smol")
    return nodes


@pytest.fixture
def laptop(trio: list[Node]) -> Iterator[Node]:
    """The first of the trio; whatever a test does, no job of it runs on."""
    yield trio[0]
    for job in trio[0].call("jobs")["jobs"]:
        if job["state"] in ("queued", "running"):
            with contextlib.suppress(EdgedError):
                trio[0].call("cancel", {"job": job["job_id"]})


def cli(node: Node, *arguments: str) -> tuple[int, Document, str]:
    """The command line as a person runs it: exit code, its document, standard error."""
    command = [sys.executable, "-m", "edged.cli", *arguments, "--json", "--home", str(node.home.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


# --- strategies -------------------------------------------------------------------------------------


def test_a_node_that_lacks_the_model_fetches_it(trio: list[Node], laptop: Node) -> None:
    jetson = trio[1]
    assert jetson.call("models.ls") == {"models": []}
    document = laptop.call("generate", ASKED | {"strategy": "remote", "nodes": ["jetson"]})
    assert document["text"]
    held = jetson.call("models.ls")["models"]
    assert [(row["name"], row["complete"]) for row in held] == [("smol", True)]
    assert held[0]["sha256"] == laptop.call("models.ls")["models"][0]["sha256"]


@pytest.mark.parametrize(
    ("strategy", "names", "shares"),
    [
        ("local", ("laptop",), None),
        ("remote", ("jetson",), None),
        ("layers", ("laptop", "jetson"), None),
        ("layers", NAMES, None),
        ("tensor", ("laptop", "jetson"), [2.0, 1.0]),
        ("tensor", NAMES, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_every_strategy_gives_a_text(
    laptop: Node, strategy: str, names: tuple[str, ...], shares: list[float] | None
) -> None:
    asked = ASKED | {"strategy": strategy, "nodes": list(names), "shares": shares}
    document = laptop.call("generate", asked)
    assert len(document["tokens"]) == ASKED["n"]
    assert document["text"].strip()
    assert document["finish_reason"] == "length"
    plan = document["plan"]
    assert (plan["strategy"], plan["epoch"]) == (strategy, 1)
    assert [role["name"] for role in plan["roles"]] == list(names)
    if shares is not None:
        assert [role["heads"] for role in plan["roles"]] == [[0, 6], [6, 9]]
    assert (document["measured"]["bytes_sent"] > 0) == (len(names) > 1)
    assert document["measured"]["recoveries"] == []


def test_exact_numerics_give_the_same_tokens_however_the_model_is_cut(laptop: Node) -> None:
    exact = ASKED | {"numerics": "exact", "n": 24}
    cut: dict[str, Any] = {
        "local": exact | {"strategy": "local"},
        "layers 2": exact | {"strategy": "layers", "nodes": ["laptop", "jetson"]},
        "layers 3": exact | {"strategy": "layers", "nodes": list(NAMES)},
        "tensor 2": exact | {"strategy": "tensor", "nodes": ["laptop", "jetson"], "shares": [2.0, 1.0]},
        "tensor 3": exact | {"strategy": "tensor", "nodes": list(NAMES)},
    }
    tokens = {name: laptop.call("generate", asked)["tokens"] for name, asked in cut.items()}
    assert len(tokens["local"]) == 24
    assert tokens == dict.fromkeys(tokens, tokens["local"])


def test_nodes_are_ranks_in_the_order_they_are_named(trio: list[Node], laptop: Node) -> None:
    """Rank 0, which drives the batch, is not the node that was asked."""
    document = laptop.call("generate", ASKED | {"strategy": "layers", "nodes": ["phone", "laptop"]})
    roles = document["plan"]["roles"]
    assert [(role["rank"], role["node"]) for role in roles] == [
        (0, trio[2].node_id),
        (1, laptop.node_id),
    ]
    assert roles[0]["layers"][0] == 0
    assert len(document["tokens"]) == ASKED["n"]


def test_a_second_job_on_the_same_plan_finds_it_loaded(laptop: Node) -> None:
    asked = ASKED | {"strategy": "layers", "nodes": ["laptop", "jetson"], "n": 4}
    laptop.call("generate", asked)
    again = laptop.call("generate", asked | {"prompt": "Something else."})
    assert again["measured"]["load_ms"] == 0
    assert again["measured"]["ttft_ms"] > 0


def test_two_jobs_at_once_share_a_group(laptop: Node) -> None:
    """Together they say what each says alone: sequences of a batch do not see each other."""
    asked = ASKED | {"strategy": "layers", "nodes": ["laptop", "jetson"], "numerics": "exact", "n": 32}
    other = asked | {"prompt": "Name three birds."}
    alone = [laptop.call("generate", one)["tokens"] for one in (asked, other)]
    together = [laptop.job(one) for one in (asked, other)]
    for job in together:
        job.until_token()
    assert laptop.call("status")["jobs_running"] == 2
    assert [job.document()["tokens"] for job in together] == alone


# --- jobs -------------------------------------------------------------------------------------------


def states(node: Node) -> dict[str, str]:
    return {row["job_id"]: row["state"] for row in node.call("jobs")["jobs"]}


def test_a_detached_job_is_followed_to_its_document(laptop: Node) -> None:
    job_id = laptop.call("generate", ASKED | {"detach": True, "strategy": "local"})["job_id"]
    with laptop.client() as client:
        document = drain(client.stream("jobs.show", {"job": job_id, "follow": True}, silence_s=GUARD_S))
    assert document["job_id"] == job_id
    assert len(document["tokens"]) == ASKED["n"]
    assert states(laptop)[job_id] == "done"
    with laptop.client() as client:  # and again, when it is over
        assert drain(client.stream("jobs.show", {"job": job_id, "follow": True}))["text"] == document["text"]


def test_the_command_line_generates_detached_and_follows(laptop: Node) -> None:
    options = ("--model", "smol", "--prompt", "Hi", "-n", "8", "--temperature", "0", "--strategy", "local")
    code, document, _ = cli(laptop, "generate", *options, "--detach")
    assert code == 0
    code, followed, _ = cli(laptop, "jobs", document["job_id"], "--follow")
    assert code == 0
    assert followed["job_id"] == document["job_id"]
    assert followed["text"]
    code, listed, _ = cli(laptop, "jobs")
    assert code == 0
    assert listed["jobs"][0]["job_id"] == document["job_id"]


@pytest.mark.parametrize("names", [["laptop"], ["jetson", "laptop"]], ids=["local", "layers"])
def test_a_job_is_cancelled_in_the_middle(laptop: Node, names: list[str]) -> None:
    strategy = "local" if len(names) == 1 else "layers"
    asked = LONG | {"strategy": strategy, "nodes": names}
    job = laptop.job(asked).until_token()
    assert laptop.call("cancel", {"job": job.job_id})["state"] == "cancelled"
    document = job.document()
    assert document["finish_reason"] == "cancelled"
    assert 0 < len(document["tokens"]) < LONG["n"]
    assert states(laptop)[job.job_id] == "cancelled"
    assert laptop.call("status")["jobs_running"] == 0
    after = laptop.job(asked).until_token()  # the group is free for the next one
    laptop.call("cancel", {"job": after.job_id})
    after.document()
    error = laptop.error("cancel", {"job": job.job_id})
    assert (error.code, error.exit_code) == ("ended", 6)


def test_a_job_is_cancelled_while_its_workers_load(laptop: Node) -> None:
    asked = LONG | {"strategy": "layers", "nodes": ["phone", "jetson"], "n": 1400}
    job = laptop.job(asked)
    assert laptop.call("cancel", {"job": job.job_id})["state"] == "cancelled"
    with contextlib.suppress(EdgedError):
        job.document()
    assert laptop.call("status")["jobs_running"] == 0


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "exit_code", "error_code", "words"),
    [
        (("--model", "smal"), 2, "config", ("smal", "smol")),
        (("--nodes", "laptop,tablet"), 2, "config", ("tablet", "jetson")),
        (("--strategy", "telepathy"), 2, None, ("telepathy",)),
        (
            ("--strategy", "tensor", "--nodes", "laptop,jetson", "--shares", "1000:1"),
            6,
            "refused",
            ("share",),
        ),
        (("--strategy", "layers", "--nodes", "laptop,jetson", "--shares", "1:2:3"), 2, None, ("shares",)),
        (("--prompt", "word " * 10_000), 6, None, ("8192 tokens",)),
        (("--temperature", "-1"), 2, None, ("temperature",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_said_in_one_line(
    laptop: Node, options: tuple[str, ...], exit_code: int, error_code: str | None, words: tuple[str, ...]
) -> None:
    given = {"--model": "smol", "--prompt": "Hi", "-n": "4", "--strategy": "local"}
    named = dict(zip(options[::2], options[1::2], strict=True))
    if "--nodes" in named and "--strategy" not in named:
        named["--strategy"] = "layers"
    code, document, stderr = cli(
        laptop, "generate", *(word for item in (given | named).items() for word in item)
    )
    assert code == exit_code, document
    error = document["error"]
    assert error_code in (None, error["code"])
    assert stderr.startswith("edged: ")
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert word in error["message"]
    assert laptop.call("status")["jobs_running"] == 0


def test_a_model_that_does_not_split_so_far_says_so(trio: list[Node], laptop: Node, nodes: Nodes) -> None:
    """Three groups of KV heads go to three nodes at most."""
    tablet = nodes.start("tablet", plugins=WORK)[0]
    pair_all([laptop, tablet])
    try:
        error = laptop.error("generate", ASKED | {"strategy": "tensor", "nodes": [*NAMES, "tablet"]})
        assert error.exit_code == 6
        assert "at most 3 nodes" in str(error)
        assert "\n" not in str(error)
        assert not tablet.workers()
    finally:
        laptop.call("forget", {"node": "tablet"})


def test_a_part_that_does_not_fit_is_refused_by_name(nodes: Nodes, smol: Path) -> None:
    """The budget is 150 MiB: too little for the whole model's KV cache and the smallest window over its
    weights, enough for a part of it."""
    big = nodes.start("laptop", plugins=WORK)[0]
    small = nodes.start("phone", plugins=WORK, budget={"memory": "150MiB"})[0]
    pair_all([big, small])
    big.add(smol, "smol")
    error = big.error("generate", ASKED | {"strategy": "remote", "nodes": ["phone"]})
    assert (error.code, error.exit_code) == ("no-plan", 6)
    assert "phone: its part needs" in str(error)
    assert not small.workers()
    assert small.call("models.ls") == {"models": []}
    asked = ASKED | {"strategy": "layers", "nodes": ["laptop", "phone"], "shares": [9.0, 1.0]}
    assert big.call("generate", asked)["text"]


# --- the life of a node -----------------------------------------------------------------------------


def test_a_vanished_client_s_job_is_an_orphan_and_ends(nodes: Nodes, smol: Path) -> None:
    laptop = nodes.start("laptop", plugins=WORK, jobs={"orphan_after": "500ms", "worker_idle": "1s"})[0]
    laptop.add(smol, "smol")
    left, stayed = laptop.job(LONG).until_token(), laptop.job(LONG | {"n": 200}).until_token()
    detached = laptop.call("generate", LONG | {"n": 200, "detach": True})["job_id"]
    left.vanish()
    wait_until("the orphan to end", lambda: states(laptop)[left.job_id] == "cancelled")
    assert len(stayed.document()["tokens"]) == 200  # others go on
    wait_until("the detached job to end", lambda: states(laptop)[detached] == "done")
    wait_no_workers(laptop)  # worker_idle is over


def test_the_job_table_survives_a_restart(nodes: Nodes, smol: Path) -> None:
    laptop = nodes.start("laptop", plugins=WORK)[0]
    laptop.add(smol, "smol")
    done = laptop.call("generate", ASKED)
    running = laptop.job(LONG).until_token()
    laptop.kill()
    laptop.start().wait_ready()
    found = states(laptop)
    assert (found[done["job_id"]], found[running.job_id] in ("queued", "running")) == ("done", True)
    assert laptop.call("cancel", {"job": running.job_id})["state"] == "cancelled"
    shown = laptop.call("jobs.show", {"job": done["job_id"]})["jobs"][0]
    assert (shown["text"], shown["tokens"]) == (done["text"], done["tokens"])
    kept = laptop.call("jobs.show", {"job": running.job_id})["jobs"][0]
    assert kept["tokens"]  # what had come before
    assert laptop.call("generate", ASKED)["tokens"] == done["tokens"]


def test_a_stopped_node_leaves_no_process(start_node: Callable[..., Node], smol: Path) -> None:
    laptop = start_node("laptop", plugins=WORK)
    laptop.add(smol, "smol")
    laptop.call("generate", ASKED)
    workers = laptop.workers()
    assert workers
    laptop.stop()
    wait_until("its workers to be gone", lambda: not any(worker.is_running() for worker in workers))
