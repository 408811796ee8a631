"""A LoRA adapter over real nodes: it changes the text, alike however the model is cut, and stays with its
plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import WORK, Document, Node, Nodes

pytest.importorskip("gguf", reason="the adapters of these tests are written with gguf")

import lora_files

from edged.adapters import AdapterMeta, AdapterStore
from edged.groups import BESIDE_MAX

ASKED = {"model": "tiny", "prompt": "Why is the sky blue?", "n": 16, "temperature": 0.0, "ignore_eos": True}
EXACT = ASKED | {"numerics": "exact"}
LOCAL: Document = {"strategy": "local"}
TENSOR: Document = {"strategy": "tensor", "nodes": ["laptop", "phone"]}
LAYERS: Document = {"strategy": "layers", "nodes": ["phone", "laptop"]}


def keep(node: Node, name: str, base: Path, base_sha256: str, **adapter: Any) -> None:
    """Store a random adapter on a node, as training does."""
    folder = node.home.path / "made"
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_text("{}")  # peft's; an engine reads the GGUF
    lora_files.write_adapter(folder / "adapter.gguf", base, matrices=lora_files.LAYER, **adapter)
    AdapterStore(node.home).adopt(folder, name, AdapterMeta(base_sha256, "tiny", r=4, alpha=8.0))


@pytest.fixture(scope="module")
def duo(shared_nodes: Nodes, smol: Path) -> list[Node]:
    """Two members; the first has the model, and the adapters `mine`, `other` and `foreign`."""
    nodes = shared_nodes.group("laptop", "phone", plugins=WORK)
    tiny = lora_files.tiny(smol)
    laptop = nodes[0]
    sha256 = laptop.add(tiny, "tiny")["sha256"]
    keep(laptop, "mine", tiny, sha256)
    keep(laptop, "other", tiny, sha256, seed=6)
    keep(laptop, "foreign", tiny, "f" * 64)
    return nodes


def test_an_adapter_changes_the_text_alike_on_one_node_and_on_two(duo: list[Node]) -> None:
    laptop, phone = duo
    beside = laptop.job(EXACT | TENSOR | {"n": 48})  # without an adapter, at the same time
    plain = laptop.call("generate", EXACT | LOCAL)
    adapted = laptop.call("generate", EXACT | LOCAL | {"adapter": "mine"})
    assert adapted["plan"]["adapter"] == "mine"
    assert plain["plan"]["adapter"] is None
    assert adapted["text"] != plain["text"]
    size = (laptop.home.adapters / "mine" / "adapter.gguf").stat().st_size
    without, with_it = (job["plan"]["roles"][0]["memory_bytes"] for job in (plain, adapted))
    assert with_it - without == 2 * size  # exact numerics count F32, of which the file may have halves
    for cut in (TENSOR, LAYERS):
        document = laptop.call("generate", EXACT | cut | {"adapter": "mine"})
        assert [role["name"] for role in document["plan"]["roles"]] == cut["nodes"]
        assert document["tokens"] == adapted["tokens"]
    assert beside.document()["tokens"][:16] == plain["tokens"]
    other = laptop.call("generate", EXACT | TENSOR | {"adapter": "other"})
    assert other["tokens"] not in (plain["tokens"], adapted["tokens"])
    again = laptop.call("generate", EXACT | TENSOR | {"adapter": "mine", "n": 4})
    assert again["measured"]["load_ms"] == 0  # its group still stands
    held = phone.home.cache / "adapters"
    assert len(list(held.iterdir())) == 2  # fetched once each, and not the phone's own
    assert [row["name"] for row in phone.call("models.ls")["models"]] == ["tiny"]
    assert "stored: none" in str(phone.error("generate", ASKED | LOCAL | {"adapter": "mine"}))


def test_what_cannot_be_adapted_is_said_before_anything_starts(duo: list[Node]) -> None:
    laptop = duo[0]
    for asked, words in (
        ({"adapter": "mime"}, ("no adapter 'mime'", "foreign, mine, other")),
        ({"adapter": "foreign"}, ("'foreign' was made for 'tiny' (ffffffffffff)", "adapter of model 'tiny'")),
        ({"adapter": "../models"}, ("letters, digits",)),
    ):
        for command in ("generate", "plan"):
            error = laptop.error(command, ASKED | LOCAL | asked)
            assert error.exit_code == 2
            assert all(word in str(error) for word in words), str(error)
    assert laptop.call("status")["jobs_running"] == 0


def test_jobs_with_unlike_adapters_share_one_model_and_each_gets_what_it_gets_alone(duo: list[Node]) -> None:
    """In exact numerics, where a batch's size changes nothing."""
    laptop, wanted = duo[0], [None, "mine", "other"]
    for cut in (LOCAL, TENSOR):
        asked = [EXACT | cut | {"n": 40} | ({"adapter": name} if name else {}) for name in wanted]
        alone = [laptop.call("generate", asked[0])["tokens"]]
        before = [len(node.workers()) for node in duo]
        alone += [laptop.call("generate", each)["tokens"] for each in asked[1:]]
        assert len({tuple(tokens) for tokens in alone}) == len(wanted)
        running = [laptop.job(each) for each in (*asked, *asked)]
        documents = [job.document() for job in running]
        assert [document["tokens"] for document in documents] == alone + alone
        assert [document["plan"]["adapter"] for document in documents] == wanted + wanted
        assert [len(node.workers()) for node in duo] == before  # no other copy of the model


def test_more_adapters_than_a_group_keeps_take_turns(duo: list[Node], smol: Path) -> None:
    laptop, tiny = duo[0], lora_files.tiny(smol)
    sha256 = next(row["sha256"] for row in laptop.call("models.ls")["models"])
    names = [f"turn{number}" for number in range(BESIDE_MAX + 2)]
    for number, name in enumerate(names):
        keep(laptop, name, tiny, sha256, seed=20 + number)
    asked = [EXACT | LOCAL | {"adapter": name} for name in names]
    first = [job.document()["tokens"] for job in [laptop.job(each) for each in asked]]
    assert len({tuple(tokens) for tokens in first}) == len(names)
    assert [laptop.call("generate", each)["tokens"] for each in asked] == first
    laptop.call("adapters.rm", {"name": names[0]})
    assert "no adapter 'turn0'" in str(laptop.error("generate", asked[0]))
    assert laptop.call("generate", EXACT | LOCAL)["tokens"] not in first
