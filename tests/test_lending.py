"""Files of adapters: known by content, lent to the nodes of a plan alone."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from edged_plugins import echo

from edged import models, wire
from edged.adapters import AdapterMeta, AdapterStore
from edged.config import Profile
from edged.errors import EdgedError, EngineError
from edged.identity import Home
from edged.ingest import ingest
from edged.lending import Lending
from edged.models import ModelStore
from edged.peers import Peers
from edged.supervisor import Supervisor
from edged.transfers import BORROWED_MAX, Transfers
from edged.types import AdapterFile

BYTES = b"GGUF and what follows" * 1000


def keep(home: Home, name: str, base: str = "a" * 64, content: bytes = BYTES) -> Path:
    folder = home.path / "made"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"as peft wants it")
    (folder / "adapter.gguf").write_bytes(content)
    meta = AdapterMeta(base, "smol", r=4, alpha=8.0)
    return Path(AdapterStore(home).adopt(folder, name, meta).folder)


def test_an_adapter_is_known_by_its_content(tmp_path: Path) -> None:
    home = Home(tmp_path)
    folder = keep(home, "mine")
    found, lending = AdapterStore(home).find("mine"), Lending()
    hashed = lending.hashed(found)
    assert hashed.file == AdapterFile(hashlib.sha256(BYTES).hexdigest(), len(BYTES))
    assert lending.hashed(found) is hashed
    assert lending.lendable(hashed.file.sha256) is hashed
    (folder / "adapter.gguf").write_bytes(BYTES[::-1])
    os.utime(folder / "adapter.gguf", ns=(1, 1))
    assert lending.lendable(hashed.file.sha256) is None  # replaced: the plan's content is gone
    assert lending.hashed(found).file.sha256 == hashlib.sha256(BYTES[::-1]).hexdigest()


def test_content_is_lent_from_whichever_of_its_files_is_still_there(tmp_path: Path) -> None:
    home = Home(tmp_path)
    keep(home, "mine")
    keep(home, "again")
    store, lending = AdapterStore(home), Lending()
    sha256 = lending.hashed(store.find("mine")).file.sha256
    store.remove("mine")
    again = lending.hashed(store.find("again"))
    assert again.file.sha256 == sha256
    assert lending.lendable(sha256) is again


# --- lending ----------------------------------------------------------------------------------------


class Net:
    """The side of the network: takes the answers that a node registers, and asks nobody."""

    def __init__(self) -> None:
        self.identity = SimpleNamespace(node_id="me", name="me")
        self.membership = SimpleNamespace(member=lambda node_id: SimpleNamespace(rights=("serve", "submit")))
        self.answer: dict[str, Callable[..., Any]] = {}

    def answers(self, kind: str, answer: Any) -> None:
        self.answer[kind] = answer


class Rig:
    """A node with a model and an adapter of it."""

    def __init__(self, folder: Path) -> None:
        home = Home(folder)
        home.models.mkdir(parents=True)
        source = folder / "source"
        source.write_text("edged-echo 1\n")
        with source.open("rb") as file:
            params = {"source_fd": file.fileno(), "name": "m", "models": str(home.models)}
            added = ingest(
                params | {"describe": [["echo", echo.edged_engines({})[0].describe]]}, lambda event: None
            )
        keep(home, "mine", added["sha256"])
        self.home, self.net, self.lending = home, Net(), Lending()
        self.store = ModelStore(home)
        self.transfers = Transfers(
            home, Profile(), self.store, self.lending, cast("Peers", self.net), Supervisor(), {}
        )
        self.file = self.lending.hashed(AdapterStore(home).find("mine")).file

    def manifest(self, node_id: str) -> wire.Manifest:
        request = wire.ManifestRequest(self.file.sha256)
        answer: wire.ManifestOf = asyncio.run(self.net.answer["manifest"](node_id, request))
        return answer.manifest

    def offer(self) -> wire.Offer:
        model = self.store.list()[0]
        described = self.store.manifest(model.sha256).model
        return wire.Offer(
            "g", 0, (), model.sha256, "m", "", described, "shard", 1, "fast", (), "me", adapter=self.file
        )


def test_an_adapter_goes_to_the_nodes_of_its_plans_and_to_nobody_else(tmp_path: Path) -> None:
    """A member with every right is told what it would be told of any file that is not here."""
    rig = Rig(tmp_path)
    rig.transfers.borrowers = lambda sha256: {"pi"} if sha256 == rig.file.sha256 else set()
    manifest = rig.manifest("pi")
    assert (manifest.sha256, manifest.size) == (rig.file.sha256, len(BYTES))
    assert manifest.chunks == (hashlib.sha256(BYTES).digest(),)
    assert "mine" not in manifest.name
    assert models.unpack_manifest(models.pack_manifest(manifest)) == manifest
    with pytest.raises(EngineError, match="in the store; it is not there"):
        rig.manifest("phone")
    for kind, body in (("serve", wire.Serve(rig.file.sha256, b"k" * 32)),):
        with pytest.raises(EdgedError, match="in the store; it is not"):
            asyncio.run(rig.net.answer[kind]("phone", body))
    rig.transfers.borrowers = lambda sha256: set()  # the plan has ended
    with pytest.raises(EngineError, match="in the store; it is not there"):
        rig.manifest("pi")


def test_a_role_reads_the_content_that_was_planned_or_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    offer = rig.offer()
    file = rig.transfers.open_adapter(offer, "me")
    assert file is not None
    assert os.pread(file, len(BYTES) + 1, 0) == BYTES
    os.close(file)
    assert rig.transfers.open_adapter(dataclasses.replace(offer, adapter=None), "me") is None
    (rig.home.adapters / "mine" / "adapter.gguf").write_bytes(b"another")
    for coordinator in ("me", "pi"):
        with pytest.raises(EngineError, match="it is gone or was replaced"):
            rig.transfers.open_adapter(offer, coordinator)


def test_of_other_nodes_adapters_the_last_used_stay(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    held = rig.home.cache / "adapters"
    rig.transfers.borrowers = lambda sha256: {"pi"}
    manifest = rig.manifest("pi")
    names = [f"{number:064x}" for number in range(BORROWED_MAX + 3)]
    for number, name in enumerate(names):
        (held / name).mkdir(parents=True)
        mine = dataclasses.replace(manifest, sha256=name, name=f"adapter-{number}")
        models.write_entry(held / name, mine.name, None, None, models.pack_manifest(mine))
        os.utime(held / name, (number, number))
    os.utime(held / names[0], (100, 100))  # used again
    rig.transfers._forget_adapters()
    assert sorted(path.name for path in held.iterdir()) == [names[0], *names[4:]]
    assert [model.name for model in rig.store.list()] == ["m"]
