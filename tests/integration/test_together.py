"""Jobs that run at once, in one KV cache: each says what it says alone, and a loaded plan is used again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import WORK, Document, Node, Nodes, pair_all

ASKED: Document = {
    **{"model": "smol", "strategy": "local", "numerics": "exact"},
    **{"n": 16, "temperature": 0.0, "ignore_eos": True},
}
NOUNS = (
    *("sky", "sea", "grass", "snow", "blood", "gold"),
    *("night", "moss", "rust", "milk", "fire", "ink"),
)
PROMPTS = tuple(f"Which colour has {noun}?" for noun in NOUNS)
WORDS = "the sun rises over quiet hills and a river runs past old stones while birds sing "


def node_with(nodes: Nodes, smol: Path, **jobs: int | str) -> Node:
    laptop = nodes.start("laptop", plugins=WORK, jobs=jobs)[0]
    laptop.add(smol, "smol")
    return laptop


def state_of(node: Node, job_id: str) -> str:
    return next(row["state"] for row in node.call("jobs")["jobs"] if row["job_id"] == job_id)


@pytest.mark.parametrize(
    "jobs",
    [{"context": 256, "sequences": 12}, {"context": 256, "sequences": 1}],
    ids=["room for all", "room for few"],
)
def test_twelve_jobs_at_once_say_what_each_says_alone(nodes: Nodes, smol: Path, jobs: dict[str, int]) -> None:
    """A context of 256 has room for about four of them; the others wait, and come in as those end."""
    laptop = node_with(nodes, smol, **jobs)
    asked = [ASKED | {"prompt": prompt} for prompt in PROMPTS]
    alone = [laptop.call("generate", one)["tokens"] for one in asked]
    together = [laptop.job(one) for one in asked]
    assert [job.document()["tokens"] for job in together] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1
    assert len(laptop.workers()) == 1


def test_cancelling_one_of_several_leaves_the_others_as_they_are(nodes: Nodes, smol: Path) -> None:
    laptop = node_with(nodes, smol, context=512)
    asked = [ASKED | {"prompt": prompt, "n": 60} for prompt in PROMPTS[:3]]
    alone = [laptop.call("generate", one)["tokens"] for one in asked]
    first, doomed, last = (laptop.job(one | {"n": n}) for one, n in zip(asked, (60, 400, 60), strict=True))
    for job in (first, doomed, last):
        job.until_token()
    assert laptop.call("cancel", {"job": doomed.job_id})["state"] == "cancelled"
    assert [first.document()["tokens"], last.document()["tokens"]] == [alone[0], alone[2]]
    cut = doomed.document()
    assert cut["finish_reason"] == "cancelled"
    assert 0 < len(cut["tokens"]) < 400
    assert cut["tokens"][:60] == alone[1][: len(cut["tokens"])]


def test_a_long_prompt_runs_beside_a_job_that_decodes(nodes: Nodes, smol: Path) -> None:
    """Its 600 tokens go in pieces, between which the other job gets its tokens. What is expected comes
    from another node: here a prompt seen before would not be computed again."""
    jobs = {"context": 4096, "sequences": 2}
    laptop, desk = nodes.start("laptop", "desk", plugins=WORK, jobs=jobs)
    for node in (laptop, desk):
        node.add(smol, "smol")
    short, long = ASKED | {"prompt": PROMPTS[0], "n": 40}, ASKED | {"prompt": WORDS * 36, "n": 4}
    alone = [desk.call("generate", one)["tokens"] for one in (short, long)]
    decoding = laptop.job(short).until_token()
    prefilled = laptop.job(long).until_token()
    assert state_of(laptop, decoding.job_id) == "running"
    assert [job.document()["tokens"] for job in (decoding, prefilled)] == alone
    assert laptop.call("generate", long)["tokens"] == alone[1]  # from the rows of the first


def test_an_equal_job_pays_no_load_and_asks_nobody(nodes: Nodes, smol: Path) -> None:
    """The other member is frozen: whoever asked it would wait in vain, and log that."""
    laptop, jetson = nodes.group("laptop", "jetson", plugins=WORK, jobs={"context": 256})
    laptop.add(smol, "smol")
    asked = ASKED | {"prompt": PROMPTS[0], "strategy": "auto", "nodes": ["laptop"], "n": 4}
    first = laptop.call("generate", asked)
    workers = laptop.workers()
    assert first["measured"]["load_ms"] > 0
    jetson.signal(signal.SIGSTOP)
    try:
        again = laptop.call("generate", asked)
        assert "node not described" not in laptop.log.read_text()
    finally:
        jetson.signal(signal.SIGCONT)
    assert again["measured"]["load_ms"] == 0
    assert again["tokens"] == first["tokens"]
    larger = laptop.call("generate", asked | {"prompt": WORDS * 8})  # more than 256 tokens of context
    assert larger["measured"]["load_ms"] > 0
    assert laptop.call("generate", asked)["measured"]["load_ms"] == 0
    assert len(laptop.workers()) > len(workers)


def test_after_a_newcomer_a_job_is_planned_again(nodes: Nodes, smol: Path) -> None:
    """Alone, a node reads weights again for every token; the newcomer has room for them."""
    jobs = {"context": 256}
    tight = nodes.start("tight", plugins=WORK, jobs=jobs, budget={"memory": "136MiB"})[0]
    tight.add(smol, "smol")
    asked = ASKED | {"prompt": PROMPTS[0], "strategy": "auto", "n": 4}
    places = [[role["name"] for role in tight.call("generate", asked)["plan"]["roles"]] for _ in range(2)]
    assert places == [["tight"], ["tight"]]
    roomy = nodes.start("roomy", plugins=WORK, jobs=jobs)[0]
    pair_all([tight, roomy])
    assert "roomy" in [role["name"] for role in tight.call("generate", asked)["plan"]["roles"]]


def test_the_cache_s_type_is_the_profile_s(nodes: Nodes, smol: Path) -> None:
    """In the plan's memory: 32, 16 and 8.5 bits an element. Weights and all else are the same."""
    needed = {}
    for cache_type in ("f32", "f16", "q8_0"):
        laptop = node_with(nodes, smol, context=1024, cache_type=cache_type)
        document = laptop.call("generate", ASKED | {"prompt": PROMPTS[0], "numerics": "fast"})
        assert len(document["tokens"]) == ASKED["n"]
        needed[cache_type] = document["plan"]["roles"][0]["memory_bytes"]
    ratio = (needed["f32"] - needed["f16"]) / (needed["f16"] - needed["q8_0"])
    assert ratio == pytest.approx((32 - 16) / (16 - 8.5), rel=1e-6)
