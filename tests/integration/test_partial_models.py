"""A node fetches what its role reads of a model, goes on from that, and completes it when it must."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
from support import WORK, Document, Node, Nodes, wait_online

from edged.models import ModelStore, has_bit, pack_manifest, settled_bits
from edged.partial import Partial

EXACT = {"model": "smol", "prompt": "Why is the sky blue?", "n": 12, "temperature": 0.0, "ignore_eos": True,
         "numerics": "exact"}  # fmt: skip


@pytest.fixture
def duo(nodes: Nodes, smol: Path) -> tuple[Node, Node]:
    """Two members; the first has the model."""
    laptop, phone = nodes.group("laptop", "phone", plugins=WORK)
    laptop.add(smol, "smol")
    return laptop, phone


def chunks_here(node: Node, sha256: str) -> list[bool]:
    """Which chunks of a partly held model the node has, flushed and verified."""
    count = len(ModelStore(node.home).manifest(sha256).chunks)
    bits = settled_bits(node.home.models / sha256, count)
    assert bits is not None
    return [has_bit(bits, index) for index in range(count)]


def rows(node: Node) -> list[Document]:
    return node.call("models.ls")["models"]


def layers(first: Node, second: Node, shares: list[float]) -> dict[str, Any]:
    return EXACT | {"strategy": "layers", "nodes": [first.name, second.name], "shares": shares}


def test_a_node_fetches_the_part_that_its_layers_need_and_later_the_rest(duo: tuple[Node, Node]) -> None:
    laptop, phone = duo
    alone = laptop.call("generate", EXACT | {"strategy": "local"})["tokens"]

    first = laptop.call("generate", layers(phone, laptop, [1, 9]))  # the first three layers of thirty
    assert first["tokens"] == alone
    [row] = rows(phone)
    assert (row["name"], row["complete"]) == ("smol", False)
    early = chunks_here(phone, row["sha256"])
    assert sum(early) < 0.6 * len(early)  # the head, the embedding and three layers
    assert early[0]

    again = laptop.call("generate", layers(laptop, phone, [8, 2]))  # other layers: what it lacks is added
    assert again["tokens"] == alone
    late = chunks_here(phone, row["sha256"])
    assert all(after for before, after in zip(early, late, strict=True) if before)
    assert sum(early) < sum(late) < len(late)

    assert phone.call("generate", EXACT | {"strategy": "local"})["tokens"] == alone
    assert [row["complete"] for row in rows(phone)] == [True]


def test_a_part_is_used_again_without_its_holder(duo: tuple[Node, Node]) -> None:
    """The phone has what its role reads, and asks nobody for it; what it lacks nobody can give."""
    laptop, phone = duo
    laptop.call("generate", layers(laptop, phone, [5, 5]))
    before = chunks_here(phone, rows(phone)[0]["sha256"])
    laptop.call("models.rm", {"name": "smol"})
    error = phone.error("generate", EXACT | {"strategy": "local"})
    assert "expected all that the role reads" in str(error)
    assert chunks_here(phone, rows(phone)[0]["sha256"]) == before


def test_two_jobs_at_once_that_need_different_parts_both_get_theirs(duo: tuple[Node, Node]) -> None:
    laptop, phone = duo
    alone = laptop.call("generate", EXACT | {"strategy": "local"})["tokens"]
    asked = [layers(phone, laptop, [1, 9]), layers(laptop, phone, [5, 5]), layers(laptop, phone, [8, 2])]
    jobs = [laptop.job(request) for request in asked]
    assert [job.document()["tokens"] for job in jobs] == [alone] * 3


def test_a_part_that_was_damaged_is_mended_before_it_is_used(duo: tuple[Node, Node]) -> None:
    laptop, phone = duo
    asked = layers(laptop, phone, [5, 5])
    tokens = laptop.call("generate", asked)["tokens"]
    sha256 = rows(phone)[0]["sha256"]
    phone.stop()
    part = phone.home.models / sha256 / "model.part"
    last = max(index for index, here in enumerate(chunks_here(phone, sha256)) if here)
    with part.open("r+b") as file:
        file.seek(last * (4 << 20))
        file.write(bytes(1000))
    phone.start().wait_ready()
    wait_online([laptop, phone])
    assert laptop.call("generate", asked)["tokens"] == tokens


def test_a_part_that_another_manifest_planted_is_not_computed_with(duo: tuple[Node, Node]) -> None:
    """Somebody's own weights, with chunk hashes of their own, under the SHA-256 of a known model."""
    laptop, phone = duo
    asked = layers(laptop, phone, [5, 5])
    tokens = laptop.call("generate", asked)["tokens"]
    sha256 = rows(phone)[0]["sha256"]
    phone.stop()
    folder, manifest = phone.home.models / sha256, ModelStore(phone.home).manifest(sha256)
    weights = [index for index, here in enumerate(chunks_here(phone, sha256)) if here][-8:-1]
    planted, chunks = bytes(manifest.chunk_bytes), list(manifest.chunks)
    with (folder / "model.part").open("r+b") as file:
        for index in weights:
            file.seek(index * manifest.chunk_bytes)
            file.write(planted)
            chunks[index] = hashlib.sha256(planted).digest()
    other = dataclasses.replace(manifest, chunks=tuple(chunks))
    (folder / "manifest.bin").write_bytes(pack_manifest(other))
    with Partial(folder, other) as part:
        part.open_for_writing(lambda done: None)
        part.settle()
    assert all(chunks_here(phone, sha256)[index] for index in weights)
    phone.start().wait_ready()
    wait_online([laptop, phone])
    assert laptop.call("generate", asked)["tokens"] == tokens
