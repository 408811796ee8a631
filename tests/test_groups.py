"""Groups with ranks that may leave: who is told, and what goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged import wire
from edged.errors import EdgedError, PeerError, PolicyViolation
from edged.figures import rounds_log
from edged.groups import Asked, Group, Groups, Load
from edged.types import Candidate, NodeView, PlanRequest, Role

NODES = ("phone", "jetson", "desk")
PHONE, JETSON, DESK = range(3)
OPTIONAL = frozenset({PHONE, JETSON})


class Network:
    """Nodes that take every role but those of `refuses`, and what each was told."""

    identity = SimpleNamespace(node_id="desk", name="desk")

    def __init__(self, refuses: Mapping[str, EdgedError]) -> None:
        self.refuses = refuses
        self.takers: dict[str, Callable[[str, Any], None]] = {}
        self.gone: list[Callable[[str, str], None]] = []
        self.starts: dict[str, list[int]] = {}  # by node: the ranks that it was told to connect to
        self.told: list[tuple[str, str, Any]] = []

    def takes(self, kind: str, take: Callable[[str, Any], None]) -> None:
        self.takers[kind] = take

    def when_gone(self, callback: Callable[[str, str], None]) -> None:
        self.gone.append(callback)

    def name_of(self, node_id: str) -> str:
        return node_id

    async def ask(self, node_id: str, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        await asyncio.sleep(0)
        if kind == "offer":
            if node_id in self.refuses:
                raise self.refuses[node_id]
            return wire.to_map(wire.Offered(bytes(32), dict.fromkeys(range(3), 7000)))
        self.starts[node_id] = [end.rank for end in body.ends]
        return wire.to_map(wire.Started(1.0, 0, {"of": node_id}, (3,)))

    def tell_if_online(self, node_id: str, kind: str, body: Any) -> None:
        self.told.append((node_id, kind, body))

    tell_when_online = tell_if_online

    def of_kind(self, kind: str) -> list[str]:
        return [node_id for node_id, told, _ in self.told if told == kind]


class Rig:
    """Groups over these nodes. `there`: those that the coordinator sees."""

    def __init__(
        self, refuses: Mapping[str, EdgedError] | None = None, there: tuple[str, ...] = NODES
    ) -> None:
        self.network = Network(refuses or {})
        self.groups = Groups(cast("Any", self.network), 60.0)
        self.lost: list[Group] = []
        self.left: list[tuple[int, str]] = []
        self.groups.when_lost(self.lost.append)
        self.groups.when_left = lambda group, rank, reason: self.left.append((rank, reason))
        self.views = {name: NodeView(name, name) for name in there}

    def begin(self) -> Group:
        none = (0, 0)
        roles = tuple(Role(rank, name, rank, none, none, none, none, 1.0) for rank, name in enumerate(NODES))
        manifest = cast("Any", SimpleNamespace(sha256="0" * 64, name="m", size=1, model=None))
        offers = tuple(wire.TrainingOffer("0" * 16, "federated", {}) for _ in roles)
        load = Load(roles, manifest, "0" * 64, "e", 8, "fast", "desk", 0, "f32", offers, optional=OPTIONAL)
        asked = Asked("0" * 64, PlanRequest(), frozenset())
        group = self.groups.begin(load, asked, Candidate("federated", roles), self.views)
        self.groups.enter(group, "job")
        return group

    async def made(self) -> Group:
        group = self.begin()
        await self.groups.loaded(group, "job")
        return group

    def lose(self, group: Group, rank: int) -> None:
        self.network.takers["lost"](NODES[rank], wire.Lost(group.group_id, rank, "its worker ended"))


def test_an_optional_rank_that_is_lost_leaves_and_the_others_are_told() -> None:
    async def test() -> None:
        rig = Rig()
        group = await rig.made()
        rig.lose(group, JETSON)
        rig.lose(group, JETSON)  # its daemon may tell it twice
        assert group.lost is None
        assert rig.lost == []
        assert rig.left == [(JETSON, "its worker ended")]
        assert sorted(rig.network.of_kind("left")) == ["desk", "phone"]
        assert rig.network.of_kind("stop") == ["jetson"]

    asyncio.run(test())


@pytest.mark.parametrize("how", ["gone", "draining", "resting"])
def test_a_node_that_goes_or_rests_takes_its_optional_rank_alone_with_it(how: str) -> None:
    async def test() -> None:
        rig = Rig()
        group = await rig.made()
        if how == "gone":
            rig.network.gone[0]("phone", "it is silent")
        else:
            body = wire.Resting("its battery is low") if how == "resting" else wire.Empty()
            rig.network.takers[how]("phone", body)
        assert list(group.away) == [PHONE]
        assert group.lost is None

    asyncio.run(test())


def test_the_loss_of_any_other_rank_is_that_of_the_group() -> None:
    async def test() -> None:
        rig = Rig()
        group = await rig.made()
        rig.lose(group, DESK)
        assert rig.lost == [group]
        assert "node desk was lost" in str(group.lost)

    asyncio.run(test())


def test_an_optional_rank_that_is_lost_while_others_wait_for_it_ends_the_loading() -> None:
    async def test() -> None:
        rig = Rig()
        group = rig.begin()
        await asyncio.sleep(0)
        rig.lose(group, JETSON)
        with pytest.raises(PeerError, match="node jetson was lost"):
            await rig.groups.loaded(group, "job")

    asyncio.run(test())


@pytest.mark.parametrize(
    ("refuses", "there", "in_vain"),
    [
        ({"jetson": PeerError("it is offline")}, NODES, False),
        ({"jetson": PolicyViolation("it takes no new roles")}, NODES, True),
        ({}, ("phone", "desk"), False),
    ],
    ids=["away", "refuses", "unseen"],
)
def test_a_group_is_loaded_without_an_optional_rank_that_is_not_there(
    refuses: Mapping[str, EdgedError], there: tuple[str, ...], in_vain: bool
) -> None:
    """One whose node is there and says no need not be asked again."""

    async def test() -> None:
        rig = Rig(refuses, there)
        group = await rig.made()
        assert list(group.away) == [JETSON]
        assert group.refused == ({JETSON} if in_vain else set())
        assert rig.network.starts == {"phone": [DESK], "desk": [PHONE]}
        assert [started.survey for started in group.started] == [{"of": "phone"}, {}, {"of": "desk"}]

    asyncio.run(test())


def test_a_group_is_not_loaded_without_a_rank_that_it_needs() -> None:
    async def test() -> None:
        rig = Rig({"desk": PolicyViolation("it takes no new roles")})
        with pytest.raises(PolicyViolation):
            await rig.made()

    asyncio.run(test())


def test_a_rounds_log_says_who_was_left_out_and_why() -> None:
    values = {"loss": 1.0, "down_0": 9.0, "up_0": 8.0, "down_1": 9.0, "out_1_it_is_not_charging": 1.0}
    [row] = rounds_log([(0, "step", values | {"out_7_it_is_nobody": 1.0})], NODES)
    assert row["members"] == ["phone"]
    assert row["left_out"] == {"jetson": "it is not charging"}
