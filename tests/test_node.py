"""Membership: who is in, by whose word, with which rights, and how that ends."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edged import node
from edged.errors import ConfigError, TrustError
from edged.node import FORGOTTEN_MAX, INVITES_MAX, MEMBERS_MAX, Member, Membership
from edged.types import RIGHTS

settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")

KEY, OTHER = b"k" * 32, b"o" * 32
NOW = 1000.0


def members(*given: Member) -> Membership:
    table = Membership()
    for member in given:
        table.admit(member)
    return table


def invited(rights: Any = RIGHTS, zone: Any = "own", expires_at: float = NOW + 10) -> Membership:
    table = Membership()
    table.invite(KEY, expires_at, rights, zone, NOW)
    return table


# --- invites --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "now", "is_good"),
    [(KEY, NOW, True), (KEY, NOW + 9.9, True), (KEY, NOW + 10, False), (OTHER, NOW, False)],
    ids=["at once", "just in time", "expired", "another key"],
)
def test_a_token_is_good_for_its_key_until_it_expires(key: bytes, now: float, is_good: bool) -> None:
    table = invited()
    assert table.is_invited(key, now) == is_good
    if is_good:
        assert table.redeem(key, Member("a", "phone"), now).state == "joining"
    else:
        with pytest.raises(TrustError, match="unused and not expired"):
            table.redeem(key, Member("a", "phone"), now)
        assert "a" not in table.members


def test_a_token_is_good_once() -> None:
    table = invited()
    table.redeem(KEY, Member("a", "phone"), NOW)
    assert not table.is_invited(KEY, NOW)
    with pytest.raises(TrustError):
        table.redeem(KEY, Member("b", "thief"), NOW)
    assert set(table.members) == {"a"}


def test_a_newcomer_has_the_rights_of_the_invite_whatever_it_claims() -> None:
    claimed = Member("a", "phone", RIGHTS, "own", state="member")
    member = invited(("serve",), "guest").redeem(KEY, claimed, NOW)
    assert (member.rights, member.zone, member.state) == (("serve",), "guest", "joining")


def test_a_newcomer_that_never_proves_its_key_is_dropped() -> None:
    table = invited()
    table.redeem(KEY, Member("a", "phone"), NOW, patience_s=60)
    assert table.expire(NOW + 59) == []
    assert table.expire(NOW + 60) == ["a"]
    assert not table.members


def test_a_newcomer_that_proved_its_key_stays() -> None:
    table = invited()
    table.redeem(KEY, Member("a", "phone"), NOW)
    assert table.prove("a")
    assert not table.prove("a")  # once
    assert not table.prove("stranger")
    assert table.expire(NOW + 10**9) == []
    assert table.members["a"].state == "member"


def test_expired_invites_make_room_and_open_ones_are_bounded() -> None:
    table = Membership()
    for number in range(INVITES_MAX):
        table.invite(bytes([number]) * 32, NOW + 10, RIGHTS, "own", NOW)
    with pytest.raises(TrustError, match="open invites"):
        table.invite(KEY, NOW + 10, RIGHTS, "own", NOW)
    table.invite(KEY, NOW + 20, RIGHTS, "own", NOW + 10)
    assert list(table.invites) == [KEY.hex()]


# --- introductions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by_rights", "by_zone", "said_rights", "said_zone", "rights", "zone"),
    [
        (RIGHTS, "own", RIGHTS, "own", RIGHTS, "own"),
        (RIGHTS, "own", ("serve",), "guest", ("serve",), "guest"),
        (("serve", "train"), "own", RIGHTS, "own", ("serve", "train"), "own"),
        (("submit",), "own", ("serve",), "own", (), "own"),
        (RIGHTS, "guest", RIGHTS, "own", RIGHTS, "guest"),
        ((), "guest", RIGHTS, "guest", (), "guest"),
    ],
)
def test_an_introduction_gives_no_more_than_the_introducer_has(
    by_rights: Any, by_zone: Any, said_rights: Any, said_zone: Any, rights: Any, zone: Any
) -> None:
    table = members(Member("by", "laptop", by_rights, by_zone))
    assert table.introduce("by", Member("new", "phone", said_rights, said_zone))
    added = table.members["new"]
    assert (added.rights, added.zone, added.state) == (rights, zone, "member")


@pytest.mark.parametrize("state", ["unknown", "joining", "forgotten"])
def test_only_a_member_introduces(state: str) -> None:
    table = invited()
    if state != "unknown":
        table.redeem(KEY, Member("by", "laptop"), NOW)
    if state == "forgotten":
        table.forget("by")
    with pytest.raises(TrustError, match="introduction by a member"):
        table.introduce("by", Member("new", "phone"))
    assert "new" not in table.members


def test_an_introduction_changes_nothing_of_a_node_that_is_known() -> None:
    known = Member("a", "phone", (), "guest")
    table = members(Member("by", "laptop"), known)
    assert not table.introduce("by", Member("a", "mine now", RIGHTS, "own", ("192.0.2.9",), 9))
    assert table.members["a"] == known


def test_members_are_bounded() -> None:
    table = members(*(Member(f"{n:04}", "n") for n in range(MEMBERS_MAX)))
    with pytest.raises(TrustError, match="at most 256 members"):
        table.introduce("0000", Member("one more", "n"))
    table.relocate("0000", "renamed", (), 1)  # what is known may still change
    assert table.trust("0000", ("serve",), None).rights == ("serve",)


# --- forgetting -----------------------------------------------------------------------------------


def test_a_forgotten_node_comes_back_by_an_invite_alone() -> None:
    table = members(Member("by", "laptop"), Member("a", "phone"))
    table.forget("a")
    assert not table.introduce("by", Member("a", "phone"))
    assert "a" not in table.members
    table.invite(KEY, NOW + 10, ("serve",), "own", NOW)
    table.redeem(KEY, Member("a", "phone"), NOW)
    table.prove("a")
    assert table.members["a"].rights == ("serve",)
    assert "a" not in table.forgotten


@pytest.mark.parametrize(
    ("teller", "node_id", "is_gone"),
    [
        ("own", "own2", True),
        ("own", "guest", True),
        ("guest", "own", False),
        ("guest", "guest", False),
        ("stranger", "own", False),
    ],
)
def test_whose_word_removes_whom(teller: str, node_id: str, is_gone: bool) -> None:
    """A guest's word does not remove my own devices."""
    table = members(Member("own", "a"), Member("own2", "b"), Member("guest", "c", zone="guest"))
    assert table.forget_on_word(teller, node_id) == is_gone
    assert (node_id not in table.members) == is_gone
    assert (node_id in table.forgotten) == is_gone


def test_a_revocation_that_is_heard_first_beats_the_introduction_that_comes_later() -> None:
    table = members(Member("by", "laptop"))
    assert not table.forget_on_word("by", "a")  # nobody we had
    assert not table.introduce("by", Member("a", "phone"))


def test_what_is_forgotten_is_bounded_and_the_oldest_goes_first() -> None:
    table = Membership()
    for number in range(FORGOTTEN_MAX + 1):
        table.forget(str(number))
    assert len(table.forgotten) == FORGOTTEN_MAX
    assert "0" not in table.forgotten
    assert str(FORGOTTEN_MAX) in table.forgotten


def test_every_change_of_who_may_do_what_has_a_version_of_its_own() -> None:
    table = invited()
    seen = [table.version]
    table.redeem(KEY, Member("a", "phone"), NOW)
    seen.append(table.version)
    table.prove("a")
    seen.append(table.version)
    table.trust("a", ("serve",), "guest")
    seen.append(table.version)
    table.introduce("a", Member("b", "tablet"))
    seen.append(table.version)
    assert table.forget("a") == table.version
    seen.append(table.version)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("version", [-1, 2**53 + 1, 2**64])
def test_a_version_that_leaves_no_room_for_ours_is_refused(version: int) -> None:
    """A member's claim becomes ours where it is higher; at 2**64 no message could carry the next one."""
    table = members(Member("by", "laptop"), Member("a", "phone"))
    with pytest.raises(TrustError, match="membership version"):
        table.introduce("by", Member("new", "tablet", admission=version))
    if version > 0:
        with pytest.raises(TrustError, match="membership version"):
            table.forget_on_word("by", "a", version)
    assert table.version < 10
    assert set(table.members) == {"by", "a"}


# --- names ----------------------------------------------------------------------------------------

NAMED = members(
    Member("abcdefgh1", "phone"),
    Member("abcdefgh2", "attic"),
    Member("zzzzzzzz1", "twin"),
    Member("y", "twin"),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("phone", "abcdefgh1"),
        ("abcdefgh2", "abcdefgh2"),
        ("zzzzzzzz", "zzzzzzzz1"),
        ("me", "mine"),
        ("zzzzzzz", "no node"),  # a prefix of seven
        ("abcdefgh", "2 nodes match"),
        ("twin", "2 nodes match"),
        ("", "no node"),
        ("nobody", "no node 'nobody'; known: attic"),
    ],
)
def test_a_node_is_found_by_name_id_or_prefix(text: str, found: str) -> None:
    if " " in found:
        with pytest.raises(ConfigError, match=found):
            NAMED.find(text, [("mine", "me")])
    else:
        assert NAMED.find(text, [("mine", "me")]) == found


def test_a_member_tells_where_it_is_but_not_what_it_may() -> None:
    table = members(Member("a", "phone", ("serve",), "guest", ("192.0.2.1",), 7))
    table.relocate("a", "telephone", ("192.0.2.2",), 0)
    assert table.members["a"] == Member("a", "telephone", ("serve",), "guest", ("192.0.2.2", "192.0.2.1"), 7)
    table.relocate("stranger", "x", (), 1)
    assert set(table.members) == {"a"}


def test_a_member_that_moves_often_does_not_fill_the_table() -> None:
    table = members(Member("a", "phone"))
    for number in range(50):
        table.relocate("a", "phone", (f"192.0.2.{number}",), 7)
    assert table.members["a"].addresses == tuple(f"192.0.2.{n}" for n in range(49, 41, -1))


# --- storing --------------------------------------------------------------------------------------


def test_a_stored_membership_comes_back() -> None:
    table = invited(("serve",), "guest")
    table.admit(Member("a", "phone", ("serve",), "guest", ("192.0.2.1",), 7))
    table.redeem(KEY, Member("b", "tablet"), NOW)
    table.invite(OTHER, NOW + 5, RIGHTS, "own", NOW)
    table.forget("c")
    assert node.from_map(json.loads(json.dumps(table.to_map()))) == table
    assert node.from_map({}) == Membership()


@pytest.mark.parametrize(
    "stored",
    [
        {"members": []},
        {"members": {"a": {"node_id": "a"}}},
        {"members": {"a": {"node_id": "a", "name": "n", "rights": ["rule"]}}},
        {"members": {"a": {"node_id": "a", "name": "n", "zone": "mine"}}},
        {"version": "1"},
        {"forgotten": ["a"]},
    ],
)
def test_what_is_no_membership_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(TrustError, match="expected a stored membership"):
        node.from_map(stored)


# --- any history ----------------------------------------------------------------------------------

NODES = st.sampled_from("abcdef")
RIGHT_SETS = st.lists(st.sampled_from(RIGHTS), unique=True).map(tuple)
ZONES = st.sampled_from(["own", "guest"])
VERSIONS = st.integers(0, 40)


class History(RuleBasedStateMachine):
    """Whatever happens in whatever order, beside a ledger of what each node was ever granted here."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Membership()
        self.now = 0.0
        self.keys = 0
        self.open: dict[bytes, tuple[float, Any, Any]] = {}
        self.closed: list[bytes] = []
        self.granted: dict[str, set[str]] = {}  # what its owner or its introducers could give
        self.banned: dict[str, int] = {}  # node -> the version at which it was revoked

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(ttl=st.floats(1, 100), rights=RIGHT_SETS, zone=ZONES)
    def invite(self, ttl: float, rights: Any, zone: Any) -> None:
        self.keys += 1
        key = self.keys.to_bytes(32, "big")
        self.table.invite(key, self.now + ttl, rights, zone, self.now)
        self.open[key] = (self.now + ttl, rights, zone)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), node_id=NODES)
    def redeem(self, data: st.DataObject, node_id: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        expires_at, rights, zone = self.open.pop(key)
        self.closed.append(key)
        before = self.table.member(node_id)
        try:
            member = self.table.redeem(key, Member(node_id, node_id), self.now)
        except TrustError:
            assert self.now >= expires_at
            return
        assert self.now < expires_at
        if before is not None and before.state == "member":
            assert member == before  # the token's holder has not proved that key
            return
        assert (member.rights, member.zone) == (rights, zone)
        self.granted[node_id] = set(rights)
        self.banned.pop(node_id, None)

    @precondition(lambda self: self.closed)
    @rule(data=st.data(), node_id=NODES)
    def redeem_again(self, data: st.DataObject, node_id: str) -> None:
        key = data.draw(st.sampled_from(self.closed))
        assert not self.table.is_invited(key, self.now)
        before = dict(self.table.members)
        with pytest.raises(TrustError):
            self.table.redeem(key, Member(node_id, node_id), self.now)
        assert self.table.members == before

    @rule(node_id=NODES)
    def prove(self, node_id: str) -> None:
        self.table.prove(node_id)

    @rule(by=NODES, node_id=NODES, rights=RIGHT_SETS, zone=ZONES, admission=VERSIONS)
    def introduce(self, by: str, node_id: str, rights: Any, zone: Any, admission: int) -> None:
        introducer = self.table.members.get(by)
        was = self.table.members.get(node_id)
        newcomer = Member(node_id, node_id, rights, zone, admission=admission)
        if introducer is None or introducer.state != "member":
            with pytest.raises(TrustError):
                self.table.introduce(by, newcomer)
            return
        added = self.table.introduce(by, newcomer)
        if introducer.zone == "own" and admission > self.banned.get(node_id, admission):
            del self.banned[node_id]  # it was invited elsewhere, after it was revoked
        assert added == (was is None and node_id not in self.banned)
        now = self.table.members.get(node_id)
        if added:
            assert now
            assert set(now.rights) <= set(introducer.rights)
            assert now.zone == "guest" or introducer.zone == "own"
            self.granted[node_id] = set(introducer.rights) & set(rights)
        elif was and now:
            assert dataclasses.replace(now, admission=was.admission) == was

    @rule(node_id=NODES, rights=RIGHT_SETS)
    def trust(self, node_id: str, rights: Any) -> None:
        if node_id in self.table.members:
            self.table.trust(node_id, rights, None)
            self.granted[node_id] = set(rights)

    @rule(node_id=NODES, name=st.text(max_size=3))
    def relocate(self, node_id: str, name: str) -> None:
        self.table.relocate(node_id, name, ("192.0.2.1",), 1)

    @rule(node_id=NODES)
    def forget(self, node_id: str) -> None:
        self.banned[node_id] = self.table.forget(node_id)

    @rule(teller=NODES, node_id=NODES, version=VERSIONS)
    def forget_on_word(self, teller: str, node_id: str, version: int) -> None:
        by, was = self.table.members.get(teller), self.table.members.get(node_id)
        ended = self.table.forget_on_word(teller, node_id, version)
        if ended:
            assert by
            assert by.zone == "own"
            assert was
            assert version >= was.admission
        else:
            assert self.table.members.get(node_id) == was
        if node_id in self.table.forgotten:
            self.banned[node_id] = max(self.table.forgotten[node_id], self.banned.get(node_id, 0))

    @rule()
    def expire(self) -> None:
        self.table.expire(self.now)

    @rule()
    def store_and_load(self) -> None:
        self.table = node.from_map(json.loads(json.dumps(self.table.to_map())))

    @invariant()
    def nobody_has_more_than_was_granted(self) -> None:
        for member in self.table.members.values():
            assert set(member.rights) <= self.granted[member.node_id]

    @invariant()
    def nobody_who_was_forgotten_is_here(self) -> None:
        assert not set(self.banned) & set(self.table.members)
        assert set(self.banned) == set(self.table.forgotten)

    @invariant()
    def the_table_is_bounded_and_sound(self) -> None:
        assert len(self.table.members) <= MEMBERS_MAX
        assert len(self.table.invites) <= INVITES_MAX
        assert not set(self.table.members) & set(self.table.forgotten)
        assert all(member.node_id == key for key, member in self.table.members.items())


History.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_no_history_widens_rights_or_brings_back_the_forgotten = History.TestCase


def test_a_member_is_a_value() -> None:
    assert dataclasses.is_dataclass(Member)
    assert msgspec.convert(msgspec.to_builtins(Member("a", "b")), Member) == Member("a", "b")
