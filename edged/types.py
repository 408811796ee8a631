"""Values that cross a boundary: between modules, processes, plugins and nodes.

Frozen, without behaviour beyond derived properties. Sizes are bytes, durations seconds unless
the name says otherwise, ranges half-open, unknown is None. They travel as msgpack maps and are
read back with `msgspec.convert`, which checks every field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Range = tuple[int, int]
Zone = Literal["own", "guest"]
Right = Literal["submit", "serve", "train"]
Severity = Literal["info", "warning", "error"]
Numerics = Literal["fast", "exact"]
CacheType = Literal["f32", "f16", "q8_0"]

RIGHTS: tuple[Right, ...] = ("submit", "serve", "train")
WATTS_MAX = 10_000.0  # of one device; more is a slip


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a model file. `shape` in the file's order (ggml: the row length first)."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What planning needs to know of a model; made once by a child process at `models add`.

    `heads`, `ffn` and `vocab` can be cut at multiples of `head_unit` (query heads), `ffn_unit`
    (columns) and `vocab_unit` (rows): whole KV-head groups and whole quantisation blocks.
    """

    architecture: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_tokens: int
    weight_type: str
    head_unit: int
    ffn_unit: int
    vocab_unit: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    tensors: tuple[TensorEntry, ...] = ()
    chat_template: bool = False
    layer_cuts: tuple[tuple[int, int, int], ...] = ()  # of `layer_bytes`: cut by heads, by ffn, by nothing
    reductions: int = 2  # sums over a tensor group in each layer


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Role:
    """One node's part of a plan. Ranks with the same `stage` form a tensor group over its layers."""

    rank: int
    node_id: str
    stage: int
    layers: Range
    heads: Range  # query heads
    ffn: Range  # columns of the feed-forward's hidden width
    vocab: Range  # rows of the output head this rank computes; empty outside the last stage
    share: float  # this rank's part of its stage
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """Bytes of hidden states between two nodes for one token, both ways together."""

    nodes: tuple[str, str]
    bytes: int


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a plan should cost; None where nothing was measured yet."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    joules_per_token: float | None = None
    bytes_per_token: int | None = None
    bytes_per_link: tuple[LinkTraffic, ...] = ()
    joules_source: str | None = None
    correction: float = 1.0  # that earlier jobs of the same plan brought to time and joules
    load_ms: float | None = None  # until every node has its part, where nobody has loaded it yet


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a job, before it is priced and chosen."""

    strategy: str
    roles: tuple[Role, ...]
    predicted: Predicted = Predicted()
    refused_because: str | None = None
    engine: str = ""  # that shall run it; filled in by the core
    broken_rule: str | None = None  # whose reason `refused_because` is, by its name in `edged.rules`
    stated: Predicted | None = None  # where its engine computes outside the group; by the core


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """Micro-benchmark of one engine and weight type on one device."""

    name: str
    weight_type: str
    decode_bytes_s: float
    prefill_flops_s: float
    layer_s: float = 0.0  # of a token, in each layer, beside reading its weights
    token_s: float = 0.0  # of a token, beside its layers
    attend_s: float = 0.0  # of a token, for each position before it and element of its queries, in each layer
    sustained: float = 1.0  # of this peak, what the device gave in steady work; above 0, at most 1


@dataclass(frozen=True, slots=True)
class LinkCost:
    """One way of a data-plane connection while both ways are used: seconds until a few bytes are there, then
    bytes a second, of which `burst_bytes` may pass at once after a pause (a token bucket)."""

    latency_s: float
    bytes_s: float
    burst_bytes: float = 0.0

    def time_s(self, size: float, idle_s: float = 0.0) -> float:
        """Seconds of sending `size` bytes each way, again and again with `idle_s` between."""
        if not self.burst_bytes:
            return self.latency_s + size / self.bytes_s
        queued_s = max(size / self.bytes_s - idle_s, (size - self.burst_bytes) / self.bytes_s, 0.0)
        return self.latency_s + queued_s


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a node measured of its connection to `node_id`. `dials`: this side can open connections.

    `rtt_ms` is of pings between daemons; `latency_s`, `bandwidth_bytes_s` and `burst_bytes` are of the data
    plane, as LinkCost."""

    node_id: str
    rtt_ms: float | None = None
    bandwidth_bytes_s: float | None = None
    dials: bool = True
    latency_s: float | None = None
    burst_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Battery:
    """All batteries of a device as one. `joules`, `capacity_joules`: in them now, and when full."""

    percent: float | None = None
    charging: bool | None = None
    plugged: bool | None = None
    joules: float | None = None
    capacity_joules: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One reading of a device; a sensor that is not there is None, never a guess."""

    memory_total: int | None = None
    memory_free: int | None = None
    cpu_count: int | None = None
    cpu_name: str | None = None
    load_1m: float | None = None
    battery: Battery | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    power_source: str | None = None  # which sensor says so
    battery_celsius: float | None = None
    is_throttled: bool | None = None  # slowed down by heat or a weak supply
    in_use: bool | None = None  # somebody is at the device
    is_wireless: bool | None = None
    is_metered: bool | None = None


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as the planner sees it."""

    node_id: str
    name: str
    zone: Zone = "own"
    online: bool = True
    rights: tuple[Right, ...] = RIGHTS
    device: DeviceState = DeviceState()
    memory_budget: int | None = None
    engines: tuple[str, ...] = ()
    speeds: tuple[EngineSpeed, ...] = ()
    links: tuple[LinkState, ...] = ()
    holds: tuple[str, ...] = ()  # sha256 of complete models
    profile: str | None = None  # its device class
    refuses: str = ""  # why it takes no new role now, or none of who asks: battery, heat, owner, rights
    watts: tuple[float, float] | None = None  # idle and at work, as its profile says
    power_mode: int | None = (
        None  # by its battery, 1 is the weakest; None on mains, or where there is but one
    )
    bearable: float | None = None  # jobs a slot that its battery bears in the long run
    weight: float = 1.0  # what a policy lets it do, of what its speed says
    unfitted: str = ""  # why `bearable` is unknown although its profile says what is harvested
    adapters: tuple[str, ...] = ()  # of its engines, those that apply them


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA adapter's file, by its content."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked of the plan. `nodes` in rank order; None lets the planner choose."""

    strategy: str = "auto"
    nodes: tuple[str, ...] | None = None
    shares: tuple[float, ...] | None = None
    context_tokens: int = 4096
    prompt_tokens: int = 128
    numerics: Numerics = "fast"
    allow_guest: bool = False
    private: bool = False
    cache_tokens: int = 0  # of all sequences together; at least one context
    cache_type: CacheType = "f16"
    policy: str = ""  # what chooses; "": the default
    may_leave: bool = True  # may somebody outside the group compute it? Not where its first plan was bound
    adapter: AdapterFile | None = None  # that the model runs with


# --- running ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy. The random number of a position is a
    function of (seed, position), so a resumed job draws the same tokens. An engine may look at the best
    256 tokens alone for top_p without top_k."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens of one sequence to run through the model at `position` and on.

    The engine answers with the next token, or None where `sampling` is None (a part of a prompt
    whose continuation is not wanted yet).
    """

    sequence: int
    tokens: Sequence[int]
    position: int
    sampling: Sampling | None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything an engine needs to load its role in a worker.

    `context_tokens` is the most that one sequence may hold, `cache_tokens` all together (at least
    one context); `cache_type` the KV cache's elements, F32 in exact numerics whatever it says.
    """

    model_path: str
    model: ModelDescription
    roles: tuple[Role, ...]
    rank: int
    context_tokens: int
    numerics: Numerics = "fast"
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights_bytes: int = 0  # memory that the weights may take; 0: as much as they are
    cache_folder: str = ""  # where an engine may keep what it makes of the model
    cache_tokens: int = 0
    cache_type: CacheType = "f16"
    model_name: str = ""  # that it is stored under
    adapter_path: str = ""  # of a LoRA file that its weights are adapted by

    @property
    def role(self) -> Role:
        return self.roles[self.rank]


@dataclass(frozen=True, slots=True)
class Computed:
    """What one rank computed since it was loaded, waits for other ranks left out.

    `compute_s`: seconds, of every batch. The others are of single tokens, batches of one, as many as the
    engine timed: how many, the seconds that they took by the clock and in the computing thread's own time
    (less where other processes had the core), and the sum of their positions.
    """

    compute_s: float = 0.0
    tokens: int = 0
    token_s: float = 0.0
    token_cpu_s: float = 0.0
    positions: int = 0


@dataclass(frozen=True, slots=True)
class Metered:
    """What a device spent on one role since it holds it, beyond its idle draw, as far as its sensor saw.
    `metered_s`: how much of `elapsed_s` that was."""

    joules: float
    metered_s: float
    elapsed_s: float


class Channel(Protocol):
    """A worker's encrypted connections to the other ranks of its plan.

    Messages between two ranks arrive whole and in order. A frame is a contiguous buffer of at most
    `wire.FRAME_BYTES_MAX`; it travels uncopied through msgpack. `receive` raises PeerError, naming
    the rank, when nothing came within `timeout_s` or the other side is gone, and ProtocolError on a
    message that is not one of ours.
    """

    rank: int
    size: int
    bytes_sent: int

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None: ...

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]: ...

    def poll(self, source: int, timeout_s: float) -> bool:
        """True when a message of `source` waits."""
        ...

    def exchange(self, ranks: Sequence[int], frame: Any, timeout_s: float) -> list[memoryview]:
        """Send `frame` to each of `ranks` and take one of the same size from each, all at once."""
        ...

    def move(
        self, sends: Sequence[tuple[int, Any]], takes: Sequence[tuple[int, int]], timeout_s: float
    ) -> list[memoryview]:
        """Send a frame to each (rank, frame), take one from each (rank, size in bytes), all at once.

        Frames moved this way are counted apart from messages, in strict lock-step: a frame of another
        size or number is a ProtocolError. What is taken stands until the next frame of its rank.
        """
        ...


@runtime_checkable
class Engine(Protocol):
    """A loaded shard of a model. Lives in a worker; every call comes from one thread.

    Rank 0 calls everything but `follow`; it drives the other ranks over the channel, which call
    `follow` in a loop. `decode` gives bytes, since a token may be part of a character.

    An engine that counts what it computes has `computed`, a Computed, replaced after each batch; without
    it nobody learns what its device sustains.
    """

    end_tokens: frozenset[int]

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> bytes: ...

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        """Admit a new sequence that will hold at most `positions` tokens. How many leading tokens of
        `prompt` need not be run again; None while there is no room for it."""
        ...

    def lanes(self, sequences: int) -> int:
        """Into how many batches, all begun before the first is finished, to divide so many sequences."""
        ...

    def begin(self, steps: Sequence[Step]) -> None:
        """Hand a batch in. A sequence is in one unfinished batch at most."""
        ...

    def finish(self) -> list[int | None]:
        """The next token of each step of the oldest unfinished batch; None without a sampling, and where an
        engine that waits for somebody outside has no token yet: it is asked again, by a step without tokens.
        """
        ...

    def release(self, sequence: int) -> None:
        """The sequence is over, or was given up; it is in no unfinished batch."""
        ...

    def follow(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class SwappingEngine(Engine, Protocol):
    """An engine whose adapters come and go beside its weights, each by a number from 1 that is not used
    again; 0 is what it was loaded with."""

    def open(self, sequence: int, prompt: Sequence[int], positions: int, adapter: int = 0) -> int | None:
        """As Engine's, for a sequence that runs with an adapter. EngineError where there is no such."""
        ...

    def adapt(self, adapter: int, path: str) -> None:
        """Load an adapter's file; every rank is asked. EngineError where it does not fit the model."""
        ...

    def forget(self, adapter: int) -> None:
        """Rank 0: an adapter is not wanted any more. Its memory is given back, on every rank, when the last
        sequence that runs with it is over. EngineError where there is no such."""
        ...

    def undo(self, adapter: int) -> None:
        """Give back on this rank alone what no sequence was given."""
        ...


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Who does what in a training job.

    `settings`: the job's, with everything in it that was left to the planner. By rank: its role, whose
    `memory_bytes` it needs there; in `data` the data set of its node that it trains on, "" for none.
    `collector`: the rank of the submitter's node. `reporters`: the ranks that tell the loss of every step.
    `step_s`: of one step; None where a node was never measured. `optional`: ranks without which it goes on;
    `optional_least`: how many of these must be there when an epoch begins. Their checkpoints do not say where
    it goes on, and its trainers take `left`. `engines`: by rank; empty: the training's own for all.
    """

    settings: Mapping[str, Any]
    roles: tuple[Role, ...] = ()
    data: tuple[str, ...] = ()
    steps: int = 0
    reporters: tuple[int, ...] = (0,)
    collector: int = 0
    step_s: float | None = None
    refused_because: str = ""
    explanation: tuple[str, ...] = ()
    optional: tuple[int, ...] = ()
    optional_least: int = 0
    engines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """What a planned training should cost: bytes over all links, and seconds; None where unknown."""

    bytes_sent: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """Everything a trainer needs for its rank of a job.

    `data_path`: rows to train on, "" for none. `state_folder`: of this rank of this job, for checkpoints;
    `collector`: the rank whose node the job was submitted to; it writes the adapter to
    `state_folder`/adapter and ends with a report of kind "done".
    """

    job: str
    settings: Mapping[str, Any]
    roles: tuple[Role, ...]
    rank: int
    data_path: str
    state_folder: str
    collector: int
    model_name: str
    model_sha256: str
    threads: int = 1
    aggregators: Mapping[str, str] = field(default_factory=dict)  # `load` by name, of this node's own plugins
    locals: Mapping[str, str] = field(default_factory=dict)  # likewise `local`, of those that have one
    joins: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # likewise `joins` and `replays`
    wholes: Mapping[str, str] = field(default_factory=dict)  # likewise `whole`, of those that have one
    weight_most: int = 0  # likewise the least `weight_most`


Report = Callable[[str, int, Mapping[str, float]], None]  # kind ("step", "eval", "done"), step, values


class Trainer(Protocol):
    """One rank of a training job, in a worker. Every rank runs the same schedule; nobody drives.

    `survey`: what it counted in its data, for the prediction of bytes; "spent" in it: figures of which the
    job's document has the most of any rank. `steps_kept`: steps at which it has a checkpoint of this job.
    `run` goes on from `step` (0, or one that every rank has kept) to the end; it looks at `is_stopped` at
    least every second, and returns early then. PeerError: another rank is gone; any other EdgedError ends
    the job.

    Two more that a trainer may have, called on another thread than `run`, also before it:
    `left(rank, reason)`, an optional rank takes no part any more; `device(state)`, a new reading of this
    device (DeviceState).
    """

    survey: Mapping[str, Any]
    steps_kept: Sequence[int]

    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None: ...

    def close(self) -> None: ...


# --- rounds ---------------------------------------------------------------------------------------

# By module ("model.layers.3.self_attn.q_proj"): A (r, in) and B (out, r), F32 arrays of numpy, read only. The
# layer computes W x + scale B A x.
Factors = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Member:
    """A client of a federated job, as its server knows it: its rank in the plan, and its adapter's r and
    scale, alpha / r."""

    rank: int
    r: int
    scale: float


@dataclass(frozen=True, slots=True)
class Update:
    """What a member ended a round's local steps with. `weight`: rows it trained on, above 0. `extras`: more
    that the aggregator asked its members for, by name; arrays of numpy."""

    member: Member
    round: int
    weight: float
    factors: Factors
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Download:
    """What a member loads before a round's local steps. `merged`, its scale in it, is added to the frozen
    weights for good, first; then the member's adapter becomes `factors`. `extras`: more that its local steps
    need. Without factors its `LocalPart` makes them, and its update has none either."""

    factors: Factors
    merged: Factors = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)


class Aggregator(Protocol):
    """Makes one next state of a round's client updates; in the server's worker, with numpy and without torch.

    A round: `begin`, `add` for each update in the order of ranks, `finish`, then `download` for every member.
    Before the first round `download` gives what the job starts from. `add` keeps no update where the state
    does not need it, so that memory does not grow with members; `bytes_kept` says what it does keep. It
    measures nothing: the round loop compares what it made with what it was given.
    """

    def frozen(self, round: int) -> str:
        """ "A" or "B": the factor that no member trains or sends in this round; "" for none. "AB": no member
        sends any, but its `LocalPart`'s extras alone."""
        ...

    def begin(self, round: int, members: Sequence[Member]) -> None: ...

    def add(self, update: Update) -> None:
        """ConfigError where the update cannot be used: unlike ranks with a mean of factors, say."""
        ...

    def finish(self) -> None:
        """PolicyViolation where there are too few updates; the state is then that before `begin`."""
        ...

    def download(self, member: Member) -> Download: ...

    def adapter(self) -> Mapping[str, tuple[Any, Any, float]]:
        """All that was learned since the base, for everybody: by module A, B and scale."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Arrays of numpy, from which `load_state_dict` goes on bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class LocalPart(Protocol):
    """A member's part of a method whose local steps take no gradient; in the member's worker, with numpy.

    Where it has `after_gradients`, true, the local steps are the trainer's own, by gradients: `train` comes
    after them, with factors that they made and that it leaves as they are, and only says what is sent.
    """

    def begin(self, download: Download) -> Factors:
        """What the member's adapter becomes: the download's factors, or what its extras say of the start."""
        ...

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Any, Any]], loss: Callable[[int], float]
    ) -> Mapping[str, Any]:
        """The local steps of these numbers, on Factors that it changes in place; `loss(step)` is that of the
        step's rows with them as they are. The extras of the update."""
        ...


class WholePart(Protocol):
    """A member's part of a method that tunes all of a model's weights, without gradients and in place; in the
    member's worker, with numpy. What it sends and keeps is no larger for that."""

    def rebuild(self, name: str, weight: Any, extras: Mapping[str, Any]) -> None:
        """Make of a tensor's start, flat F32 of numpy, what a download's extras say of it: in place, and the
        same bits on every device."""
        ...

    def train(
        self, steps: range, weights: Mapping[str, Any], loss: Callable[[int], float]
    ) -> Mapping[str, Any]:
        """The local steps of these numbers, on all tensors by name; `loss(step)` is that of the step's rows
        with them as they are. The extras of the update. It keeps no copy of a tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Travels:
    """What goes to and from a member in a round.

    `down`, `up`: the factors, "AB", "A", "B" or "". `stack`: the rank of what is merged, 0 for nothing.
    Extras: name, dtype (numpy's, "f4") and shape of each array; in a shape the name of a key of the job's
    file stands for its value, "values" for as many as an adapter has, "layers" and "r" for its own, "blocks"
    for as many as its layers have factors. Parts: the key that says which part of the values is
    sent, with a bit for each of them all.
    """

    down: str = "AB"
    up: str = "AB"
    stack: int = 0
    down_extras: Sequence[tuple[str, str, Sequence[str]]] = ()
    up_extras: Sequence[tuple[str, str, Sequence[str]]] = ()
    down_part: str = ""
    up_part: str = ""


@dataclass(frozen=True, slots=True)
class AggregatorEntry:
    """A way to aggregate client updates: a value of `method` in a federated job.

    load: "package.module:attribute", in a worker: load(settings, start, members) -> Aggregator, where
        `settings` are the job's and `start` the Factors that it begins with, at the largest r of any member
    keys: of a job's file that only it reads
    check(options): those keys' values, pure; ConfigError names the one that is wrong
    least(options) -> updates without which there is no round
    is_sum: is what it makes a weighted sum of the updates? Then members may mask them: of all it gets one
        update, their mean. A LocalPart that sends no factors then makes one extra, "sums" (seeds,) F32,
        where the settings say `masked`.
    unlike_ranks: may members have adapters of unlike r?
    bytes_kept(cohort, values): memory of the server for so many updates of so many values; None: that of
        one state, whatever the cohort
    local: "package.module:attribute", in a member's worker: local(settings, start, rank) -> LocalPart, where
        no gradient is taken; empty: local steps by gradients, which the member's trainer does
    after_gradients: do the members take gradients all the same, and `local` comes after them?
    joins: likewise, of a member that takes part so in a job with another method: it starts from factors,
        and sends extras and no factors
    replays: "package.module:attribute", in the server's worker: replays(settings, factors, extras) ->
        Factors, what such a member's `factors` became by its extras
    whole: "package.module:attribute", in a member's worker: whole(settings, sizes, rank) -> WholePart, of a
        job whose `parameters` are "all"; `sizes`: how many values each tensor has, by name. Its aggregator
        starts from no factors, and all that was learned is in a download's extras. Empty: it tunes adapters
    travels(round, ranks) -> Travels, from the r of every member whose update is in what goes down; for the
        prediction of bytes. None: all factors, both ways; before the first round nothing goes down, since
        everybody draws the same start.
    weight_most: rows that a member may count for at most where this node aggregates, whatever the job says;
        0: no bound of the node's own
    """

    name: str
    load: str
    keys: Sequence[TrainingKey] = ()
    check: Callable[[Mapping[str, Any]], None] | None = None
    least: Callable[[Mapping[str, Any]], int] | None = None
    is_sum: bool = False
    unlike_ranks: bool = False
    local: str = ""
    after_gradients: bool = False
    joins: str = ""
    replays: str = ""
    whole: str = ""
    bytes_kept: Callable[[int, int], int] | None = None
    travels: Callable[[int, Sequence[int]], Travels] | None = None
    weight_most: int = 0


# --- what plugins register ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingKey:
    """A key of a training job's file, for `edged config --explain`."""

    key: str
    default: Any
    text: str


@dataclass(frozen=True, slots=True)
class Training:
    """A kind of training job: `edged finetune NAME`.

    check(table) -> the settings of a job's file, every default filled in; ConfigError names the key
    plan(settings, model, nodes) -> TrainingPlan over nodes (the first is the submitter), pure
    cost(plan, model, surveys) -> TrainingCost, from what each rank's trainer counted in its data, pure
    memory(settings, model, roles, rank) -> bytes that a rank's worker takes, pure: the asked node's own
        count, which stands against what the submitter says; None: nothing to count
    load: "package.module:attribute", in a worker: load(spec: TrainingSpec, loaded, channel) -> Trainer, where
        `loaded` is what the rank's engine made of the model: `engine`'s own `load`, or another's `blocks`
    steps_key: of the file, what `steps` of the settings are counted by; a job that goes on may have more
    engine_of(settings, rank) -> the engine that a plan's settings name for a rank, which an asked node holds
        against what it is offered; None: `engine` for all

    A job's file has `model`, and a list `clients` of tables whose `node` is a member's name or id and whose
    `data` is a data set that its owner offers.
    """

    name: str
    engine: str
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    plan: Callable[[Mapping[str, Any], ModelDescription, Sequence[NodeView]], TrainingPlan]
    cost: Callable[[TrainingPlan, ModelDescription, Sequence[Mapping[str, Any]]], TrainingCost]
    load: str
    keys: Sequence[TrainingKey] = ()
    memory: Callable[[Mapping[str, Any], ModelDescription, Sequence[Role], int], int] | None = None
    steps_key: str = "steps"
    engine_of: Callable[[Mapping[str, Any], int], str] | None = None


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """An engine by dotted names ("package.module:attribute"), resolved in a worker only.

    load(spec: EngineSpec, channel: Channel) -> Engine
    describe(path: str) -> ModelDescription as a dict; EngineError where it cannot run it
    measure(settings: dict) -> list of EngineSpeed as dicts
    check(settings: dict) -> dict {"version": str, "max_error": float}; EngineError when unusable
    ranges(spec: EngineSpec) -> byte ranges of the model file that `load` reads for this role, given a
        file of which only the head, up to its first tensor, need be there. Empty: all of the file.
    adapt(folder: str, base: str, out: str) -> dict {"r": int, "alpha": float, "made_for": str | None}:
        checks a PEFT folder for the model file `base` and writes llama.cpp's file of it to `out`;
        ConfigError where it does not fit. Empty: it brings no such function.
    rewrite(folder: str, base: str, out: int, kind: "f32" or "f16", whole, tick(done, total)) -> dict
        {"tensors": int, "bytes": int}: writes into the open file `out` the model that the stored start
        `base` and the seeds of `folder` make, which is an adapter of kind "seeds" (its adapter_config.json
        has the `settings` and its tensors are the extras that `AggregatorEntry.whole`, given here, goes by).
        ConfigError where it is another model's, EngineError where the disk fails. Empty: it brings none.
    pack(folder: Path, file: Path) -> makes one file, which `describe` knows, of a model that is a folder; in
        the command line's own process, so it is light. ConfigError where the folder is no such model.

    `window_bytes`: memory in which the engine computes with weights of any size, read again for every
    token (`EngineSpec.weights_bytes`); 0: they must all fit.
    A model is stored under the engine that described it first. `takes`: engines whose models this one
    runs too. `strategies`, `numerics`: what it can do (None: every strategy); `remedy`: what helps
    whoever asked for more. `models`: the names of those that it runs (None: any).
    `stated`: what a token costs with an engine that computes outside the group: by the strategy `cloud`
    alone, for this node's own jobs that are not private, in a role that holds no part of the model. None:
    it computes here, and the core knows the price.
    `adapters`: does it apply the LoRA adapter of `EngineSpec.adapter_path`? `swaps`: is what it loads a
    SwappingEngine, so that jobs with unlike adapters, and without one, share its weights?
    `blocks`: where `load` makes an Engine, load(spec, channel) -> what a Training's `load` takes, for
    ranks whose plan names this engine. Empty: it trains only where it is the Training's own engine.
    `lacks`: what must be installed before it computes, for a person to read; "": all is there.
    """

    name: str
    load: str
    describe: str
    measure: str
    check: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    ranges: str = ""
    window_bytes: int = 0
    takes: tuple[str, ...] = ()
    strategies: tuple[str, ...] | None = None
    numerics: tuple[Numerics, ...] = ("fast", "exact")
    remedy: str = ""
    models: tuple[str, ...] | None = None
    stated: Predicted | None = None
    adapt: str = ""
    rewrite: str = ""
    pack: str = ""
    adapters: bool = False
    swaps: bool = False
    blocks: str = ""
    lacks: str = ""


class Propose(Protocol):
    """Pure: candidates of one strategy for a model over the given nodes, the first being the
    submitter unless the request names nodes. Raises PolicyViolation, ConfigError or PeerError with
    the reason where the request cannot be met."""

    def __call__(
        self, model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
    ) -> Sequence[Candidate]: ...


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to form a plan. `search`: "package.module:attribute" of a function of the same arguments that
    looks further and takes longer. It yields candidates again and again, each time in place of the former: at
    once what a fast method finds, at last the best. It runs in a process of its own, within the planner's
    deadline; what it has yielded by then stands beside what `propose` says."""

    name: str
    propose: Propose
    search: str = ""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy chooses in. `nodes`: every node of the candidates, by id. `draw`: a random number in
    [0, 1), new for each choice, so that a policy needs none of its own. `now`: Unix time. `start_by`: until
    when (Unix time) the job may wait; None: it may not. `tokens`: the most it makes; 0 where unknown."""

    candidates: Sequence[Candidate]
    nodes: Mapping[str, NodeView]
    request: PlanRequest
    draw: float
    now: float
    start_by: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Deferral:
    """A job should not start before `until` (Unix time); `reason` is for a person."""

    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job went whose plan a policy chose. `joules_per_token`: None where unknown."""

    candidate: Candidate
    joules_per_token: float | None
    is_done: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """What chooses among priced plans.

    choose(situation) -> index of an allowed candidate, or None: none should run now
    is_steady: the same question among the same members has the same answer, so that a loaded plan may serve
        it again without being asked for
    weigh(nodes) -> for each node id what part of its speed a plan should use; strategies divide by it
    learn(outcome): told of every job whose plan it chose
    defer(situation) -> until when a job that may wait should, and why, or None: now. Asked before `choose`
        while there is a `start_by`, and again when that time has come
    note(situation) -> what a person should know of its choice, a sentence; "" where there is nothing
    fit: "package.module:attribute", called in a process of its own with descriptions of batteries (see
        `edged.scenario.Simulated`) as dicts; what each bears, by name: `NodeView.bearable`. A node calls
        the one of its policies for its own battery. Jobs are refused where no node's is known
    refused_because: what this node lacks for it; jobs are refused with that reason

    All are pure but for what `learn` keeps, and a policy of turns, which remembers its choices.
    """

    name: str
    choose: Callable[[Situation], int | None]
    weigh: Callable[[Sequence[NodeView]], Mapping[str, float]] | None = None
    learn: Callable[[Outcome], None] | None = None
    fit: str = ""
    is_steady: bool = True
    note: Callable[[Situation], str] | None = None
    defer: Callable[[Situation], Deferral | None] | None = None
    refused_because: str = ""


@dataclass(frozen=True, slots=True)
class Announcement:
    """All that discovery ever says of a node."""

    fingerprint: str
    port: int
    protocol: int
    interfaces: tuple[str, ...] = ()  # names or addresses to bind; empty: every interface


@dataclass(frozen=True, slots=True)
class Sighting:
    """A node that discovery heard of: a hint, never trust."""

    fingerprint: str
    addresses: tuple[str, ...]
    port: int
    protocol: int


class Discoverer(Protocol):
    """A running discovery service; `seen` and `lost` are called on the daemon's loop."""

    async def start(
        self, announcement: Announcement, seen: Callable[[Sighting], None], lost: Callable[[str], None]
    ) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DiscovererEntry:
    name: str
    discoverer: Discoverer


@dataclass(frozen=True, slots=True)
class SensorEntry:
    """A device reader. `read` answers within a few milliseconds; None fields are filled by others."""

    name: str
    read: Callable[[], DeviceState]


# --- health -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """Something a person should know, declared by code, cleared when it is over."""

    code: str
    severity: Severity
    text: str
    remedy: str
