"""The wire: every message comes back as it went, and nothing else gets past it but a ProtocolError."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged import errors, wire
from edged.errors import EdgedError, EngineError, PeerError, PolicyViolation, ProtocolError
from edged.types import EngineSpeed, ModelDescription, Role, Sampling, TensorEntry, Zone

settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")

ANSWERS = (wire.Paired, wire.Described, wire.Offered, wire.Started, wire.Used, wire.Manifest, wire.Serving)
BODIES = [*dict.fromkeys((*wire.BODIES.values(), *ANSWERS))]
NUMBERS = st.integers(1, 2**53)

# --- what comes back ------------------------------------------------------------------------------

WORDS = st.text(max_size=8)
COUNTS = st.integers(0, 2**40)
FLOATS = st.floats(allow_nan=False, width=32)
for scalar, strategy in ((str, WORDS), (int, COUNTS), (float, FLOATS), (bytes, st.binary(max_size=32))):
    st.register_type_strategy(scalar, strategy)

PORTS = st.integers(0, 65535)  # Hypothesis does not know msgspec's bounds
PLAIN = st.dictionaries(WORDS, COUNTS | WORDS | st.lists(COUNTS, max_size=2), max_size=3)
OFFERED = st.builds(wire.TrainingOffer, job=st.from_regex("[0-9a-f]{16}", fullmatch=True), settings=PLAIN)
st.register_type_strategy(wire.TrainingOffer, OFFERED)
st.register_type_strategy(wire.Started, st.builds(wire.Started, survey=PLAIN))
BY_RANK = st.dictionaries(COUNTS, PORTS, max_size=4)
st.register_type_strategy(wire.PeerEnd, st.builds(wire.PeerEnd, port=PORTS, stream_port=PORTS))
st.register_type_strategy(wire.Offered, st.builds(wire.Offered, ports=BY_RANK, stream_ports=BY_RANK))
st.register_type_strategy(wire.Sent, st.builds(wire.Sent, to=st.integers(0, wire.RANK_MAX)))


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
@settings(max_examples=30)
@given(data=st.data())
def test_every_body_comes_back_as_it_went(kind: type[Any], data: st.DataObject) -> None:
    body = data.draw(st.from_type(kind))
    message = wire.unpack(wire.pack("any", body, request=5))
    assert wire.read_body(kind, message.body) == body


@given(kind=st.text(min_size=1, max_size=64), request=NUMBERS, answers=NUMBERS)
def test_every_header_comes_back_as_it_went(kind: str, request: int, answers: int) -> None:
    expected = wire.Message(kind, {"a": 1}, request, answers)
    assert wire.unpack(wire.pack(kind, {"a": 1}, request=request, answers=answers)) == expected


def test_an_absent_body_is_an_empty_one() -> None:
    assert wire.unpack(wire.pack("ping")) == wire.Message("ping", {})
    assert wire.unpack(wire.pack("ping", wire.Empty())) == wire.Message("ping", {})


def test_an_unknown_field_is_for_a_newer_reader() -> None:
    assert wire.read_body(wire.Stop, {"group": "g", "colour": "red"}) == wire.Stop("g")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "group"),
        ({"group": 3}, "group"),
        ({"group": None}, "group"),
        ({"group": "g", "rank": "0", "reason": ""}, "rank"),
        ({"group": "g", "rank": True, "reason": ""}, "rank"),
        ({"group": "g", "rank": 0.5, "reason": ""}, "rank"),
        ([], "Lost"),
        (None, "Lost"),
    ],
)
def test_a_body_with_a_wrong_field_is_refused_by_its_name(body: Any, says: str) -> None:
    with pytest.raises(ProtocolError, match=rf"expected a Lost body; .*{says}|Lost body; Expected .object"):
        wire.read_body(wire.Lost, body)


@pytest.mark.parametrize("zone", ["own", "guest", "owner", "", None])
def test_a_word_of_a_set_is_one_of_the_set(zone: Any) -> None:
    body = {"protocol": 1, "version": "1", "name": "n", "port": 1, "zone": zone}
    if zone in get_args(Zone):
        assert wire.read_body(wire.Hello, body).zone == zone
    else:
        with pytest.raises(ProtocolError, match="zone"):
            wire.read_body(wire.Hello, body)


# --- the specification ----------------------------------------------------------------------------


def specified() -> dict[str, str]:
    """kind -> answer, as the docstring's table has them."""
    assert wire.__doc__
    rows = re.findall(r"^    (\w+) +\w[\w ]*(?:-> \w[\w ]*?|way) {2,}(.*)$", wire.__doc__, re.MULTILINE)
    return {kind: rest.partition("answer: ")[2] for kind, rest in rows}


def test_the_docstring_lists_exactly_the_kinds_that_are_read() -> None:
    assert sorted(specified()) == sorted(wire.BODIES)


def test_the_docstring_has_the_limits() -> None:
    assert wire.__doc__
    for limit in ("HEADER_BYTES_MAX", "FRAMES_MAX", "DEPTH_MAX", "CONTAINERS_MAX", "PING_S"):
        assert limit in wire.__doc__
        assert hasattr(wire, limit)


def test_the_longest_manifest_fits_a_header() -> None:
    """400 GB in chunks of 4 MiB, and as many tensors as the largest models have."""
    tensor = TensorEntry("blk.100.ffn_gate_exps.weight", "Q4_K", (16384, 16384, 128), 2**38, 2**33)
    model = st_model(tensors=(tensor,) * 3000)
    manifest = wire.Manifest("0" * 64, 400 * 10**9, 4 << 20, (b"\xff" * 32,) * 95_368, model, "n" * 64)
    assert wire.read_body(wire.Manifest, wire.unpack(wire.pack("ok", manifest)).body) == manifest


def st_model(**changes: Any) -> ModelDescription:
    fields = {field.name: 1 for field in dataclasses.fields(ModelDescription)}
    described = {
        "architecture": "llama",
        "weight_type": "Q4_K",
        "layer_bytes": (1,) * 200,
        "layer_cuts": ((1, 1, 1),) * 200,
    }
    return ModelDescription(**(fields | described | {"chat_template": True} | changes))  # type: ignore[arg-type]


# --- limits ---------------------------------------------------------------------------------------


def nested(levels: int, container: type) -> Any:
    value: Any = container()
    for _ in range(levels - 1):
        value = [value] if container is list else {"a": value}
    return value


@pytest.mark.parametrize("container", [list, dict])
def test_a_header_may_be_so_deep_and_no_deeper(container: type) -> None:
    wire.unpack(wire.pack("x", {"a": nested(wire.DEPTH_MAX - 2, container)}))
    with pytest.raises(ProtocolError, match=f"at most {wire.DEPTH_MAX} levels"):
        wire.unpack(wire.pack("x", {"a": nested(wire.DEPTH_MAX - 1, container)}))


@pytest.mark.parametrize("levels", [100, 1_000, 100_000])
def test_any_depth_is_refused_without_harm(levels: int) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack(b"\x81\xa1k" + b"\x91" * levels + b"\x90")


def test_a_header_may_be_so_long_and_no_longer() -> None:
    overhead = len(wire.pack("x", {"a": b"\0" * (1 << 20)})) - (1 << 20)
    longest = {"a": b"\0" * (wire.HEADER_BYTES_MAX - overhead)}
    packed = wire.pack("x", longest)
    assert len(packed) == wire.HEADER_BYTES_MAX
    assert wire.unpack(packed).body == longest
    with pytest.raises(ProtocolError, match="to send"):
        wire.pack("x", {"a": longest["a"] + b"\0"})
    with pytest.raises(ProtocolError, match="came"):
        wire.unpack(packed + b"\0")


@pytest.mark.parametrize("empty", [b"\x90", b"\x80"], ids=["lists", "maps"])
def test_a_small_message_cannot_become_many_objects(empty: bytes) -> None:
    """A byte each on the wire, sixty in memory: four megabytes were a third of a gigabyte."""
    header, items = b"\x82\xa1k\xa1x\xa1b\x81\xa1a\xdd", wire.CONTAINERS_MAX - 3  # the header's own three
    assert wire.unpack(header + items.to_bytes(4, "big") + empty * items)
    with pytest.raises(ProtocolError, match=f"at most {wire.CONTAINERS_MAX} maps and lists"):
        wire.unpack(header + (items + 1).to_bytes(4, "big") + empty * (items + 1))


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"k": ""},
        {"k": "x" * 65},
        {"k": 1},
        {"k": None},
        {"k": b"ping"},
        {"k": "ping", "b": []},
        {"k": "ping", "b": None},
        {"k": "ping", "i": -1},
        {"k": "ping", "i": 2**53 + 1},
        {"k": "ping", "i": 1.0},
        {"k": "ping", "r": True},
        {"k": "ping", "r": "1"},
        {1: 2},
        {"k": "ping", 1: 2},
        [],
        None,
        3,
        "ping",
    ],
)
def test_what_is_no_header_is_refused(header: Any) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack(msgpack.packb(header))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",  # never used by msgpack
        b"\xdf\xff\xff\xff\xff",  # a map of four billion
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",  # four gigabytes
        b"\x81\xa1k\xa4ping\x00",  # something after it
        b"\x81\xa1k\xa4pin",
        b"\x81\xa1k\xa1\xff",  # no UTF-8
        b"\x81\x90\x01",  # a list as a key
        b"\x81\xa1k\xd6\xff\0\0\0\0",  # a timestamp
        b"\x81\xa1k\xc7\x0c\xff\xff\xff\xff\xff\0\0\0\0\0\0\0\0",  # an impossible one
    ],
)
def test_bytes_that_are_no_message_are_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack(packed)
    with pytest.raises(ProtocolError):
        wire.unpack(memoryview(packed))


# --- fuzz -----------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=33)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**33), st.integers(0, 10**9 - 1))
)
KEYS = st.text(max_size=4) | st.integers(0, 9) | st.binary(max_size=3) | st.none() | st.floats()
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


def read(packed: bytes, kind: type[Any]) -> None:
    """What the network may do to us: nothing, or a ProtocolError."""
    try:
        message = wire.unpack(packed)
        wire.read_body(kind, message.body)
    except ProtocolError:
        return
    assert message.kind
    assert isinstance(message.body, dict)


@given(packed=st.binary(max_size=300), kind=st.sampled_from(BODIES))
def test_arbitrary_bytes_raise_nothing_else(packed: bytes, kind: type[Any]) -> None:
    read(packed, kind)


@given(
    header=st.dictionaries(st.sampled_from(["k", "i", "r", "b", "x"]), ANYTHING), kind=st.sampled_from(BODIES)
)
def test_arbitrary_headers_raise_nothing_else(header: dict[str, Any], kind: type[Any]) -> None:
    read(msgpack.packb(header), kind)


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
@settings(max_examples=30)
@given(data=st.data())
def test_arbitrary_fields_raise_nothing_else(kind: type[Any], data: st.DataObject) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    body = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(names, ANYTHING)))
    read(wire.pack("x", body), kind)


SEEDS = [
    wire.pack("hello", wire.Hello(1, "0.1.0", "phone", 47000, ("192.0.2.1", "2001:db8::1")), request=7),
    wire.pack("start", wire.Start("g", (wire.PeerEnd(1, "n" * 52, b"k" * 32, 47001),)), request=2**53),
    wire.pack("ok", wire.Offered(b"k" * 32, {1: 47001, 2: 0}), answers=7),
    wire.pack("generate", wire.Generate("g", "j", 1, ({"role": "user"},), None, 8, Sampling(), False)),
    wire.pack(
        "offer",
        wire.Offer(
            "g", 0, (Role(0, "n" * 52, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0),), "0" * 64, "m", "0" * 64,
            st_model(layer_bytes=(1, 2)), "shard", 2048, "fast", (1,), "n" * 52,
        ),
        request=9,
    ),
]  # fmt: skip


@given(
    packed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0), st.sampled_from("=+-"), st.binary(min_size=1, max_size=4))),
    kind=st.sampled_from([wire.Hello, wire.Start, wire.Offered, wire.Generate, wire.Offer]),
)
def test_mutated_messages_raise_nothing_else(
    packed: bytes, changes: list[tuple[int, str, bytes]], kind: type[Any]
) -> None:
    mutant = bytearray(packed)
    for place, change, new in changes:
        at = place % (len(mutant) + 1)
        if change == "=":
            mutant[at : at + len(new)] = new
        elif change == "+":
            mutant[at:at] = new
        else:
            del mutant[at : at + new[0]]
    read(bytes(mutant), kind)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        EdgedError("a", remedy="b"),
        PeerError("a", remedy="b"),
        PeerError("a", code="no-peers"),
        PolicyViolation("no plan can run", remedy="free memory", code="no-plan"),
        EngineError("out of memory", code="memory"),
        ProtocolError("nonsense"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error.code}",
)
def test_an_error_crosses_the_wire(error: EdgedError) -> None:
    message = wire.unpack(wire.pack_error(error, answers=3))
    assert (message.kind, message.answers) == ("error", 3)
    with pytest.raises(type(error)) as caught:  # also with a code of its own
        wire.raise_error(message.body)
    assert type(caught.value) is type(error)
    for field in ("code", "exit_code", "remedy"):
        assert getattr(caught.value, field) == getattr(error, field)
    assert str(caught.value) == str(error)


def test_a_long_error_is_cut_and_not_refused() -> None:
    body = wire.unpack(wire.pack_error(EdgedError("m" * 10**7, remedy="r" * 10**7), answers=1)).body
    assert (len(body["message"]), len(body["remedy"])) == (2000, 500)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("code", "message", "remedy", "exit_code"), ANYTHING))
)
def test_any_error_body_raises_an_error_of_ours(body: dict[str, Any]) -> None:
    with pytest.raises(EdgedError) as caught:
        wire.raise_error(body)
    assert caught.value.exit_code in {getattr(errors, name).exit_code for name in ERRORS}


ERRORS = [name for name, value in vars(errors).items() if isinstance(value, type)]


def test_a_body_is_a_map() -> None:
    with pytest.raises(TypeError):
        wire.to_map(EngineSpeed)
    assert wire.to_map(EngineSpeed("a", "b", 1.0, 2.0)) == msgspec.to_builtins(
        EngineSpeed("a", "b", 1.0, 2.0)
    )
