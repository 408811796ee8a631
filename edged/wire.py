"""The messages edged speaks, and their limits. This docstring is the specification (protocol 1).

Between daemons (ZeroMQ, CURVE): one message is a ZeroMQ multipart of exactly one frame, the header.
Between the workers of a plan: a header and at most FRAMES_MAX raw tensor frames.
On the control socket and between a daemon and its workers (UNIX streams): a 4-byte big-endian
length and one header.

A header is a msgpack map of at most HEADER_BYTES_MAX bytes, DEPTH_MAX levels and CONTAINERS_MAX maps
and lists:

    k  kind, text                     always
    i  request number, 1 to 2**53     on a request that wants an answer
    r  the request number answered    on an answer, whose kind is "ok" or "error"; an error's body has
                                      code, message, remedy, exit_code, kind (its class; see errors.py)
    b  body, a map                    as the kind says; absent means empty

Between daemons every kind has one body type, listed in BODIES; a body is checked field by field and
an unknown kind, a missing field or a wrong type is a ProtocolError. Fields may be added with a
default; a reader ignores fields that it does not know. The first message on a new connection is
`hello`; a node whose `protocol` differs is refused with both numbers in the text. With a one-time
key `pair` is the only kind that is read.

    pair        newcomer -> inviter     names the newcomer's own key      answer: paired
    hello       either way              who I am, what I speak            answer: hello
    ping        either way              alive? (every PING_S)             answer: {}
    introduce   inviter -> member       a new member, rights no wider than the introducer's
    forget      member -> member        a node is revoked
    leave       member -> member        I go offline on purpose
    describe    coordinator -> member   device, speeds, links, models     answer: described
    offer       coordinator -> member   take this role?                   answer: offered, or error
    start       coordinator -> member   connect and load                  answer: started, or error
    stop        coordinator -> member   end the role
    lost        member -> coordinator   a worker of this group ended
    left        coordinator -> member   a rank takes no part any more; go on without it
    usage       coordinator -> member   what its role sent, holds, spent  answer: used
    draining    member -> coordinator   give my roles no new job; I leave when they are done
    resting     member -> coordinator   I save energy: move what runs here elsewhere if you can
    short       member -> coordinator   end my roles that no job uses; I have little memory
    probe       member -> member        let us measure our connection     answer: offered, or error
    probe_start member -> member        connect and exchange              answer: a LinkCost, or error
    adapt       coordinator -> member   have an adapter beside the model  answer: {}, or error
    generate    coordinator -> rank 0   begin a job on a loaded group
    cancel      coordinator -> rank 0   end a job
    train       coordinator -> member   go on with a training from a step
    trained     member -> coordinator   a rank's step, evaluation, end or error
    tokens      rank 0 -> coordinator   new tokens of a job
    finished    rank 0 -> coordinator   a job ended
    manifest    member -> holder        the chunk hashes of a model       answer: manifest_of
    serve       member -> holder        open a transfer of a model        answer: serving

`manifest` and `serve` give the adapters of a plan too, to its members alone, while it has them.

Nothing here is ever unpickled, evaluated or handed to a shell.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgpack
import msgspec

from .errors import EdgedError, ProtocolError, by_code
from .types import (
    AdapterFile,
    CacheType,
    Computed,
    DeviceState,
    EngineSpeed,
    LinkState,
    Metered,
    ModelDescription,
    Numerics,
    Right,
    Role,
    Sampling,
    Zone,
)

HEADER_BYTES_MAX = 4 << 20  # a manifest of a 400 GB model fits, a flood does not
FRAME_BYTES_MAX = 256 << 20  # one prompt batch of F32 logits of a 128k vocabulary
FRAMES_MAX = 8
DEPTH_MAX = 16
CONTAINERS_MAX = 1 << 16  # a byte of msgpack makes 60 of Python; a model's tensors need thousands
NAME_CHARS_MAX = 64
CERTIFICATE_BYTES_MAX = 2048  # DER of a P-256 key and two short names takes about 400
PORT_MAX = 65535
RANK_MAX = 1 << 16
KIND_CHARS_MAX = 32  # of a message between workers
SENT_MAX = 4096  # rows of what a worker sent: receivers times kinds
PING_S = 1.0
T = TypeVar("T")
Certificate = Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_BYTES_MAX)]
Port = Annotated[int, msgspec.Meta(ge=0, le=PORT_MAX)]
Reason = Literal["length", "stop", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Message:
    """One header, unpacked. `request` and `answers` are request numbers or 0."""

    kind: str
    body: dict[str, Any]
    request: int = 0
    answers: int = 0


# --- bodies between daemons -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Empty:
    pass


@dataclass(frozen=True, slots=True)
class Hello:
    """`run`: a number of this start of the daemon; another one says that what it coordinated has ended."""

    protocol: int
    version: str
    name: str
    port: int
    addresses: tuple[str, ...] = ()
    zone: Zone = "own"
    run: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0


@dataclass(frozen=True, slots=True)
class Pair:
    node_id: str
    name: str
    port: int
    protocol: int
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Paired:
    node_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Introduce:
    node_id: str
    name: str
    addresses: tuple[str, ...]
    port: int
    rights: tuple[Right, ...]
    zone: Zone
    admission: int = 0  # the membership version at which it was invited after it was forgotten, if ever


@dataclass(frozen=True, slots=True)
class Forget:
    node_id: str
    version: int  # of the membership at which it was revoked; an admission above it is later


@dataclass(frozen=True, slots=True)
class Described:
    device: DeviceState
    memory_budget: int | None
    engines: tuple[str, ...]
    speeds: tuple[EngineSpeed, ...]
    links: tuple[LinkState, ...]
    models: dict[str, str]  # sha256 -> name, whole ones only
    profile: str
    refuses: str = ""
    watts: tuple[float, float] | None = None
    bearable: float | None = None  # jobs a slot that its battery bears, from 0 to 1
    unfitted: str = ""  # why it is unknown, though the profile says a harvest
    adapters: tuple[str, ...] = ()  # of its engines, those that apply them


@dataclass(frozen=True, slots=True)
class Describe:
    measure: bool = False  # run the micro-benchmark first where it was never run


@dataclass(frozen=True, slots=True)
class TrainingOffer:
    """The training that a role is a part of. `settings`: of the job, as its kind checks them; `data`: the
    data set of the asked node that this rank trains on, "" for none."""

    job: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    kind: str
    settings: dict[str, Any]
    data: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A role of `group`. `listens_for`: ranks that will dial this one. `training`: what it is for, where it
    is not for generating."""

    group: str
    rank: int
    roles: tuple[Role, ...]
    model_sha256: str
    model_name: str
    manifest_sha256: str
    model: ModelDescription
    engine: str
    context_tokens: int
    numerics: Numerics
    listens_for: tuple[int, ...]
    holder: str  # a node that has the model
    cache_tokens: int = 0  # KV positions of all sequences together; at least one context
    cache_type: CacheType = "f16"
    training: TrainingOffer | None = None
    adapter: AdapterFile | None = None  # that the coordinator has


@dataclass(frozen=True, slots=True)
class Offered:
    """The worker stands. `ports`: rank -> port it listens on for that rank. `certificate` (DER) and
    `stream_ports`: of its TLS streams, where it offers any."""

    public_key: bytes
    ports: dict[int, Port]
    certificate: Certificate = b""
    stream_ports: dict[int, Port] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerEnd:
    """Where and as whom a rank is reached; ports 0 where that rank dials us. Without a certificate it
    offers no TLS stream."""

    rank: int
    node_id: str
    public_key: bytes
    port: Port
    certificate: Certificate = b""
    stream_port: Port = 0


@dataclass(frozen=True, slots=True)
class Start:
    group: str
    ends: tuple[PeerEnd, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """`survey`, `steps_kept`: of a trainer."""

    load_ms: float
    memory_bytes: int
    survey: dict[str, Any] = field(default_factory=dict)
    steps_kept: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """`listens`: whether the asked side does."""

    group: str
    listens: bool


@dataclass(frozen=True, slots=True)
class ProbeStart:
    group: str
    end: PeerEnd


@dataclass(frozen=True, slots=True)
class Stop:
    group: str


@dataclass(frozen=True, slots=True)
class Usage:
    group: str


@dataclass(frozen=True, slots=True)
class Sent:
    """What a worker handed to TCP for another rank in messages of a kind, framing and encryption included."""

    to: Annotated[int, msgspec.Meta(ge=0, le=RANK_MAX)]
    kind: Annotated[str, msgspec.Meta(max_length=KIND_CHARS_MAX)]
    messages: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    bytes: Annotated[int, msgspec.Meta(ge=0, le=2**53)]


SentEach = Annotated[tuple[Sent, ...], msgspec.Meta(max_length=SENT_MAX)]


@dataclass(frozen=True, slots=True)
class Used:
    """`metered`: None where the node meters nothing. `sustained`: of the role's weight type, as in
    EngineSpeed. `sent`: of a training's role, its bytes by receiver and kind."""

    bytes_sent: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    memory_bytes: int
    metered: Metered | None = None
    sustained: float = 1.0
    sent: SentEach = ()


@dataclass(frozen=True, slots=True)
class Spent:
    """A worker's answer to its own daemon. `computed`: None where its engine does not count it."""

    bytes_sent: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    memory_bytes: int
    computed: Computed | None = None
    sent: SentEach = ()


@dataclass(frozen=True, slots=True)
class Lost:
    """`rank`: whose loss it is; another's, where a worker of the teller's saw its connection end."""

    group: str
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """To the ranks that go on: this one takes no part in the group any more."""

    group: str
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resting:
    reason: str


@dataclass(frozen=True, slots=True)
class Adapt:
    """Have the coordinator's adapter `file` beside the model of a group, as `number`. Or give back those of
    `forgets`, when the last sequences with them are over, or `undoes`, that no sequence was given."""

    group: str
    number: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    file: AdapterFile | None = None
    forgets: tuple[int, ...] = ()
    undoes: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0


@dataclass(frozen=True, slots=True)
class Generate:
    """`history`: tokens that an earlier epoch of the job made; they go through the model after the prompt,
    with `replays` one by one, as they were made, and the first new one has their number as its index.
    `adapter`: the number of one that the group was told to have beside its model; 0: what it was loaded
    with."""

    group: str
    job: str
    epoch: int
    messages: tuple[dict[str, str], ...]
    raw: str | None
    tokens_max: int
    sampling: Sampling
    ignore_eos: bool
    history: tuple[int, ...] = ()
    adapter: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    replays: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    group: str
    job: str


@dataclass(frozen=True, slots=True)
class Train:
    """Begin at `step`. `told`: the first step of which the coordinator has no report, to be told again.
    `away`: optional ranks that are not there."""

    group: str
    job: str
    epoch: int
    step: int
    told: int = 0
    away: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trained:
    """`values`: loss, tokens and the like of a step or an evaluation. `error`: code, message and remedy.
    "kept", an adapter that is this node's alone, is from a worker to its own daemon and goes no further;
    "alive": a rank works on what has no steps."""

    job: str
    epoch: int
    rank: int
    kind: Literal["step", "eval", "done", "error", "kept", "alive"]
    step: int
    values: dict[str, float] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tokens:
    job: str
    epoch: int
    index: int  # of the first token here, from 0
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """`reason`: length, stop, cancelled or error; then `error` says why, and `lost_rank` whose loss it
    was, if it was one's."""

    job: str
    epoch: int
    reason: Reason
    error: str = ""
    lost_rank: int | None = None


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """SHA-256 of each CHUNK_BYTES of a model file. Its own hash travels in the plan."""

    sha256: str
    size: int
    chunk_bytes: int
    chunks: tuple[bytes, ...]
    model: ModelDescription
    name: str


@dataclass(frozen=True, slots=True)
class ManifestOf:
    """A manifest, and the engine that described the model where it was added."""

    manifest: Manifest
    engine: str | None


@dataclass(frozen=True, slots=True)
class Serve:
    sha256: str
    public_key: bytes


@dataclass(frozen=True, slots=True)
class Serving:
    public_key: bytes
    port: int


BODIES: dict[str, type[Any]] = {
    "pair": Pair,
    "hello": Hello,
    "ping": Empty,
    "introduce": Introduce,
    "forget": Forget,
    "leave": Empty,
    "draining": Empty,
    "resting": Resting,
    "short": Empty,
    "describe": Describe,
    "offer": Offer,
    "start": Start,
    "stop": Stop,
    "probe": Probe,
    "probe_start": ProbeStart,
    "usage": Usage,
    "lost": Lost,
    "adapt": Adapt,
    "left": Left,
    "generate": Generate,
    "cancel": Cancel,
    "tokens": Tokens,
    "finished": Finished,
    "train": Train,
    "trained": Trained,
    "manifest": ManifestRequest,
    "serve": Serve,
}


# --- packing --------------------------------------------------------------------------------------


def to_map(value: Any) -> dict[str, Any]:
    """A dataclass as plain maps and lists."""
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    if not isinstance(plain, dict):
        raise TypeError(f"a body is a map, not {type(value).__name__}")
    return plain


def read_body(kind: type[T], body: Any) -> T:
    """`body` checked against the dataclass `kind`, or a ProtocolError that names the field."""
    try:
        return msgspec.convert(body, kind, str_keys=False, builtin_types=(bytes,))
    except (msgspec.ValidationError, TypeError) as error:
        raise ProtocolError(f"expected a {kind.__name__} body; {error}") from error


def end_of(offered: Offered, rank: int, node_id: str, dialler: int | None) -> PeerEnd:
    """What `dialler` is told of a rank that listens for it; None: the rank dials, and listens for nobody."""
    if dialler is None:
        return PeerEnd(rank, node_id, offered.public_key, 0, offered.certificate, 0)
    if dialler not in offered.ports:
        raise ProtocolError(f"expected a port of rank {rank} for rank {dialler}; none came")
    ports = offered.ports[dialler], offered.stream_ports.get(dialler, 0)
    return PeerEnd(rank, node_id, offered.public_key, ports[0], offered.certificate, ports[1])


def pack(kind: str, body: Any = None, *, request: int = 0, answers: int = 0) -> bytes:
    """One header. `body`: a dataclass, a map or None."""
    header: dict[str, Any] = {"k": kind}
    if request:
        header["i"] = request
    if answers:
        header["r"] = answers
    if body is not None:
        header["b"] = dict(body) if isinstance(body, Mapping) else to_map(body)
    packed: bytes = msgpack.packb(header)
    if len(packed) > HEADER_BYTES_MAX:
        raise ProtocolError(f"expected a header of at most {HEADER_BYTES_MAX} bytes; {len(packed)} to send")
    return packed


def pack_error(error: EdgedError, *, answers: int) -> bytes:
    body = {
        "code": error.code,
        "message": str(error)[:2000],
        "remedy": error.remedy[:500],
        "exit_code": error.exit_code,
        "kind": type(error).__name__,
    }
    return pack("error", body, answers=answers)


def unpack(packed: bytes | memoryview) -> Message:
    """A header read from the network; ProtocolError on anything that is not one."""
    header = unpack_map(packed)
    kind, body = header.get("k"), header.get("b", {})
    request, answers = header.get("i", 0), header.get("r", 0)
    if not isinstance(kind, str) or not 0 < len(kind) <= NAME_CHARS_MAX or not isinstance(body, dict):
        raise ProtocolError("expected a header with a kind and a body that is a map")
    for number in (request, answers):
        if type(number) is not int or not 0 <= number <= 2**53:
            raise ProtocolError("expected request numbers from 0 to 2**53")
    return Message(kind, body, request, answers)


def unpack_map(packed: bytes | memoryview) -> dict[str, Any]:
    """A bounded msgpack map with text keys at its top."""
    if len(packed) > HEADER_BYTES_MAX:
        raise ProtocolError(f"expected a header of at most {HEADER_BYTES_MAX} bytes; {len(packed)} came")
    count = itertools.count(1)

    def counted(container: Any) -> Any:
        if next(count) > CONTAINERS_MAX:
            raise ProtocolError(f"expected at most {CONTAINERS_MAX} maps and lists")
        return container

    try:
        value = msgpack.unpackb(packed, strict_map_key=False, list_hook=counted, object_hook=counted)
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise ProtocolError(f"expected msgpack; {type(error).__name__}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError(f"expected a map with text keys; a {type(value).__name__} came")
    if _depth(value) > DEPTH_MAX:
        raise ProtocolError(f"expected at most {DEPTH_MAX} levels")
    return value


def raise_error(body: Mapping[str, Any]) -> None:
    """Raise the error that an "error" answer describes."""
    text = {key: str(body.get(key, ""))[:2000] for key in ("code", "message", "remedy", "kind")}
    exit_code = body.get("exit_code")
    raise by_code(**text, exit_code=exit_code if isinstance(exit_code, int) else 1)


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        if deepest > DEPTH_MAX:
            break
        children: list[Any] = []
        for item in level:
            children += item.values() if isinstance(item, dict) else item
        level = [child for child in children if isinstance(child, dict | list)]
    return deepest
