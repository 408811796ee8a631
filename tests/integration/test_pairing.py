"""Who gets in, who does not, and how a node is put out again: real daemons on loopback."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from support import GUARD_S, Node, Nodes, pair, pair_all, wait_no_workers, wait_online, wait_until

from edged import token, wire
from edged.identity import node_id_of
from edged.node import Member, Membership
from edged.transport import new_keys, public_of, secure_client

FLOOD = 300  # idle TCP connections; libzmq drops each when its handshake takes too long
ONLINE_S = 100.0  # ten times the 10 s of the contract


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes) -> list[Node]:
    """Three members of one group; tests leave them so."""
    return shared_nodes.group("laptop", "jetson", "phone")


def invited(node: Node, **asked: object) -> str:
    return node.call("invite", asked)["token"]


# --- tokens ---------------------------------------------------------------------------------------


def test_a_token_works_once(start_node: Callable[..., Node]) -> None:
    inviter, first, second = start_node("laptop"), start_node("phone"), start_node("stranger")
    given = invited(inviter)
    assert first.call("join", {"token": given})["node_id"] == inviter.node_id
    assert first.sees_online(inviter)
    assert inviter.sees_online(first)
    error = second.error("join", {"token": given})
    assert (error.code, error.exit_code) == ("trust", 5)
    assert "unused" in str(error)
    assert set(inviter.peers()) == {"phone"}
    assert second.peers() == {}


def test_a_token_does_not_work_after_it_expired(start_node: Callable[..., Node]) -> None:
    inviter, newcomer = start_node("laptop"), start_node("phone")
    given = invited(inviter, ttl_s=1.0)
    time.sleep(1.1)
    assert newcomer.error("join", {"token": given}).exit_code == 5
    assert inviter.peers() == {}


def altered(given: str, **fields: object) -> str:
    """The token with other contents."""
    plain = token.decode(given)
    names = ("addresses", "port", "public_key", "one_time_secret", "expires_at", "zone")
    return token.Token(**({name: getattr(plain, name) for name in names} | fields)).encode()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: "",
        lambda given: "hello",
        lambda given: given[:-9],
        lambda given: given[:30] + "!" + given[31:],
        lambda given: altered(given, one_time_secret=new_keys()[1]),
        lambda given: altered(given, public_key=bytes(32)),
    ],
    ids=["empty", "no token", "cut", "garbled", "another one-time key", "no public key"],
)
def test_what_is_no_token_of_ours_admits_nobody(trio: list[Node], spoil: Callable[[str], str]) -> None:
    newcomer, inviter = trio[0], trio[1]
    before = inviter.peers()
    error = newcomer.error("join", {"token": spoil(invited(inviter))})
    assert error.exit_code in (5, 6)
    assert "\n" not in str(error)
    assert inviter.peers().keys() == before.keys()


def test_a_token_of_another_inviter_s_key_is_refused(start_node: Callable[..., Node]) -> None:
    """Somebody who answers at the inviter's address without its key gets nothing."""
    inviter, newcomer = start_node("laptop"), start_node("phone")
    given = altered(invited(inviter), public_key=new_keys()[0])
    assert newcomer.error("join", {"token": given}).exit_code in (5, 6)
    assert newcomer.peers() == {}
    assert inviter.peers() == {}


def test_an_invited_node_that_never_proves_its_key_is_dropped() -> None:
    key, newcomer = b"k" * 32, Member(node_id_of(b"n" * 32), "phone")
    group = Membership()
    group.invite(key, expires_at=100.0, rights=("submit",), zone="own", now=0.0)
    group.redeem(key, newcomer, now=10.0, patience_s=60.0)
    assert group.expire(now=69.9) == []
    assert group.expire(now=70.0) == [newcomer.node_id]
    assert group.member(newcomer.node_id) is None


def test_an_invited_node_that_proved_its_key_stays() -> None:
    key, newcomer = b"k" * 32, Member(node_id_of(b"n" * 32), "phone")
    group = Membership()
    group.invite(key, expires_at=100.0, rights=("submit",), zone="own", now=0.0)
    group.redeem(key, newcomer, now=10.0)
    assert group.prove(newcomer.node_id)
    assert group.expire(now=1e9) == []


def test_a_member_that_is_invited_again_stays_a_member() -> None:
    group, member = Membership(), Member(node_id_of(b"n" * 32), "phone")
    for key in (b"k" * 32, b"l" * 32):
        group.invite(key, expires_at=100.0, rights=("submit",), zone="own", now=0.0)
        group.redeem(key, member, now=10.0)
        assert group.prove(member.node_id) == (key == b"k" * 32)
    again = group.members[member.node_id]
    assert (again.state, again.rights) == ("member", ("submit",))
    assert group.expire(now=1e9) == []


def test_an_invite_after_a_revocation_beats_it_everywhere_and_an_older_one_does_not() -> None:
    """Two members, one of whom forgets a third and invites it again; words arrive late and twice."""
    here, there = Membership(), Membership()
    phone = Member("phone", "phone")
    for table, other in ((here, "there"), (there, "here")):
        table.admit(Member(other, other))
        table.admit(phone)
    revoked = here.forget("phone")
    assert there.forget_on_word("here", "phone", revoked)
    assert not there.introduce("here", phone)  # an older introduction
    assert not there.forget_on_word("here", "phone", revoked)
    here.invite(b"k" * 32, expires_at=100.0, rights=("submit",), zone="own", now=0.0)
    here.redeem(b"k" * 32, phone, now=1.0)
    here.prove("phone")
    assert not here.forget_on_word("there", "phone", there.forgotten["phone"])
    assert there.introduce("here", here.members["phone"])
    assert not there.forget_on_word("here", "phone", revoked)
    assert set(here.members) == {"there", "phone"}
    assert set(there.members) == {"here", "phone"}
    again = there.forget("phone")
    assert here.forget_on_word("there", "phone", again)


def test_a_guest_s_introduction_brings_no_forgotten_node_back() -> None:
    table = Membership()
    table.admit(Member("friend", "friend", zone="guest"))
    table.admit(Member("phone", "phone"))
    table.forget("phone")
    assert not table.introduce("friend", Member("phone", "phone", admission=1 << 40))
    assert table.version < 1 << 40


# --- the group ------------------------------------------------------------------------------------


def test_the_third_node_is_introduced_to_every_member(start_node: Callable[..., Node]) -> None:
    laptop, jetson, phone = start_node("laptop"), start_node("jetson"), start_node("phone")
    pair(laptop, jetson)
    pair(laptop, phone)
    wait_until("the members to meet", lambda: jetson.sees_online(phone), ONLINE_S)
    wait_until("the members to meet", lambda: phone.sees_online(jetson), ONLINE_S)
    assert jetson.peers()["phone"]["trusted"]


def test_a_node_comes_back_with_another_port(nodes: Nodes) -> None:
    laptop, jetson, phone = nodes.group("laptop", "jetson", "phone")
    before = phone.call("status")["port"]
    phone.stop()
    wait_until("phone to be offline", lambda: laptop.peers()["phone"]["state"] == "offline")
    with socket.socket() as taken:  # its old port is somebody else's now
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", before))
            taken.listen()
        phone.start().wait_ready()
        assert phone.call("status")["port"] != before
        wait_online([laptop, jetson, phone])


def test_forgetting_revokes_at_once_on_every_member(nodes: Nodes) -> None:
    laptop, jetson, phone = nodes.group("laptop", "jetson", "phone")
    assert laptop.call("forget", {"node": "phone"})["node_id"] == phone.node_id
    assert set(laptop.peers()) == {"jetson"}
    wait_until("jetson to forget phone, too", lambda: set(jetson.peers()) == {"laptop"})
    wait_until("phone to notice", lambda: not (phone.sees_online(laptop) or phone.sees_online(jetson)))
    assert jetson.sees_online(laptop)


def test_an_introduction_does_not_bring_a_forgotten_node_back(nodes: Nodes) -> None:
    """Jetson was away when laptop forgot phone: it comes back, still knowing phone, and is told."""
    laptop, jetson, _ = nodes.group("laptop", "jetson", "phone")
    jetson.stop()
    wait_until("jetson to be offline", lambda: not laptop.sees_online(jetson))
    laptop.call("forget", {"node": "phone"})
    jetson.start().wait_ready()
    wait_until("jetson to be told", lambda: laptop.sees_online(jetson) and set(jetson.peers()) == {"laptop"})
    assert set(laptop.peers()) == {"jetson"}
    tablet = nodes.start("tablet")[0]
    pair(jetson, tablet)  # another round of introductions
    wait_online([laptop, jetson, tablet])
    assert set(laptop.peers()) == {"jetson", "tablet"}
    assert set(jetson.peers()) == {"laptop", "tablet"}


def test_a_new_invite_brings_a_forgotten_node_back(nodes: Nodes) -> None:
    laptop, phone = nodes.group("laptop", "phone")
    laptop.call("forget", {"node": "phone"})
    wait_until("phone to notice", lambda: not phone.sees_online(laptop))
    pair(laptop, phone)
    wait_online([laptop, phone])


def test_a_new_invite_brings_a_forgotten_node_back_to_every_member(nodes: Nodes) -> None:
    laptop, jetson, phone = nodes.group("laptop", "jetson", "phone")
    laptop.call("forget", {"node": "phone"})
    wait_until("jetson to forget phone, too", lambda: set(jetson.peers()) == {"laptop"})
    pair(laptop, phone)
    wait_online([laptop, jetson, phone])
    jetson.stop()  # and the next round of introductions does not undo it
    jetson.start().wait_ready()
    wait_online([laptop, jetson, phone])


# --- strangers at the door ------------------------------------------------------------------------


def port_of(node: Node) -> int:
    return int(node.call("status")["port"])


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=GUARD_S)


def test_a_flood_of_handshakes_leaves_the_daemon_serving(trio: list[Node]) -> None:
    laptop, jetson, _ = trio
    with contextlib.ExitStack() as stack:
        for _ in range(FLOOD):
            stack.enter_context(connected(port_of(laptop)))
        assert laptop.call("status")["state"] == "online"
        wait_until("its peers to stay", lambda: laptop.sees_online(jetson))
        pair(laptop, jetson)  # a connection that comes after the flood
    wait_online(trio)


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(10_000),
        b"\xff" * 10_000,
        b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + b"\x04\x05READY",
    ],
    ids=["http", "zeros", "ones", "zmtp null"],
)
def test_garbage_on_the_control_port_changes_nothing(trio: list[Node], bytes_sent: bytes) -> None:
    laptop = trio[0]
    with connected(port_of(laptop)) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(bytes_sent)
        with contextlib.suppress(OSError):
            while sock.recv(4096):
                pass  # until it closes the connection, within its handshake time
    wait_online(trio)


def test_an_oversized_frame_of_a_member_costs_its_connection_alone(trio: list[Node]) -> None:
    """A member's key, but not edged: one frame above the limit. It is dropped; nobody else notices."""
    laptop, jetson, phone = trio
    given = token.decode(invited(laptop))
    with dealer((public_of(given.one_time_secret), given.one_time_secret), given.public_key) as sock:
        sock.connect(f"tcp://127.0.0.1:{given.port}")
        sock.send(bytes(wire.HEADER_BYTES_MAX + 1))
        assert not sock.poll(1000)
    wait_online([laptop, jetson, phone])


@contextlib.contextmanager
def dealer(keys: tuple[bytes, bytes] | None, server_key: bytes) -> Iterator[zmq.Socket[bytes]]:
    """A client of the control port; without keys one of the NULL mechanism."""
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    if keys is not None:
        secure_client(sock, keys, server_key)
    try:
        yield sock
    finally:
        context.destroy(linger=0)


# --- rights and zones -----------------------------------------------------------------------------


@pytest.fixture
def echo_model(tmp_path: Path) -> Path:
    file = tmp_path / "echo.txt"
    file.write_text("edged-echo 1\n")
    return file


ECHO = {"model": "echo", "prompt": "hello", "n": 8, "temperature": 0.0}


def test_a_member_without_the_right_to_submit_is_refused(nodes: Nodes, echo_model: Path) -> None:
    laptop, phone = nodes.group("laptop", "phone", plugins=["echo"])
    phone.add(echo_model, "echo")
    laptop.call("trust", {"node": "phone", "rights": ["serve", "train"]})
    error = phone.error("generate", ECHO | {"strategy": "remote", "nodes": ["laptop"]})
    assert error.exit_code == 6
    assert "laptop" in str(error)
    assert "no right to submit" in str(error)
    assert not laptop.workers()
    assert phone.call("generate", ECHO)["text"].startswith("hello")  # its own work is its own matter


def test_a_member_without_the_right_to_serve_is_not_planned(nodes: Nodes, echo_model: Path) -> None:
    laptop, _ = nodes.group("laptop", "phone", plugins=["echo", "layer_parallel"])
    laptop.add(echo_model, "echo")
    laptop.call("trust", {"node": "phone", "rights": ["submit"]})
    error = laptop.error("generate", ECHO | {"strategy": "layers", "nodes": ["laptop", "phone"]})
    assert (error.code, error.exit_code) == ("no-plan", 6)
    assert "phone: it has no right to serve" in str(error)
    plan = laptop.call("plan", {"model": "echo"})
    assert plan["chosen"] is not None
    chosen = plan["candidates"][plan["chosen"]]
    assert [role["name"] for role in chosen["roles"]] == ["laptop"]


def test_a_guest_is_used_only_where_it_is_allowed(nodes: Nodes, echo_model: Path) -> None:
    laptop, phone = nodes.start("laptop", "phone", plugins=["echo"])
    pair(laptop, phone, zone="guest")
    wait_online([laptop, phone])
    assert laptop.peers()["phone"]["zone"] == "guest"
    laptop.add(echo_model, "echo")
    asked = ECHO | {"strategy": "remote", "nodes": ["phone"]}
    error = laptop.error("generate", asked)
    assert (error.code, error.exit_code) == ("no-plan", 6)
    assert "guest" in str(error)
    assert laptop.call("generate", asked | {"allow_guest": True})["text"].startswith("hello")


def test_a_guest_s_word_does_not_remove_my_own_devices(nodes: Nodes) -> None:
    laptop, jetson = nodes.group("laptop", "jetson")
    friend = nodes.start("friend")[0]
    pair(laptop, friend, zone="guest")
    wait_online([laptop, jetson, friend])
    friend.call("forget", {"node": "jetson"})
    wait_until("friend to have forgotten jetson", lambda: set(friend.peers()) == {"laptop"})
    pair_all([laptop, jetson])  # long enough for the word to arrive; and it must not have counted
    assert laptop.sees_online(jetson)


def test_forgetting_ends_running_work(nodes: Nodes, smol: Path) -> None:
    laptop, jetson, phone = nodes.group("laptop", "jetson", "phone", plugins=["shard"])
    laptop.add(smol, "smol")
    phone.add(smol, "smol")
    mine = laptop.job(LONG | {"strategy": "remote", "nodes": ["phone"]}).until_token()
    theirs = phone.job(LONG | {"strategy": "remote", "nodes": ["jetson"]}).until_token()
    laptop.call("forget", {"node": "phone"})
    error = mine.error()
    assert error.exit_code == 6
    assert "phone" in str(error)
    assert "forgotten" in str(error)
    assert theirs.error().exit_code == 6
    wait_no_workers(laptop, jetson, phone)


LONG = {"model": "smol", "prompt": "Hi", "n": 1500, "temperature": 0.0, "ignore_eos": True, "strict": True}


def test_rights_that_are_taken_away_hold_for_what_is_loaded(nodes: Nodes, echo_model: Path) -> None:
    """A warm plan would pass by every rule that a new one is checked against."""
    laptop, phone = nodes.group("laptop", "phone", plugins=["echo", "layer_parallel"])
    phone.add(echo_model, "echo")
    asked = ECHO | {"strategy": "layers", "nodes": ["phone", "laptop"]}
    assert phone.call("generate", asked)["text"].startswith("hello")
    assert phone.call("generate", asked)["measured"]["load_ms"] == 0
    laptop.call("trust", {"node": "phone", "rights": ["serve", "train"]})
    wait_until("its role to end", lambda: not laptop.workers())
    assert "no right to submit" in str(phone.error("generate", asked))
    laptop.call("trust", {"node": "phone", "rights": ["submit", "serve", "train"]})
    phone.call("trust", {"node": "laptop", "rights": ["submit"]})
    assert "no right to serve" in str(phone.error("generate", asked))
    phone.call("trust", {"node": "laptop", "rights": ["submit", "serve"], "zone": "guest"})
    assert "guest" in str(phone.error("generate", asked))
