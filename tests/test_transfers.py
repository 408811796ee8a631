"""Who shares a transfer with whom, at the seam between the daemon and the node that gives the model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged.config import Profile
from edged.errors import PeerError
from edged.identity import Home
from edged.lending import Lending
from edged.models import ModelStore
from edged.peers import Peers
from edged.supervisor import Supervisor
from edged.transfers import Ranges, Transfers

SHA256 = "a" * 64
HEAD, TAIL = ((0, 1),), ((5, 6),)


class Holder:
    """A peer that is asked for a manifest, and gives none."""

    identity = SimpleNamespace(node_id="me", name="me")

    def __init__(self) -> None:
        self.asked = 0

    def answers(self, kind: str, answer: Any) -> None: ...

    def name_of(self, node_id: str) -> str:
        return node_id

    async def ask(self, node_id: str, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        self.asked += 1
        await asyncio.sleep(0)  # whoever else wants the model comes in between
        raise PeerError("gone")


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        (("m1", HEAD), ("m1", HEAD), 1),
        (("m1", None), ("m1", HEAD), 1),
        (("m1", HEAD), ("m2", HEAD), 2),  # a part is worth no more than its manifest
        (("m1", None), ("m2", HEAD), 2),
        (("m1", HEAD), ("m1", TAIL), 2),
        ((None, None), ("m1", HEAD), 2),
    ],
    ids=str,
)
def test_a_transfer_is_shared_for_the_same_bytes_by_the_same_manifest_alone(
    tmp_path: Path, first: tuple[str | None, Ranges | None], second: tuple[str, Ranges], asked: int
) -> None:
    async def test() -> None:
        home, holder = Home(tmp_path), Holder()
        peers = cast("Peers", holder)
        transfers = Transfers(home, Profile(), ModelStore(home), Lending(), peers, Supervisor(), {})
        wanted = [
            transfers.fetch(SHA256, "holder", manifest, ranges=ranges) for manifest, ranges in (first, second)
        ]
        for ended in await asyncio.gather(*wanted, return_exceptions=True):
            assert isinstance(ended, PeerError)
        assert holder.asked == asked

    asyncio.run(test())
