"""What ranks say they sent: added up over epochs, stored, and read again; and who made an adapter."""

from __future__ import annotations

import pytest

from edged import wire
from edged.errors import ProtocolError
from edged.figures import (
    COUNT_MAX,
    KINDS_MAX,
    OTHER,
    UNKNOWN,
    Egress,
    egress_of,
    egress_rows,
    egress_with,
    made_of,
    rounds_log,
)

NODES = ("phone", "desk")


def used(*sent: wire.Sent) -> wire.Used:
    return wire.Used(sum(each.bytes for each in sent), 0, sent=sent)


def test_epochs_and_ranks_add_up_by_sender_receiver_and_kind() -> None:
    before: Egress = {("phone", "desk", "up"): (2, 200)}
    phone = used(wire.Sent(1, "up", 1, 100), wire.Sent(1, "told", 1, 9))
    desk = used(wire.Sent(0, "down", 1, 300))
    expected = {
        ("phone", "desk", "up"): (3, 300),
        ("phone", "desk", "told"): (1, 9),
        ("desk", "phone", "down"): (1, 300),
    }
    assert egress_with(before, (phone, desk), NODES) == expected
    assert before == {("phone", "desk", "up"): (2, 200)}
    assert egress_with(before, (), ()) == before
    assert egress_with({}, (None, desk), NODES) == {("desk", "phone", "down"): (1, 300)}


def test_bytes_for_a_rank_that_is_none_are_nobody_s() -> None:
    assert egress_with({}, (used(wire.Sent(7, "up", 1, 100)), None), NODES) == {}


def test_kinds_that_a_rank_makes_up_are_one_beyond_a_bound_in_however_many_epochs() -> None:
    """What is known by its kind goes on to be, and no byte is lost."""
    egress: Egress = {("desk", "phone", "down"): (1, 5)}
    for epoch in range(3):
        made_up = [wire.Sent(1, f"{epoch}-{number}", 1, 2) for number in range(KINDS_MAX)]
        egress = egress_with(egress, (used(*made_up, wire.Sent(1, "0-0", 1, 2)), None), NODES)
    of_phone = {kind: count for (source, _, kind), count in egress.items() if source == "phone"}
    assert len(of_phone) == KINDS_MAX + 1
    assert of_phone["0-0"] == (4, 8)
    assert of_phone[OTHER] == (2 * KINDS_MAX, 4 * KINDS_MAX)
    assert egress["desk", "phone", "down"] == (1, 5)


def test_what_ranks_say_they_sent_fits_into_a_document_however_often_they_say_it() -> None:
    most = wire.Sent(1, "up", 2**53, 2**53)
    egress = egress_with({}, (wire.Used(0, 0, sent=(most,) * wire.SENT_MAX), None), NODES)
    assert egress == {("phone", "desk", "up"): (COUNT_MAX, COUNT_MAX)}
    wire.pack("ok", {"egress": egress_rows(egress)}, answers=1)


def test_rows_are_read_again_and_what_came_later_is_of_no_known_kind() -> None:
    egress: Egress = {("phone", "desk", "up"): (3, 300), ("desk", "phone", "down"): (1, 50)}
    assert egress_of(egress_rows(egress), 350) == egress
    assert egress_of(egress_rows(egress), 100) == egress  # what a step told of was not the last
    assert egress_of(egress_rows(egress), 360) == egress | {("", "", UNKNOWN): (0, 10)}
    assert egress_of([], 0) == {}


def test_of_a_coordinator_that_ended_twice_no_byte_is_lost() -> None:
    once = egress_of(egress_rows({("phone", "desk", "up"): (3, 300)}), 310)
    twice = egress_of(egress_rows(once), 350)
    assert twice == {("phone", "desk", "up"): (3, 300), ("", "", UNKNOWN): (0, 50)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"to": -1, "kind": "up", "messages": 1, "bytes": 1},
        {"to": 0, "kind": "x" * 33, "messages": 1, "bytes": 1},
        {"to": 0, "kind": "up", "messages": -1, "bytes": 1},
        {"to": 0, "kind": "up", "messages": 1, "bytes": 1 << 60},
        {"to": 0, "kind": "up", "messages": 1},
        {"to": 0, "kind": b"up", "messages": 1, "bytes": 1},
    ],
    ids=str,
)
def test_counts_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    body = {"bytes_sent": 1, "memory_bytes": 1}
    with pytest.raises(ProtocolError, match="Used body"):
        wire.read_body(wire.Used, body | {"sent": [wrong]})
    many = {"to": 0, "kind": "up", "messages": 1, "bytes": 1}
    with pytest.raises(ProtocolError, match="Used body"):
        wire.read_body(wire.Used, body | {"sent": [many] * (wire.SENT_MAX + 1)})


@pytest.mark.parametrize("body", [wire.Used, wire.Spent])
@pytest.mark.parametrize("wrong", [-7, 1 << 60])
def test_bytes_that_nobody_can_have_sent_are_refused(body: type[object], wrong: int) -> None:
    with pytest.raises(ProtocolError, match=f"{body.__name__} body"):
        wire.read_body(body, {"bytes_sent": wrong, "memory_bytes": 1})


def test_a_member_counts_with_the_rounds_in_which_its_update_did() -> None:
    """The third was refused once, and the second was not drawn in the last round."""
    steps = [
        (0, "step", {"loss": 1.0, "down_0": 5.0, "up_0": 4.0, "down_1": 5.0, "up_1": 4.0, "down_2": 5.0}),
        (1, "step", {"loss": 1.0, "down_0": 5.0, "up_0": 4.0, "down_1": 1.0, "down_2": 5.0, "up_2": 4.0}),
        (1, "eval", {"loss": 1.0}),
    ]
    nodes = ("pi", "tab", "mac", "desk")
    made = made_of({"method": "flora"}, rounds_log(steps, nodes), {"pi": "the pi"})
    assert made == {
        "method": "flora",
        "rounds": 2,
        "members": [
            {"node": "pi", "name": "the pi", "rounds": 2},
            {"node": "tab", "name": "tab", "rounds": 1},
            {"node": "mac", "name": "mac", "rounds": 1},
        ],
    }
    assert made_of({"masked": True}, rounds_log(steps, nodes), {})["masked"] is True
    assert made_of({"method": "split"}, [], {}) == {}
